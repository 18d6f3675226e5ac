"""Time of a strategy's retrieval on a GPU, from states on the device to arrays on the host: torch and the operator.

torch computes in float32. Times are the host's; width 256, 20 items, 100 excluded items per user.

usage: python -m tests.benchmarks.retrieval [--out FOLDER]       writes retrieval_h100.json, or _h200
"""

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.backends.staging import HostCopy, Staging
from pipeline.strategies import retrieval
from pipeline.strategies.retrieval import ExcludedItems, FusedRetrieval, Retrieval
from tests.benchmarks import results
from tests.benchmarks.kernel_rows import Row, arguments, card_name, host_ms, ratio, row

USERS = (1, 4, 16, 64, 256)
ITEMS = (30_000, 100_000, 300_000, 1_000_000)
WIDTH = 256
K = 20
EXCLUDED = 100  # per user
ROUNDS = 60


def unit_rows(rows: int) -> Tensor:
    return F.normalize(torch.randn(rows, WIDTH, device="cuda"), dim=1)


def measure(table: Tensor, users: int) -> list[Row]:
    """Return the rows of torch and of the operator."""
    states = unit_rows(users)
    items = len(table)
    stage = Staging(table.device)
    excluded_users = np.repeat(np.arange(users), EXCLUDED)
    excluded_rows = np.random.default_rng(users).integers(1, items, len(excluded_users))

    def top_k(each: Retrieval | FusedRetrieval) -> list[np.ndarray]:
        """Return the result on the host, of excluded items that are in the host's memory."""
        on_device = stage(excluded_users, excluded_rows)
        excluded = ExcludedItems(EXCLUDED * np.arange(users + 1), *on_device)
        rows, scores = each.top_k(states, excluded, K)
        return HostCopy(rows.int(), scores).wait()

    measured = []
    for name, each in (("torch", Retrieval(table)), ("operator", FusedRetrieval(table))):
        ms = host_ms(partial(top_k, each), ROUNDS)
        measured.append(row(f"{users} users, {items:,} items", name, ms, users, None, None))
    return measured


def main() -> None:
    args = arguments(__doc__)
    torch.manual_seed(0)
    retrieval.FUSED_MIN_SCORES = 0  # the operator, whatever the size
    rows: list[Row] = []
    scores_won: list[int] = []
    speedup = 0.0
    for items in ITEMS:
        table = unit_rows(items)
        for users in USERS:
            pair = measure(table, users)
            rows += pair
            speedup = ratio(*pair)  # at the end that of the largest size
            if speedup > 1:
                scores_won.append(users * items)
    metrics = {"fewest_scores_won_by_operator": min(scores_won), "largest_speedup": round(speedup, 2)}
    print(results.write(card_name("retrieval"), metrics, rows, args.out))


if __name__ == "__main__":
    main()
