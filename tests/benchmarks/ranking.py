"""Time of the `hstu` strategy for a batch on a GPU, from packed histories on the host to slates there, by stage.

An untrained model, 100,000 items, slates of 10; reranked: 100 candidates each. The host's times, one batch at a time.

usage: python -m tests.benchmarks.ranking [--out FOLDER]       writes ranking_h100.json, or _h200
"""

import statistics
import time

import numpy as np
import torch
from msgspec.structs import replace

from pipeline import artifact as artifacts
from pipeline.backends.encoder import GraphOptions
from pipeline.items.catalogue import Catalogue
from pipeline.items.vocabulary import Vocabulary
from pipeline.model.config import PRESETS
from pipeline.records import EventSchema, Histories
from pipeline.strategies.exclusion import Exclusion
from pipeline.strategies.hstu_strategy import HstuStrategy, load_hstu_strategy
from pipeline.strategies.rerank import RerankWeights
from pipeline.strategies.strategy import Request
from pipeline.strategies.warm_up import synthetic_histories
from pipeline.training.multi_task_model import MultiTaskModel
from tests.benchmarks import results
from tests.benchmarks.kernel_rows import arguments, card_name

ITEMS = 100_000
MAX_LENGTH = 200
K = 10
ROUNDS = 90
GRAPHS = GraphOptions(max_users=256, max_events=32_768, budget_mib=2048, slate_size=K)
RERANKS = {"plain": RerankWeights(), "reranked": RerankWeights(engagement=0.5, value=0.2)}
BATCHES = ((1, 30), (128, 30), (256, 30), (256, 200))  # users, and the median of their log-normal lengths
COUNTERS = {"items": np.zeros(0, np.uint64), "popularity": np.zeros(0), "values": np.zeros(0, np.float32)}
ITEM_IDS = [f"i{number}" for number in range(1, ITEMS)]


def make_artifact(preset: str) -> artifacts.Artifact:
    """Return the artifact of an untrained model."""
    torch.manual_seed(0)
    config = replace(PRESETS[preset], items=ITEMS, max_events=MAX_LENGTH, content_rows=0)
    return artifacts.draft(config, EventSchema(), MultiTaskModel(config).state_dict(), ITEM_IDS, COUNTERS)


def make_histories(users: int, median: int) -> Histories:
    lengths = np.random.default_rng(1).lognormal(np.log(median), 0.8, users)
    return synthetic_histories(ITEM_IDS, np.clip(lengths, 1, 2 * MAX_LENGTH).astype(int).tolist())


def measure(strategy: HstuStrategy, histories: Histories) -> dict[str, results.Cell]:
    """Return the medians of the three steps and of their sum, in ms, over all rounds but the first third."""
    rounds = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        marks_s = [time.perf_counter()]
        prepared = strategy.prepare(Request(histories, K))
        marks_s.append(time.perf_counter())
        pending = strategy.launch(prepared)
        marks_s.append(time.perf_counter())
        strategy.finish(pending)
        marks_s.append(time.perf_counter())
        rounds.append([*np.diff(marks_s).tolist(), marks_s[-1] - marks_s[0]])
    medians = [round(1e3 * statistics.median(column), 3) for column in zip(*rounds[ROUNDS // 3 :], strict=True)]
    return dict(zip(("prepare_ms", "launch_ms", "finish_ms", "total_ms"), medians, strict=True))


def main() -> None:
    args = arguments(__doc__)
    rows: list[dict[str, results.Cell]] = []
    for preset in ("tiny", "10m"):
        artifact = make_artifact(preset)
        for name, rerank in RERANKS.items():
            catalogue = Catalogue(Vocabulary(ITEM_IDS))
            strategy = load_hstu_strategy(artifact, catalogue, Exclusion(), "cuda", rerank=rerank, graphs=GRAPHS)
            strategy.warm(ITEM_IDS, GRAPHS)
            for users, median in BATCHES:
                histories = make_histories(users, median)
                workload = {"model": preset, "slates": name, "users": users, "events": len(histories.events)}
                rows.append(workload | measure(strategy, histories))
                print(rows[-1], flush=True)
            strategy.close()
    metrics = {
        f"{row['model']}_{row['slates']}_{row['users']}x{row['events']}_ms": float(row["total_ms"] or 0) for row in rows
    }
    print(results.write(card_name("ranking"), metrics, rows, args.out))


if __name__ == "__main__":
    main()
