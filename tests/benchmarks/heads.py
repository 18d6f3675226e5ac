"""The heads against a simulated shop's truth, and what slates do to users who react to them.

weightings  AUC of each head against that of the true probabilities, on the last 20 % of a simulated log; the expected
            calibration error as trained and as calibrated; for learnt weightings of the heads' losses (the first is
            the default's) and a grid of fixed ones; the best learnt one's mean AUC over the best fixed one's, with the
            95 % interval of a bootstrap over users
loop        the shop goes on from the log's end with slates of these models, reranked by each of some weights; what
            its users then do and pay. Means over forks of the future, the same ones for every row, and their standard
            errors

The first part's result is heads.json, the second's closed_loop.json.

The default shop is denser than `millrace simulate`'s: 86 events a user and 200 an item. The truth knows each item's
hidden quality exactly, and an item's first hundred outcomes tell it only roughly.

usage: python -m tests.benchmarks.heads [--parts weightings loop] [--epochs 12] [--forks 4] [--events N --users N
           --items N] [--device cuda] [--workers N] [--quick]
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import numpy as np
import torch
from msgspec.structs import asdict, replace
from rich.console import Console

from pipeline import artifact as artifacts
from pipeline.artifact import Artifact
from pipeline.data.sequences import UserSequences
from pipeline.data.split import Split
from pipeline.evaluation.head_predictions import predict_heads
from pipeline.evaluation.metrics import head_metrics
from pipeline.evaluation.ranking import HeldOutEvents, evaluate_ranking
from pipeline.features.labels import TASKS, compute_labels
from pipeline.items.catalogue import Catalogue
from pipeline.items.vocabulary import Vocabulary
from pipeline.model.calibration import IDENTITY
from pipeline.model.config import HstuConfig
from pipeline.records import EventSchema
from pipeline.serving.hstu_strategy import HstuStrategy
from pipeline.serving.pipeline import PipelineOptions
from pipeline.serving.rerank import RerankWeights
from pipeline.simulation.closed_loop import TRUTHS, ClosedLoopMetrics, PolicyUnderTest, run, warm_up
from pipeline.simulation.simulator import Simulator
from pipeline.simulation.world import SimulatorConfig
from pipeline.training.preparation import TrainingOptions
from pipeline.training.train import EpochReport, train
from pipeline.training.trainer import TrainerOptions
from tests.benchmarks import results
from tests.benchmarks.head_aucs import mean_auc_gain
from tests.benchmarks.results import Cell
from tests.benchmarks.workers import pool

SHOP = SimulatorConfig(events=60_000, users=700, items=300)
QUICK = SimulatorConfig(events=4_000, users=200, items=60, days=40)
LOOP_DAYS = 14
RESULTS = {"weightings": "heads", "loop": "closed_loop"}  # by part
ODDS = "odds.npy"  # of the scored events, beside the model
HITS_OF = 3000  # scored events whose hit rate is measured: the price that the retrieval pays for the heads
WEIGHTINGS: dict[str, TrainerOptions] = {
    "fixed 1 1 1": TrainerOptions(),
    "uncertainty": TrainerOptions(weighting="uncertainty"),
    "dwa": TrainerOptions(weighting="dwa"),
    "fixed 0.3 0.3 0.3": TrainerOptions(head_weights=(0.3, 0.3, 0.3)),
    "fixed 2 0.5 0.5": TrainerOptions(head_weights=(2.0, 0.5, 0.5)),
    "fixed 0.5 2 0.5": TrainerOptions(head_weights=(0.5, 2.0, 0.5)),
    "fixed 0.5 0.5 2": TrainerOptions(head_weights=(0.5, 0.5, 2.0)),
}
DYNAMIC = ("uncertainty", "dwa")
DEFAULT, NOTHING = "fixed 1 1 1", "nothing shown"
RERANKS: dict[str, RerankWeights] = {
    "off": RerankWeights(),
    "engagement": RerankWeights(engagement=1.0),
    "retention": RerankWeights(retention=1.0),
    "monetization": RerankWeights(monetization=1.0),
    "money": RerankWeights(monetization=1.0, value=1.0),
    "all": RerankWeights(engagement=0.5, retention=0.5, monetization=0.5, value=0.5),
}
# Nothing shown; the default model by every rerank; the learnt weightings as they rank and by money.
LOOPS = [(NOTHING, "off"), *((DEFAULT, name) for name in RERANKS), *product(DYNAMIC, ("off", "money"))]


class Silent:
    """An observer of trainings."""

    def phase(self, name: str, epochs: int) -> None: ...

    def batch(self, epoch: int, loss: float, done: int, total: int) -> None: ...

    def epoch(self, report: EpochReport, best: EpochReport) -> None: ...


class Setting(msgspec.Struct, frozen=True):
    """What all processes share. folder: where the trained models are."""

    shop: SimulatorConfig
    epochs: int
    device: str
    folder: Path


@dataclass
class Bench:
    """One shop, its past, and the models that its past has trained."""

    setting: Setting

    def __post_init__(self) -> None:
        self.pipeline, self.days = PipelineOptions(device=self.setting.device), self.setting.shop.days
        self.simulator = Simulator(self.setting.shop)
        self.log, self.truth = warm_up(self.simulator, self.days)
        self.vocabulary = Vocabulary(self.log.item_ids)
        self.catalogue = Catalogue(self.vocabulary)
        self.catalogue.upsert(self.simulator.items())

    def path(self, weighting: str) -> Path:
        return self.setting.folder / weighting.replace(" ", "_")

    def train(self, weighting: str) -> None:
        trainer = replace(WEIGHTINGS[weighting], epochs=self.setting.epochs)
        options = TrainingOptions(trainer, HstuConfig(), patience=self.setting.epochs, refit=False)
        train(self.log, self.path(weighting), options, self.pipeline, Silent(), "", items=self.simulator.items())

    def model(self, weighting: str) -> Artifact:
        return artifacts.load(self.path(weighting))

    def rung(self, artifact: Artifact, rerank: RerankWeights = RERANKS["off"]) -> HstuStrategy:
        options = self.pipeline
        return HstuStrategy(artifact, self.catalogue, options.exclusion, options.device, options.threads, rerank)

    @cached_property
    def scored(self) -> HeldOutEvents:
        """The last 20 %, but for users' first events."""
        corpus = UserSequences.from_log(self.log, self.vocabulary)
        left_out = Split().test_mask(self.log)[corpus.log_positions]
        return HeldOutEvents(corpus, np.flatnonzero(left_out & (corpus.starts < np.arange(len(corpus)))), 512)

    @cached_property
    def labels(self) -> np.ndarray:  # float32 [n, 3], of the scored events
        histories = self.scored.sequences.histories
        return compute_labels(histories, EventSchema(), int(histories.ts_ms.max()))[self.scored.positions - 1]


