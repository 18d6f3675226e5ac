"""Print the configuration with the source of each value; secrets are masked.

example:
  millrace config show --config millrace.toml
"""

from argparse import ArgumentParser, Namespace


def configure(parser: ArgumentParser) -> None:
    parser.add_argument("action", choices=["show"], help="show: list every key with its value and source")
    add_config(parser)


def add_config(parser: ArgumentParser) -> None:
    """Add --config, the option of every command that reads the configuration."""
    parser.add_argument(
        "--config", metavar="FILE", help="TOML file; MILLRACE__SECTION__KEY variables override it (default: none)"
    )


def run(args: Namespace) -> int:
    from worker import config_file
    from worker.output.tables import print_tables, table

    rows = table("key", "value", "source")
    for row in config_file.show(config_file.load(args.config), args.config):
        rows.add_row(*row)
    print_tables(rows)
    return 0
