"""Train a model on a log: the first 80 % by time teach it, the rest is left for `millrace evaluate` and `replay`.

With --leave-out N it is each user's newest N events that are left, for `millrace evaluate --protocol last`. The latest
events before the cut judge each epoch; training stops when their NDCG no longer rises. Then the model is trained anew,
on all events before the cut, for as many epochs as were best. After every epoch a checkpoint is written beside the
artifact, from which --resume goes on exactly.

With --from ARTIFACT training goes on from a model, for a daily refresh: its items keep their places, new ones come
after them, and its shape stays. The log then holds the days to learn from and the history before them that they need;
events later than all that made ARTIFACT are new, and they alone are counted and judge the epochs. A few epochs do.

Under torchrun each process computes its part of every batch; the first one judges and writes.

examples:
  millrace train log.jsonl.gz --out artifact
  millrace train shop/events.jsonl --items shop/items.jsonl --out artifact
  millrace train ratings.tsv --columns user,item,value,ts --out artifact --epochs 60 --layers 3
  millrace train log.jsonl.gz --out artifact --preset 10m --learning-rate 5e-4
  millrace train weeks.jsonl.gz --from artifact --out artifact --until-share 1
  torchrun --nproc-per-node 2 --no-python millrace train log.jsonl.gz --out artifact
  millrace train clicks.csv --columns user,item --action click --out artifact --leave-out 10
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from worker.commands.arguments import positive, rate, seed
from worker.commands.config import add_config
from worker.commands.log_arguments import add_items, add_layout, read_events, read_records
from worker.commands.output_paths import check_folder

if TYPE_CHECKING:
    from pipeline.artifact import Manifest
    from pipeline.serving.pipeline import PipelineOptions
    from pipeline.training.distributed import Processes
    from pipeline.training.preparation import TrainingOptions
    from pipeline.training.warm_start import Base

# Option: (the struct's field, metavar, help). What is not given stays the struct's default.
TRAINER = {
    "epochs": (int, "at most so many passes over the log"),
    "seed": (seed, "of the weights, the crops, the dropout"),
    "crop-events": (int, "length of the pieces that sequences are cut into"),
    "batch-events": (int, "events a step"),
    "learning-rate": (rate, "at its highest"),
    "epoch-events": (int, "events of one epoch, other ones in each (default: all)"),
    "precision": (str, "of the matrix products: fp32 or bf16"),
    "weighting": (str, "of the heads' losses: fixed, uncertainty or dwa"),
}
MODEL = {
    "layers": (int, "of the encoder"),
    "width": (int, "of the embeddings"),
    "heads": (int, "of the attention"),
    "max-events": (int, "rows that a state reads: the newest events, and with --recent-events sessions of older ones"),
    "recent-events": (int, "newest events that are a row each, those before them one a session (default: no sessions)"),
    "history-events": (int, "newest events that a state reads with --recent-events"),
    "d-qk": (int, "of a head's queries and keys"),
    "d-v": (int, "of a head's values"),
    "dropout": (float, "of embeddings and layers"),
    "attention-dropout": (float, "of attention's weights"),
    "temperature": (rate, "of the item scores: lower tells items apart more sharply"),
    "norm-in": (str, "of a layer's rows: layer, rms or none"),
    "norm-out": (str, "of what attention has gathered, before the gate: layer, rms or none"),
    "attention-scale": (str, "what attention's sums are divided by: max_events, or length, the rows seen"),
}

REFRESH_EPOCHS = 3
CUT = ("until-share", "leave-out", "refit")


def configure(parser: ArgumentParser) -> None:
    parser.add_argument("log", type=Path, help="JSON lines, MessagePack or delimited text, gzipped or not")
    parser.add_argument("--out", type=Path, required=True, metavar="ARTIFACT", help="folder to write")
    parser.add_argument("--from", dest="base", type=Path, metavar="ARTIFACT", help="go on from this model")
    cut = parser.add_mutually_exclusive_group()
    cut.add_argument("--until-share", type=float, metavar="SHARE", help="of the events, by time (default 0.8)")
    cut.add_argument("--leave-out", type=positive, metavar="N", help="each user's newest N events, instead")
    parser.add_argument("--no-refit", dest="refit", action="store_false", help="keep the judged weights")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint beside ARTIFACT")
    parser.add_argument("--preset", help="shape by the parameters of its layers: tiny (default), 1m, 10m or 100m")
    parser.add_argument(
        "--curves",
        type=Path,
        metavar="FILE",
        help="write loss, hit rate and NDCG by epoch: a .json, or a .png beside it",
    )
    for name, (kind, text) in (TRAINER | MODEL).items():
        parser.add_argument(f"--{name}", type=kind, metavar="N" if kind in (int, seed) else "X", help=text)
    add_items(parser)
    add_layout(parser)
    add_config(parser)


def run(args: Namespace) -> int:
    from rich.console import Console

    from pipeline.artifact import load, refuse_other_files
    from pipeline.backends.torch import device_of
    from pipeline.training.distributed import joined
    from pipeline.training.warm_start import Base
    from worker import config
    from worker.inference.ranker import pipeline_options

    pipeline = pipeline_options(config.load(args.config))
    base = Base(load(args.base)) if args.base else None
    options = options_of(args, base)
    if base:
        base.check(options.model, pipeline.schema)
    check_folder(args.out.absolute().parent, "--out")
    refuse_other_files(args.out)
    with joined(device_of(pipeline.device)) as processes:
        manifest = _train(args, options, pipeline, base, processes)
    if not processes.is_first:
        return 0
    Console(soft_wrap=True).print(
        f"{args.out}: version {manifest.version}, hit rate@10 {manifest.metrics['validation_hit_rate']:.4f} on the"
        f" latest events before the cut, epoch {manifest.metrics['epoch']:.0f} of {manifest.metrics['epochs']:.0f}"
    )
    return 0


def _train(args: Namespace, options: "TrainingOptions", pipeline: "PipelineOptions", base: "Base | None",
           processes: "Processes") -> "Manifest":  # fmt: skip
    from contextlib import ExitStack
    from datetime import UTC, datetime

    from rich.console import Console

    from pipeline.training.train import train
    from worker.commands.learning_curves import Curves
    from worker.commands.training_display import TrainingDisplay

    created = datetime.now(UTC).isoformat(timespec="seconds")
    with ExitStack() as stack:
        observer = stack.enter_context(TrainingDisplay(Console(quiet=not processes.is_first)))
        if args.curves and processes.is_first:
            observer = stack.enter_context(Curves(args.curves, observer))
        log, items = read_events(args, pipeline.schema), read_records(args)
        return train(log, args.out, options, pipeline, observer, created, args.resume, items, base, processes)


def options_of(args: Namespace, base: "Base | None" = None) -> "TrainingOptions":
    """The options given, over the defaults or those of the model to go on from. TrainingError names one that is out of
    its range."""
    import msgspec

    from pipeline.errors import TrainingError
    from pipeline.training.preparation import TrainingOptions

    trainer, model = _given(args, TRAINER), _preset(args.preset) | _given(args, MODEL)
    if base:
        trainer, model = {"epochs": REFRESH_EPOCHS} | trainer, msgspec.structs.asdict(base.config) | model
    tree = {"trainer": trainer, "model": model} | _given(args, CUT)
    try:
        return msgspec.convert(tree, TrainingOptions)
    except msgspec.ValidationError as error:
        raise TrainingError(f"options: {error}; see `millrace train --help`") from error


def _preset(name: str | None) -> dict[str, object]:
    """The shape of that name; nothing where none is asked for."""
    import msgspec

    from pipeline.errors import TrainingError
    from pipeline.model.config import PRESETS

    if name is None:
        return {}
    if name not in PRESETS:
        raise TrainingError(f"options: --preset {name}: no such shape; want one of {', '.join(PRESETS)}")
    return msgspec.structs.asdict(PRESETS[name])


def _given(args: Namespace, names: "tuple[str, ...] | dict[str, tuple[type, str]]") -> dict[str, object]:
    fields = (name.replace("-", "_") for name in names)
    return {field: value for field in fields if (value := getattr(args, field)) is not None}
