"""Check Kafka, Redis, artifact, GPU and every optional dependency, and name the next step for each gap.

The exit status is that of the first required part that is missing (4 Kafka, 5 Redis, 3 artifact), else 0.

example:
  millrace doctor --config millrace.toml
"""

from argparse import ArgumentParser, Namespace

from worker.commands.config import add_config


def configure(parser: ArgumentParser) -> None:
    add_config(parser)


def run(args: Namespace) -> int:
    import asyncio

    from worker import config_file
    from worker.operations.doctor import run_checks
    from worker.output.tables import print_tables, table

    findings = asyncio.run(run_checks(config_file.load(args.config)))
    rows = table("", "part", "finding")
    for finding in findings:
        rows.add_row(finding.mark, finding.part, finding.text)
    print_tables(rows)
    return next((finding.exit_code for finding in findings if finding.exit_code), 0)
