"""All strategies that this process can run with an artifact: one's own, the model's, and the counters'."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.counters.counters import Counters
from pipeline.errors import DeviceError, StrategyError
from pipeline.items.catalogue import Catalogue
from pipeline.strategies.options import PipelineOptions
from pipeline.strategies.own_strategies import import_class, one_line, own_names
from pipeline.strategies.simple_strategy import SimpleStrategy
from pipeline.strategies.strategy import Strategy, close_all

if TYPE_CHECKING:
    from pipeline.artifact import Artifact

MODEL_STRATEGIES = ("hstu",)  # made of the artifact alone: they rank in any thread until they serve


@dataclass(frozen=True, slots=True)
class StrategyContext:
    """Everything that a strategy is made from, as `Class(context)`; catalogue and counters are read only to rank.

    artifact: None in a process without a model. Its items have tokens in the catalogue's vocabulary.
    """

    artifact: "Artifact | None"
    catalogue: Catalogue
    counters: Counters
    options: PipelineOptions


def strategies_of(context: StrategyContext) -> list[Strategy]:
    """Return every strategy that this process can run; `check_own_strategies` must pass before they rank.

    It may run beside the thread that ranks: a strategy reads catalogue and counters only when it ranks. When it raises,
    those that were made are closed.

    Raises ArtifactError when the vocabulary lacks one of the artifact's items, DeviceError when the kernels do not run,
    StrategyError for one of `options.strategies` that cannot be loaded.
    """
    own_names(context.options.strategies)
    strategies: list[Strategy] = []
    try:
        for path in context.options.strategies:
            strategies.append(_own_strategy(path, context))
        if context.artifact is not None:
            strategies.append(_hstu_strategy(context.artifact, context))
    except BaseException:
        close_all(strategies)
        raise
    return [*strategies, SimpleStrategy(context.counters, context.options.exclusion)]


def _own_strategy(path: str, context: StrategyContext) -> Strategy:
    strategy_class = import_class(path)
    try:
        strategy = strategy_class(context)
    except (Exception, SystemExit) as error:  # whatever the class does
        raise StrategyError(
            f"pipeline.strategies '{path}': {one_line(error)} when it was made, as Class(context); mend it"
        ) from error
    if strategy.name != strategy_class.name:
        close_all([strategy])
        raise StrategyError(f"pipeline.strategies '{path}': its name changed to {strategy.name!r} when it was made")
    return strategy


def _hstu_strategy(artifact: "Artifact", context: StrategyContext) -> Strategy:
    """Return the artifact's model, warmed up."""
    from pipeline.strategies.hstu_strategy import load_hstu_strategy  # imports torch, so only for a model

    options = context.options
    strategy = load_hstu_strategy(
        artifact,
        context.catalogue,
        options.exclusion,
        device=options.device,
        threads=options.threads,
        rerank=options.rerank,
        graphs=options.graphs,
    )
    if options.graphs is None or not strategy.on_gpu:
        return strategy
    try:
        strategy.warm(artifact.item_ids, options.graphs)
    except Exception as error:  # from a compiler, a driver, or for lack of memory
        reason = str(error).partition("\n")[0]
        raise DeviceError(
            f"pipeline.device '{options.device}': the kernels do not run on this card: {reason}; set"
            " pipeline.custom_kernels = false, or less pipeline.cuda_graph_mib if its memory is too small"
        ) from error
    return strategy
