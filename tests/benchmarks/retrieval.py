"""What the best items of a batch of states cost a rung on a GPU, from states on the device to arrays on the host: by
torch, in float32, and by the operator. Times are the host's; width 256, 20 items, 100 excluded a user.

    python -m tests.benchmarks.retrieval       writes results/retrieval_h100.json, or _h200
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline import retrieval
from pipeline.retrieval import FusedRetrieval, Retrieval
from tests.benchmarks import results
from tests.benchmarks.kernel_rows import Row, host_ms, named, row

USERS, ITEMS = (1, 4, 16, 64, 256), (30_000, 100_000, 300_000, 1_000_000)
WIDTH, K, EXCLUDED, ROUNDS = 256, 20, 100, 60


def unit_rows(rows: int) -> Tensor:
    return F.normalize(torch.randn(rows, WIDTH, device="cuda"), dim=1)


def measure(table: Tensor, users: int) -> list[Row]:
    states, items = unit_rows(users), len(table)
    rows = np.repeat(np.arange(users), EXCLUDED)
    tokens = np.random.default_rng(users).integers(1, items, len(rows))
    found = []
    for name, each in (("torch", Retrieval(table)), ("operator", FusedRetrieval(table))):
        ms = host_ms(lambda each=each: each.top_k(states, rows, tokens, K), ROUNDS)
        found.append(row(f"{users} users, {items:,} items", name, ms, users, None, None))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=results.FOLDER)
    args = parser.parse_args()
    torch.manual_seed(0)
    retrieval.FUSED_SCORES = 0  # the operator, whatever the size
    rows = [
        each for items in ITEMS for table in [unit_rows(items)] for users in USERS for each in measure(table, users)
    ]
    by_torch, by_operator = (
        {str(each["workload"]): float(str(each["median_ms"])) for each in rows if each["implementation"] == name}
        for name in ("torch", "operator")
    )
    most = f"{USERS[-1]} users, {ITEMS[-1]:,} items"
    metrics = {
        "fewest_scores_won_by_operator": min(
            users * items
            for users in USERS
            for items in ITEMS
            for work in [f"{users} users, {items:,} items"]
            if by_operator[work] < by_torch[work]
        ),
        "largest_speedup": round(by_torch[most] / by_operator[most], 2),
    }
    print(results.write(named("retrieval"), metrics, rows, args.out))


if __name__ == "__main__":
    main()
