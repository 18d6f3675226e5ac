"""A simulated shop, a trained model and a real broker, live in your terminal, in a few minutes.

Simulates a log, trains on its first 80 %, then produces it to a Kafka broker while the worker serves: the first part as
fast as it is answered, the rest at --rate, each event judged by the slate its user had before it. Without Java the log
itself is the source. Everything it makes stays in --out.

example:
  millrace demo --out out/demo --rate 400
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from worker.commands.arguments import positive, rate, seed


def configure(parser: ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for the log, the model, the report")
    parser.add_argument("--events", type=positive, default=60_000, help="length of the simulated log (default 60000)")
    parser.add_argument("--rate", type=rate, default=400.0, help="events a second of the live part (default 400)")
    parser.add_argument("--seed", type=seed, default=7)


def run(args: Namespace) -> int:
    from worker.commands.demo_steps import demo

    return demo(args.out, args.events, args.rate, args.seed)
