"""The command `millrace`: one module of worker/commands per subcommand, imported only when it runs."""

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version

from worker.commands.dispatch import run_command

COMMANDS = {
    "run": "consume events from Kafka and answer them with slates",
    "replay": "stream a recorded log through the worker and report",
    "demo": "run a simulated shop, a real broker and a trained model in your terminal",
    "simulate": "write a realistic log of any size, with its ground truth",
    "train": "train a model on a log",
    "evaluate": "compare a model with the baselines",
    "lookup": "print a user's slate from Redis",
    "serve": "answer slate lookups over HTTP",
    "dlq": "list or requeue dead letters",
    "rebuild": "restore the users' rings in Redis from the events topic",
    "doctor": "check Kafka, Redis, artifact, GPU and optional dependencies, and name the next step",
    "config": "print the configuration with the source of each value",
}
EPILOG = """\
examples:
  millrace demo
  millrace doctor --config millrace.toml
  millrace run --config millrace.toml

exit codes:
      0  done (run: drained and committed, or stopped during the start)
      1  internal error
      2  bad usage, configuration or log
      3  artifact missing or failed verification
      4  Kafka unreachable, or it rejected a request
      5  Redis unreachable, or it rejected a command
      6  dead-letter limit reached
      7  stalled: lag without progress, or a thread hangs; stacks dumped
      8  events topic re-created: change sequences.topic_generation
      9  stopped before everything was answered and committed: the rest is read again
     10  a worker of `run --workers` keeps failing
     44  no slate for this user
130/143  a second signal cut the drain short, or a signal ended another command
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `millrace ARGV...` (default: the process's arguments) and return its exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _top_level()
    if not argv or argv[0] not in COMMANDS:
        parser.parse_args(argv or ["--help"])
        return 2
    return run_command(argv[0], argv[1:])


def _top_level() -> argparse.ArgumentParser:
    lines = "\n".join(f"  {name:<10} {text}" for name, text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        "millrace",
        usage="millrace COMMAND [options]   (millrace COMMAND --help for each)",
        description=f"Real-time recommendation served from event streams.\n\ncommands:\n{lines}",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"millrace {version('millrace')}")
    parser.add_argument("command", choices=list(COMMANDS), help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
