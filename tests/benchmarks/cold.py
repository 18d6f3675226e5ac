"""Cold items: how often a model finds an item that it has few events of, compared with content-kNN.

In a simulated shop where new items arrive, the model is trained on the first 80 % of the events and the item records.
Of the last 20 %, those are scored whose item has fewer than 5 events before the split, each ranked among all items:
recall@50. The content-kNN's options are the best of a grid on these very events, which favours it.

Rows are files in the folder --work as soon as they are there: the same command continues where an earlier one was
stopped, or ran out of --minutes. It runs where there is only torch, numpy, msgspec and safetensors.

usage: python -m tests.benchmarks.cold [--events 200000] [--epochs 16] [--seeds 3] [--device cuda]
           [--workers 4] [--work DIR] [--minutes N] [--out DIR]
"""

import argparse
from functools import cache
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import numpy as np

from pipeline import artifact as artifacts
from pipeline.data.split import Split
from pipeline.evaluation.evaluate import COLD, TrainTest
from pipeline.evaluation.full_ranking import FullRanking
from pipeline.evaluation.item_knn import ItemKnn, ItemKnnOptions
from pipeline.evaluation.metrics import target_ranks
from pipeline.evaluation.ranking import HeldOutEvents, Recommender, StrategyRecommender, recommend_slates
from pipeline.items.catalogue import Catalogue
from pipeline.items.vocabulary import Vocabulary
from pipeline.model.config import HstuConfig
from pipeline.simulation.closed_loop import warm_up
from pipeline.simulation.simulator import Simulator
from pipeline.simulation.world import SimulatorConfig
from pipeline.strategies.hstu_strategy import load_hstu_strategy
from pipeline.strategies.options import PipelineOptions
from pipeline.training.preparation import TrainingOptions
from pipeline.training.train import train
from pipeline.training.trainer import TrainerOptions
from tests.benchmarks import results
from tests.benchmarks.results import Cell
from tests.benchmarks.workers import Job, read_rows, run_saved
from tests.pipeline.training.callbacks import SilentCallback

RECALL = 50
MAX_EVENTS = 512
MODEL = HstuConfig(width=256, heads=8, dropout=0.3, attention_dropout=0.7, temperature=0.07)
GRID = [
    ItemKnnOptions(neighbours, 0.0, recency)
    for neighbours, recency in product((50, 100, 200, 400, 800), (0.5, 0.7, 0.8, 0.9, 1.0))
]


class Setting(msgspec.Struct, frozen=True):
    """Options shared by all processes."""

    shop: SimulatorConfig
    epochs: int
    device: str


class Bench:
    """One shop, and its scored events of cold items."""

    def __init__(self, setting: Setting) -> None:
        simulator = Simulator(setting.shop)
        self.pipeline = PipelineOptions(device=setting.device)
        self.items = simulator.items()
        self.log, _ = warm_up(simulator, setting.shop.days)
        self.vocabulary = Vocabulary(self.log.item_ids)
        self.split = TrainTest.from_log(self.log, Split().test_mask(self.log), self.vocabulary, MAX_EVENTS)
        self.catalogue = Catalogue(self.vocabulary)
        self.catalogue.upsert(self.items)
        test = self.split.test
        is_cold = self.split.counts[test.targets] < COLD
        self.cold = HeldOutEvents(test.sequences, test.positions[is_cold], test.max_events)
        assert len(self.cold), "the shop is too small: no scored item is cold"

    def recall(self, ranker: Recommender) -> float:
        ranks = target_ranks(recommend_slates(ranker, self.cold, RECALL), self.cold.targets)
        return float(np.mean(ranks > 0))


@cache
def get_bench(setting: Setting) -> Bench:
    """Build the shop once per process."""
    return Bench(setting)


def content_knn(setting: Setting, options: ItemKnnOptions) -> dict[str, Cell]:
    bench = get_bench(setting)
    scorer = ItemKnn.from_content(bench.catalogue, bench.split.train, options)
    ranker = FullRanking(scorer, bench.vocabulary, bench.pipeline.exclusion)
    return {
        "model": scorer.name,
        "neighbours": options.neighbours,
        "recency": options.recency,
        "recall50": bench.recall(ranker),
        "events": len(bench.cold),
    }


def hstu(setting: Setting, seed: int) -> dict[str, Cell]:
    bench = get_bench(setting)
    options = TrainingOptions(TrainerOptions(epochs=setting.epochs, seed=seed), MODEL)
    with TemporaryDirectory(prefix="millrace-cold-") as folder:
        train(bench.log, Path(folder) / "artifact", options, bench.pipeline, SilentCallback(), "", items=bench.items)
        artifact = artifacts.load(Path(folder) / "artifact")
    strategy = load_hstu_strategy(artifact, bench.catalogue, bench.pipeline.exclusion, setting.device)
    recall = bench.recall(StrategyRecommender(strategy))
    return {"model": "hstu", "seed": seed, "recall50": recall, "events": len(bench.cold)}


def row_jobs(setting: Setting, seeds: int, folder: Path) -> dict[Path, Job]:
    """Return the jobs that measure the rows, by their files."""
    jobs: dict[Path, Job] = {folder / f"hstu-{seed}.json": (hstu, setting, seed) for seed in range(seeds)}
    return jobs | {
        folder / f"contentknn-{options.neighbours}-{options.recency}.json": (content_knn, setting, options)
        for options in GRID
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=200_000, help="events of the shop (default 200000)")
    parser.add_argument("--epochs", type=int, default=16, help="largest number of epochs per training (default 16)")
    parser.add_argument("--seeds", type=int, default=3, help="number of trained models (default 3)")
    parser.add_argument("--device", default="auto", help="device of the models (default auto)")
    parser.add_argument("--workers", type=int, default=1, help="number of parallel processes (default 1)")
    parser.add_argument("--work", type=Path, help="folder of the rows (default: a temporary one)")
    parser.add_argument("--minutes", type=float, help="start no training and no row after this many minutes")
    parser.add_argument("--out", type=Path, default=results.FOLDER, help="folder of cold.json")
    args = parser.parse_args()
    shop = SimulatorConfig(args.events, args.events // 40, args.events // 100)
    setting = Setting(shop, args.epochs, args.device)
    with TemporaryDirectory(prefix="millrace-cold-rows-") as temporary:
        jobs = row_jobs(setting, args.seeds, args.work or Path(temporary))
        if missing := run_saved(jobs, args.workers, args.minutes):
            raise SystemExit(f"{missing} jobs are left: the same command with the same --work continues")
        rows = list(read_rows(jobs))
    knn_recall = max(float(row["recall50"] or 0) for row in rows if row["model"] == "contentknn")
    hstu_recall = float(np.mean([float(row["recall50"] or 0) for row in rows if row["model"] == "hstu"]))
    metrics = {
        "recall50_hstu": hstu_recall,
        "recall50_contentknn": knn_recall,
        "ratio": hstu_recall / knn_recall,
    }
    print(metrics, f"written: {results.write('cold', metrics, rows, args.out)}", sep="\n")


if __name__ == "__main__":
    main()
