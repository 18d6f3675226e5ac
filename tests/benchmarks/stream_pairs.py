"""Compare the stream benchmark of two checkouts, run in turn on one idle machine: A B A B …

The machine's speed drifts, so the ratio is taken pair by pair and its median is quoted. Each checkout needs its own
virtual environment (`make setup`) and is run with it; the results file `stream.json` of both is overwritten, which
marks their commits as changed from the second pair on. The result names the commits instead of the folders.

usage: python -m tests.benchmarks.stream_pairs BEFORE AFTER [--pairs 5] [--events 200000]
"""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
from rich.console import Console

from tests.benchmarks import results

RATES = ("slates_per_s_hstu", "slates_per_s_simple")
console = Console()


def run_stream(checkout: Path, events: int) -> results.Result:
    """Run the benchmark in the checkout and return what it wrote."""
    command = [str(checkout / ".venv" / "bin" / "python"), "-m", "tests.benchmarks.stream", "--events", str(events)]
    subprocess.run(command, cwd=checkout, check=True, capture_output=True)
    return results.load(checkout / "tests" / "benchmarks" / "results" / "stream.json")


def measure_pair(pair: int, before: Path, after: Path, events: int) -> dict[str, results.Cell]:
    """Run both checkouts, the second one first in every other pair."""
    order = (before, after) if pair % 2 == 0 else (after, before)
    measured = {checkout: run_stream(checkout, events) for checkout in order}
    row: dict[str, results.Cell] = {"pair": pair + 1, "first": "before" if order[0] == before else "after"}
    row |= {"before_commit": measured[before].commit, "after_commit": measured[after].commit}
    for rate in RATES:
        old = measured[before].metrics[rate]
        new = measured[after].metrics[rate]
        row |= {f"before_{rate}": old, f"after_{rate}": new, f"ratio_{rate}": round(new / old, 4)}
    console.print(row)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="checkout of the earlier commit")
    parser.add_argument("after", type=Path, help="checkout of the later commit")
    parser.add_argument("--pairs", type=int, default=5, help="number of pairs (default 5)")
    parser.add_argument("--events", type=int, default=200_000, help="events of the long run (default 200000)")
    args = parser.parse_args()
    rows = [measure_pair(pair, args.before.resolve(), args.after.resolve(), args.events) for pair in range(args.pairs)]
    ratios = {f"median_ratio_{rate}": float(np.median([row[f"ratio_{rate}"] for row in rows])) for rate in RATES}  # pyright: ignore[reportArgumentType]
    sys.argv[1:3] = [str(rows[0]["before_commit"]), str(rows[0]["after_commit"])]  # not this machine's folders
    console.print(ratios, f"written: {results.write('stream_pairs', ratios, rows)}")


if __name__ == "__main__":
    main()
