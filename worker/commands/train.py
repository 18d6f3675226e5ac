"""Train a model on a log: on its first 80 % by time; the rest is left for `millrace evaluate` and `millrace replay`.

With --leave-last-out N each user's newest N events are left out instead, for `millrace evaluate --protocol
leave-last-out`. The latest training events validate each epoch, and training stops when their NDCG no longer rises.
Then the model is trained again on all training events, for the best number of epochs. A checkpoint is written next to
the artifact after every epoch; --resume continues from it, bit for bit.

With --warm-start ARTIFACT training continues from a model, as a daily refresh does: its items keep their rows, new ones
come after them, and its shape stays. The log then holds the days to train on and the history before them. Events later
than all that ARTIFACT was trained on are new: only they are counted, and only they validate the epochs. A few epochs
suffice.

Under torchrun each process computes its part of every batch; the first one validates and writes.

examples:
  millrace train log.jsonl.gz --out artifact
  millrace train shop/events.jsonl --items shop/items.jsonl --out artifact
  millrace train ratings.tsv --columns user,item,value,ts --out artifact --epochs 60 --layers 3
  millrace train log.jsonl.gz --out artifact --preset 10m --learning-rate 5e-4
  millrace train weeks.jsonl.gz --warm-start artifact --out artifact --train-fraction 1
  torchrun --nproc-per-node 2 --no-python millrace train log.jsonl.gz --out artifact
  millrace train clicks.csv --columns user,item --action click --out artifact --leave-last-out 10
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from worker.commands.arguments import positive, rate, seed
from worker.commands.config import add_config
from worker.commands.log_arguments import (
    LOG_HELP,
    add_items,
    add_log_layout,
    read_events,
    read_records,
    with_action_aliases,
)
from worker.output.paths import check_folder

if TYPE_CHECKING:
    from pipeline.manifest import Manifest
    from pipeline.strategies.options import PipelineOptions
    from pipeline.training.distributed import ProcessGroup
    from pipeline.training.preparation import TrainingOptions
    from pipeline.training.warm_start import WarmStart
    from worker.config import Config

NORMS = ("layer", "rms", "none")
# Option: (type or choices, help). The option's name is the struct's field; omitted options keep the struct's default.
TRAINER = {
    "epochs": (int, "largest number of passes over the log"),
    "seed": (seed, "random seed of the weights, the crops and the dropout"),
    "crop-length": (int, "number of events per crop of a user's sequence"),
    "events-per-batch": (int, "number of events per optimizer step, over all processes"),
    "learning-rate": (rate, "peak learning rate"),
    "events-per-epoch": (int, "number of events per epoch, different ones each time (default: all)"),
    "precision": (("fp32", "bf16"), "precision of the matrix products"),
    "weighting": (("fixed", "uncertainty", "dwa"), "weighting of the task heads' losses"),
}
MODEL = {
    "layers": (int, "number of encoder layers"),
    "width": (int, "embedding width"),
    "heads": (int, "number of attention heads"),
    "max-events": (int, "number of rows that attention reads: the newest events, and with --recent-events sessions"),
    "recent-events": (
        int,
        "number of newest events with a row each; older ones share a row per session (default: off)",
    ),
    "history-events": (int, "number of newest events read with --recent-events"),
    "d-qk": (int, "width of a head's queries and keys"),
    "d-v": (int, "width of a head's values"),
    "dropout": (float, "dropout rate of embeddings and layers"),
    "attention-dropout": (float, "dropout rate of attention weights"),
    "temperature": (rate, "temperature of the item scores; a lower one separates items more sharply"),
    "norm-in": (NORMS, "norm before a layer's projection"),
    "norm-out": (NORMS, "norm of the attention output, before the gate"),
    "attention-scale": (("max_events", "length"), "divisor of attention's sums; length: the number of visible rows"),
}
SPLIT = ("train-fraction", "leave-last-out", "refit")
WARM_START_EPOCHS = 3


def configure(parser: ArgumentParser) -> None:
    parser.add_argument("log", type=Path, help=LOG_HELP)
    parser.add_argument("--out", type=Path, required=True, metavar="ARTIFACT", help="folder to write the artifact to")
    parser.add_argument("--warm-start", type=Path, metavar="ARTIFACT", help="artifact to continue training from")
    split = parser.add_mutually_exclusive_group()
    split.add_argument(
        "--train-fraction", type=float, metavar="X", help="fraction of the events to train on, by time (default 0.8)"
    )
    split.add_argument(
        "--leave-last-out", type=positive, metavar="N", help="number of newest events per user to leave out, instead"
    )
    parser.add_argument("--no-refit", dest="refit", action="store_false", help="keep the validated weights")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint next to ARTIFACT")
    parser.add_argument(
        "--preset", choices=("tiny", "1m", "10m", "100m"), help="model shape by its layers' parameters (default tiny)"
    )
    parser.add_argument(
        "--learning-curves",
        type=Path,
        metavar="FILE",
        help="file for loss, hit rate and NDCG per epoch: a .json, or a .png with the .json next to it",
    )
    for name, (kind, text) in (TRAINER | MODEL).items():
        if isinstance(kind, tuple):
            parser.add_argument(f"--{name}", choices=kind, help=text)
        else:
            parser.add_argument(f"--{name}", type=kind, metavar="N" if kind in (int, seed) else "X", help=text)
    add_items(parser)
    add_log_layout(parser)
    add_config(parser)


def run(args: Namespace) -> int:
    from msgspec.structs import replace
    from rich.console import Console

    from pipeline.artifact import check_target, load
    from pipeline.backends.torch import resolve_device
    from pipeline.training.distributed import process_group
    from pipeline.training.warm_start import WarmStart
    from worker import config_file
    from worker.inference.load import pipeline_options

    loaded = with_action_aliases(config_file.load(args.config), args)
    pipeline = pipeline_options(loaded)
    warm_start = WarmStart(load(args.warm_start)) if args.warm_start else None
    options = replace(training_options(args, warm_start), labels=loaded.labels)
    if warm_start:
        warm_start.check(options.model, pipeline.schema, options.labels)
    check_folder(args.out.absolute().parent, "--out")
    check_target(args.out)
    with process_group(resolve_device(pipeline.device)) as group:
        manifest = _train(args, options, loaded, pipeline, warm_start, group)
    if not group.is_main:
        return 0
    metrics = manifest.metrics
    Console(soft_wrap=True).print(
        f"{args.out}: version {manifest.version}, validation hit rate@10 {metrics['validation_hit_rate']:.4f}"
        f" (epoch {metrics['epoch']:.0f} of {metrics['epochs']:.0f})"
    )
    return 0


def _train(
    args: Namespace,
    options: "TrainingOptions",
    config: "Config",
    pipeline: "PipelineOptions",
    warm_start: "WarmStart | None",
    group: "ProcessGroup",
) -> "Manifest":
    from contextlib import ExitStack
    from datetime import UTC, datetime

    from rich.console import Console

    from pipeline.training.train import train
    from worker.output.learning_curves import LearningCurves
    from worker.output.training_display import TrainingDisplay

    created = datetime.now(UTC).isoformat(timespec="seconds")
    with ExitStack() as stack:
        callback = stack.enter_context(TrainingDisplay(Console(quiet=not group.is_main)))
        if args.learning_curves and group.is_main:
            callback = stack.enter_context(LearningCurves(args.learning_curves, callback))
        log = read_events(args, config)
        items = read_records(args)
        return train(log, args.out, options, pipeline, callback, created, args.resume, items, warm_start, group)


def training_options(args: Namespace, warm_start: "WarmStart | None" = None) -> "TrainingOptions":
    """Return the given options over the defaults, or over those of the model to continue from.

    TrainingError names an option that is out of its range.
    """
    import msgspec

    from pipeline.errors import TrainingError
    from pipeline.training.preparation import TrainingOptions

    trainer = _given(args, TRAINER)
    model = _preset(args.preset) | _given(args, MODEL)
    if warm_start:
        trainer = {"epochs": WARM_START_EPOCHS} | trainer
        model = msgspec.structs.asdict(warm_start.config) | model
    tree = {"trainer": trainer, "model": model} | _given(args, SPLIT)
    try:
        return msgspec.convert(tree, TrainingOptions)
    except msgspec.ValidationError as error:
        raise TrainingError(f"options: {error}; see `millrace train --help`") from error


def _preset(name: str | None) -> dict[str, object]:
    """Return the fields of the named shape; none without a name."""
    import msgspec

    from pipeline.model.config import PRESETS

    return {} if name is None else msgspec.structs.asdict(PRESETS[name])


def _given(args: Namespace, names: Iterable[str]) -> dict[str, object]:
    fields = (name.replace("-", "_") for name in names)
    return {field: value for field in fields if (value := getattr(args, field)) is not None}
