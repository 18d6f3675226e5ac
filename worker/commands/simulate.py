"""Write a realistic log of any size: events, items, and their ground truth in truth.json.

The ground truth's hit rate is that of the ten likeliest items given each user's hidden state, over the last 20 % of the
events. No model can be expected to reach it; a good one closes most of the gap between the counters and it.

example:
  millrace simulate --out shop --events 200000 --users 5000 --items 2000 --seed 7
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from worker.commands.arguments import positive, seed
from worker.output.paths import check_folder


def configure(parser: ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder to write the files to")
    parser.add_argument("--events", type=positive, default=200_000, help="number of events (default 200000)")
    parser.add_argument("--users", type=positive, default=5_000, help="number of users (default 5000)")
    parser.add_argument("--items", type=positive, default=2_000, help="number of items (default 2000)")
    parser.add_argument("--seed", type=seed, default=7, help="random seed (default 7)")
    parser.add_argument("--gzip", action="store_true", help="write events.jsonl.gz instead of events.jsonl")


def run(args: Namespace) -> int:
    from rich.console import Console
    from rich.progress import Progress

    from pipeline.errors import LogFileError
    from pipeline.simulation.ground_truth import simulate
    from pipeline.simulation.world import SimulatorConfig

    config = SimulatorConfig(args.events, args.users, args.items, args.seed)
    if config.items < config.topics:
        raise LogFileError(f"--items {config.items}: the shop has {config.topics} topics, give each at least one item")
    check_folder(args.out, "--out")
    console = Console()
    with Progress(console=console) as progress:
        task = progress.add_task("events", total=config.events)
        suffix = ".jsonl.gz" if args.gzip else ".jsonl"
        truth = simulate(config, args.out, suffix, lambda count: progress.advance(task, count))
    console.print(
        f"{truth.events:,} events in {args.out}; the ground truth's hit rate@10 over the last {truth.scored:,}:"
    )
    console.print(f"  {truth.hit_rate:.4f}")
    for name, head in truth.heads.items():
        auc = f"AUC of the true probabilities, {name}: {head.auc:.4f}" if head.auc else f"{name}: no labels"
        console.print(f"  {auc}")
    return 0
