"""Strategies of one's own: classes that `pipeline.strategies` names as "package.module:Class"."""

from collections.abc import Iterable
from importlib import import_module

from pipeline.errors import StrategyError
from pipeline.items.vocabulary import Vocabulary
from pipeline.strategies.conformance import check_strategy
from pipeline.strategies.exclusion import Exclusion
from pipeline.strategies.strategy import FALLBACK_ORDER, Strategy


def import_class(path: str) -> type:
    """Return the class that "package.module:Class" names. Raises StrategyError."""
    module, _, name = path.partition(":")
    if not module or not name:
        raise StrategyError(f"pipeline.strategies '{path}': want 'package.module:Class'")
    try:
        imported = import_module(module)
    except ModuleNotFoundError as error:
        raise StrategyError(
            f"pipeline.strategies '{path}': {error}; install it, or add its folder to PYTHONPATH"
        ) from error
    except (Exception, SystemExit) as error:  # a module may raise anything
        raise StrategyError(f"pipeline.strategies '{path}': {one_line(error)} when it was imported; mend it") from error
    found = getattr(imported, name, None)
    if not isinstance(found, type) or not isinstance(getattr(found, "name", None), str):
        raise StrategyError(f"pipeline.strategies '{path}': want a class with a `name`, a string, in {module}")
    return found


def one_line(error: BaseException) -> str:
    """Return an error's kind and the first line of its text."""
    text = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def own_names(paths: Iterable[str]) -> tuple[str, ...]:
    """Return the names of these strategies. Raises StrategyError, also for a name that is taken."""
    names: list[str] = []
    for path in paths:
        name = import_class(path).name
        if name in (*FALLBACK_ORDER, *names):
            raise StrategyError(
                f"pipeline.strategies '{path}': another strategy has its name, '{name}'; give it its own"
            )
        names.append(name)
    return tuple(names)


def check_own_strategies(strategies: Iterable[Strategy], vocabulary: Vocabulary, exclusion: Exclusion) -> None:
    """Raise StrategyError unless all strategies of one's own keep their promises. For the thread that ranks."""
    for strategy in strategies:
        if strategy.name not in FALLBACK_ORDER:
            check_strategy(strategy, vocabulary, exclusion)
