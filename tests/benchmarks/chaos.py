"""Many seeds of faults (tests/faults/chaos.py), a row per seed: what was lost, wrong or out of order, and how long the
workers took to catch up.

Rows are files in the folder --work as soon as they are there: the same command continues where an earlier one was
stopped, or ran out of --minutes. Nothing else should run on the machine: what is measured of it is its recovery time.

usage: python -m tests.benchmarks.chaos [--seeds 20] [--seconds 60] [--work DIR] [--minutes N] [--out FOLDER]
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.benchmarks import results
from tests.benchmarks.workers import Job, read_rows, run_saved
from tests.faults.chaos import run_seed

SUMMED = ("events", "lost", "rings_wrong", "out_of_order")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20, help="number of seeds, from 1 on (default: 20)")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long faults are drawn per seed (default: 60)")
    parser.add_argument("--work", type=Path, help="folder of the rows (default: a temporary one)")
    parser.add_argument("--minutes", type=float, help="start no seed after this many minutes")
    parser.add_argument("--out", type=Path, default=results.FOLDER, help="folder of the result (default: results)")
    args = parser.parse_args()
    with TemporaryDirectory(prefix="millrace-chaos-") as temporary:
        folder = args.work or Path(temporary)
        jobs: dict[Path, Job] = {
            folder / f"seed-{seed}.json": (run_seed, seed, args.seconds) for seed in range(1, args.seeds + 1)
        }
        if missing := run_saved(jobs, workers=1, minutes=args.minutes):
            raise SystemExit(f"{missing} seeds are left: the same command with the same --work continues")
        rows = list(read_rows(jobs))
    metrics = {name: float(sum(int(row[name] or 0) for row in rows)) for name in SUMMED}
    metrics["worst_recovery_s"] = max(float(row["worst_recovery_s"] or 0) for row in rows)
    print(metrics, f"written: {results.write('chaos', metrics, rows, args.out)}", sep="\n")


if __name__ == "__main__":
    main()
