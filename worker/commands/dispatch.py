"""Run one sub-command: parse its arguments, report its error in one sentence, return its exit status."""

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from importlib import import_module

from pipeline.errors import MillraceError
from worker.output.printable import printable

INTERRUPTED = 130
NEWLINE = "\n"


def run_command(name: str, argv: Sequence[str]) -> int:
    """Run `millrace NAME ARGV...` and return its exit status. The command's module is imported only here."""
    command = import_module(f"worker.commands.{name}")
    parser = ArgumentParser(
        f"millrace {name}", description=command.__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    command.configure(parser)
    try:
        return command.run(parser.parse_args(argv))
    except MillraceError as error:
        print(f"millrace {name}: {printable(str(error), keep=NEWLINE)}", file=sys.stderr)
        return error.exit_code
    except (KeyboardInterrupt, BrokenPipeError):
        return INTERRUPTED