@cache
def bench_of(setting: Setting) -> Bench:
    """Once a process."""
    return Bench(setting)


def train_model(setting: Setting, weighting: str) -> None:
    bench_of(setting).train(weighting)


def weighting_row(setting: Setting, weighting: str) -> dict[str, Cell]:
    bench = bench_of(setting)
    scored, artifact = bench.scored, bench.model(weighting)
    truth = np.stack([bench.truth[name] for name in TRUTHS], axis=1)[scored.sequences.log_positions[scored.positions]]
    some = np.sort(np.random.default_rng(0).permutation(scored.positions)[:HITS_OF])
    rung = bench.rung(artifact)
    odds, raw = predict_heads(rung, scored), predict_heads(bench.rung(uncalibrated(artifact)), scored)
    hit_rate = evaluate_ranking(rung, HeldOutEvents(scored.sequences, some, scored.max_events), 10).hit_rate
    np.save(bench.path(weighting) / ODDS, odds)
    row: dict[str, Cell] = {"part": "weightings", "weighting": weighting, "hit_rate": hit_rate}
    for task, head in enumerate(TASKS):
        row |= head_row(head, odds[:, task], raw[:, task], truth[:, task], bench.labels[:, task])
    return row | {"auc": float(np.mean([float(row[f"{head}_auc"] or 0) for head in TASKS]))}


def head_row(head: str, odds: np.ndarray, raw: np.ndarray, truth: np.ndarray, labels: np.ndarray) -> dict[str, Cell]:
    calibrated, plain, best = (head_metrics(each, labels) for each in (odds, raw, truth))
    assert calibrated.auc is not None, f"the shop is too small: {head} has labels of one kind"
    assert best.auc is not None
    return {
        f"{head}_auc": calibrated.auc, f"{head}_truth": best.auc, f"{head}_gap": best.auc - calibrated.auc,
        f"{head}_ece_raw": plain.ece, f"{head}_ece": calibrated.ece,
    }  # fmt: skip


def best_of(rows: list[dict[str, Cell]], learnt: bool) -> str:
    """The learnt or the fixed weighting with the highest mean AUC."""
    some = [row for row in rows if (row["weighting"] in DYNAMIC) == learnt]
    return str(max(some, key=lambda row: float(row["auc"] or 0))["weighting"])


def learnt_over_fixed(setting: Setting, rows: list[dict[str, Cell]]) -> dict[str, float]:
    """How far the best learnt weighting's mean AUC over the heads is above the best fixed one's."""
    bench = bench_of(setting)
    ours, theirs = (np.load(bench.path(best_of(rows, learnt)) / ODDS) for learnt in (True, False))
    names = ("learnt_over_fixed", "learnt_over_fixed_ci_low", "learnt_over_fixed_ci_high")
    return dict(zip(names, mean_auc_gain(ours, theirs, bench.labels, bench.scored.users), strict=True))


