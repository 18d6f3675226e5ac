"""What the best items of a batch of states cost a rung on a GPU, from states on the device to arrays on the host: by
torch, in float32, and by the operator. Times are the host's; width 256, 20 items, 100 excluded a user.

    python -m tests.benchmarks.retrieval       writes results/retrieval_h100.json, or _h200
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.serving import retrieval
from pipeline.serving.retrieval import FusedRetrieval, Retrieval
from tests.benchmarks import results
from tests.benchmarks.kernel_rows import Row, arguments, host_ms, named, ratio, row

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
    args = arguments(__doc__)
    torch.manual_seed(0)
    retrieval.FUSED_MIN_SCORES = 0  # the operator, whatever the size
    rows, won, speedup = [], [], 0.0
    for items in ITEMS:
        table = unit_rows(items)
        for users in USERS:
            pair = measure(table, users)
            rows += pair
            speedup = ratio(*pair)  # in the end of the largest
            if speedup > 1:
                won.append(users * items)
    metrics = {"fewest_scores_won_by_operator": min(won), "largest_speedup": round(speedup, 2)}
    print(results.write(named("retrieval"), metrics, rows, args.out))


if __name__ == "__main__":
    main()
