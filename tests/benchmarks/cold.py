"""Cold items: how often a model finds an item that it has hardly met, against neighbours by content.

A simulated shop where new items arrive; the model is trained on the first 80 % with the items' records. Scored are
those of the last 20 % of the events whose item has fewer than 5 events before the cut, each ranked among all items:
recall@50. The content-kNN's options are the best of a grid on these very events, which favours it.

usage: python -m tests.benchmarks.cold [--events 200000] [--epochs 16] [--seeds 3] [--device cuda]
"""

import argparse
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from rich.console import Console

from pipeline import artifact as artifacts
from pipeline.catalogue import Catalogue
from pipeline.catalogue_ranker import CatalogueRanker
from pipeline.closed_loop import warm_up
from pipeline.cut import Cut
from pipeline.evaluation import COLD, Split
from pipeline.hstu_config import HstuConfig
from pipeline.hstu_rung import HstuRung
from pipeline.itemknn import ItemKnn, ItemKnnOptions
from pipeline.measures import ranks_of
from pipeline.ranking import Ranker, Scored, slates_of
from pipeline.simulator import Simulator
from pipeline.simulator_world import SimulatorConfig
from pipeline.task import TrainingOptions
from pipeline.trainer import TrainerOptions
from pipeline.training import train
from pipeline.unified import PipelineOptions
from pipeline.vocabulary import Vocabulary
from tests.benchmarks import results
from tests.benchmarks.heads import Silent
from tests.benchmarks.results import Cell

RECALL = 50
CAP_EVENTS = 512
MODEL = HstuConfig(width=256, heads=8, dropout=0.3, attention_dropout=0.7, temperature=0.07)
GRID = [
    ItemKnnOptions(neighbours, 0.0, recency)
    for neighbours, recency in product((50, 100, 200, 400, 800), (0.5, 0.7, 0.8, 0.9, 1.0))
]


class Bench:
    """One shop, and who ranks its cold items."""

    def __init__(self, config: SimulatorConfig, options: PipelineOptions) -> None:
        simulator = Simulator(config)
        self.options, self.items = options, simulator.items()
        self.log, _ = warm_up(simulator, config.days)
        self.vocabulary = Vocabulary(self.log.item_ids)
        self.split = Split.of(self.log, Cut().left_out(self.log), self.vocabulary, CAP_EVENTS)
        self.catalogue = Catalogue(self.vocabulary)
        self.catalogue.put(self.items)
        scored = self.split.scored
        self.cold = Scored(scored.corpus, scored.positions[self.split.counts[scored.wanted] < COLD], scored.cap_events)

    def recall(self, ranker: Ranker) -> float:
        ranks = ranks_of(slates_of(ranker, self.cold, RECALL), self.cold.wanted)
        return float(np.mean(ranks > 0))

    def content_knn(self) -> Iterator[dict[str, Cell]]:
        for options in GRID:
            scorer = ItemKnn.of_contents(self.catalogue, self.split.known, options)
            ranker = CatalogueRanker(scorer, self.vocabulary, self.options.exclusion)
            yield {
                "model": scorer.name, "neighbours": options.neighbours, "recency": options.recency,
                "recall50": self.recall(ranker), "events": len(self.cold),
            }  # fmt: skip

    def hstu(self, folder: Path, epochs: int, seeds: int) -> Iterator[dict[str, Cell]]:
        for seed in range(seeds):
            options = TrainingOptions(TrainerOptions(epochs=epochs, seed=seed), MODEL)
            train(self.log, folder / f"{seed}", options, self.options, Silent(), "", items=self.items)
            artifact = artifacts.load(folder / f"{seed}")
            rung = HstuRung(artifact, self.catalogue, self.options.exclusion, self.options.device)
            yield {"model": "hstu", "seed": seed, "recall50": self.recall(rung), "events": len(self.cold)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=200_000)
    parser.add_argument("--epochs", type=int, default=16, help="at most, of every training")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=results.FOLDER, help="folder of cold.json")
    args = parser.parse_args()
    config = SimulatorConfig(args.events, args.events // 40, args.events // 100)
    bench, rows = Bench(config, PipelineOptions(device=args.device)), []
    with TemporaryDirectory(prefix="millrace-cold-") as folder:
        for row in (*bench.content_knn(), *bench.hstu(Path(folder), args.epochs, args.seeds)):
            Console().print(row)
            rows.append(row)
    of_knn = max(row["recall50"] for row in rows if row["model"] == "contentknn")
    of_hstu = float(np.mean([row["recall50"] for row in rows if row["model"] == "hstu"]))
    metrics = {"recall50_hstu": of_hstu, "recall50_contentknn": of_knn, "ratio": of_hstu / of_knn}
    Console().print(metrics, f"written: {results.write('cold', metrics, rows, args.out)}")


if __name__ == "__main__":
    main()