def uncalibrated(artifact: Artifact) -> Artifact:
    weights = artifact.weights | {"heads.calibration": torch.tensor([IDENTITY] * len(TASKS))}
    return Artifact(artifact.manifest, weights, artifact.item_ids, artifact.counters, artifact.metadata)


def loop_row(setting: Setting, weighting: str, rerank: str, forks: int) -> dict[str, Cell]:
    bench, reactions = bench_of(setting), []
    rung = bench.rung(bench.model(weighting), RERANKS[rerank]) if weighting != NOTHING else None
    for seed in range(forks):
        future = bench.simulator.fork(seed)
        showcase = PolicyUnderTest(future, rung, bench.vocabulary, bench.log) if rung else None
        reactions.append(run(future, bench.days, LOOP_DAYS, showcase))
    row: dict[str, Cell] = {"part": "loop", "weighting": weighting, "rerank": rerank}
    return row | _summary(reactions)


def _summary(reactions: list[ClosedLoopMetrics]) -> dict[str, Cell]:
    """Means and standard errors over forks."""
    columns = {name: [float(asdict(each)[name]) for each in reactions] for name in ClosedLoopMetrics.__struct_fields__}
    columns["money_per_event"] = [each.money / each.events for each in reactions]
    row: dict[str, Cell] = {}
    for name, column in columns.items():
        row[name] = float(np.mean(column))
        row[f"{name}_se"] = float(np.std(column, ddof=1) / np.sqrt(len(column))) if len(column) > 1 else None
    return row


def measured(setting: Setting, parts: list[str], forks: int, workers: int) -> Iterator[dict[str, Cell]]:
    """Train what the parts need, then their rows."""
    jobs: list[tuple] = [(weighting_row, setting, name) for name in WEIGHTINGS] if "weightings" in parts else []
    if "loop" in parts:
        jobs += [(loop_row, setting, weighting, rerank, forks) for weighting, rerank in LOOPS]
    trained = {weighting for _, _, weighting, *_ in jobs if weighting != NOTHING}
    with pool(workers) as processes:
        for training in [processes.submit(train_model, setting, name) for name in WEIGHTINGS if name in trained]:
            training.result()
        for row in [processes.submit(*job) for job in jobs]:
            yield row.result()


def metrics_of_weightings(rows: list[dict[str, Cell]]) -> dict[str, float]:
    """What the docs quote."""
    by_weighting = {str(row["weighting"]): row for row in rows}
    default = by_weighting[DEFAULT]
    metrics = {
        f"{head}_{name}": float(default[f"{head}_{name}"] or 0) for head in TASKS for name in ("auc", "gap", "ece")
    }
    for name, learnt in (("auc_best_fixed", False), ("auc_best_dynamic", True)):
        metrics[name] = float(by_weighting[best_of(rows, learnt)]["auc"] or 0)
    return metrics


def metrics_of_loop(rows: list[dict[str, Cell]]) -> dict[str, float]:
    """What the docs quote."""
    by_rerank = {str(row["rerank"]): row for row in rows if row["weighting"] == DEFAULT}
    plain = by_rerank["off"]
    money, engaged = by_rerank["money"]["money_per_event"], by_rerank["engagement"]["engaged_share"]
    return {
        "money_gain_by_rerank": float(money or 0) / float(plain["money_per_event"] or 1) - 1,
        "engagement_gain_by_rerank": float(engaged or 0) / float(plain["engaged_share"] or 1) - 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(RESULTS), default=list(RESULTS))
    parser.add_argument("--epochs", type=int, default=12, help="of every training")
    parser.add_argument("--forks", type=int, default=4, help="futures of the shop for a row of the loop")
    parser.add_argument("--events", type=int, default=SHOP.events, help="of the shop")
    parser.add_argument("--users", type=int, default=SHOP.users)
    parser.add_argument("--items", type=int, default=SHOP.items)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes side by side")
    parser.add_argument("--quick", action="store_true", help="a small shop: does it run? its figures mean nothing")
    parser.add_argument("--out", type=Path, default=results.FOLDER, help="folder of the results")
    args = parser.parse_args()
    shop = QUICK if args.quick else SimulatorConfig(args.events, args.users, args.items)
    with TemporaryDirectory(prefix="millrace-heads-") as folder:
        setting, rows = Setting(shop, args.epochs, args.device, Path(folder)), {part: [] for part in args.parts}
        for row in measured(setting, args.parts, args.forks, args.workers):
            Console().print(row)
            rows[str(row["part"])].append(row)
        metrics_by_part: dict[str, dict[str, float]] = {}
        if of_weightings := rows.get("weightings"):
            compared = learnt_over_fixed(setting, of_weightings)
            metrics_by_part["weightings"] = metrics_of_weightings(of_weightings) | compared
        if of_loop := rows.get("loop"):
            metrics_by_part["loop"] = metrics_of_loop(of_loop)
    for part, metrics in metrics_by_part.items():
        Console().print(metrics, f"written: {results.write(RESULTS[part], metrics, rows[part], args.out)}")


if __name__ == "__main__":
    main()
