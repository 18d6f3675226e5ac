"""Draw the pictures in docs/img from the result files, and from nothing else.

usage: python -m tests.benchmarks.plots
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from pipeline.features.labels import TASKS
from tests.benchmarks import results, roofline
from tests.benchmarks.results import Result

IMAGES = results.ROOT / "docs" / "img"
BLUE = "#2a6f97"
GREY = "#a9b4c2"
ORANGE = "#e09f3e"


def stream(result: Result) -> Path:
    """Draw the rates next to the plain loop's, and the worker's memory over its long run."""
    figure, (rates, memory) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    runs = [row for row in result.rows if "slates_per_s" in row]
    bars = rates.barh(
        [str(row["run"]) for row in runs],
        [float(row["slates_per_s"] or 0) for row in runs],
        color=[GREY if str(row["run"]).startswith("plain") else BLUE for row in runs],
    )
    rates.bar_label(bars, fmt="{:,.0f}", padding=3)
    rates.margins(x=0.15)
    rates.invert_yaxis()
    rates.set(title="slates/s, two cores with broker and Valkey")
    samples = [row for row in result.rows if row["run"] == "memory"]
    memory.plot([row["slates"] for row in samples], [row["rss_mib"] for row in samples], color=BLUE)
    memory.set(title="resident memory of the worker, MiB", xlabel="slates", ylim=(0, None))
    return _save(figure, result)


def replay(result: Result) -> Path:
    """Draw each ranking's hit rate at 10, the real log next to the simulated one."""
    figure, axes = plt.subplots(1, len(result.rows), figsize=(10, 3.2), layout="constrained", squeeze=False)
    for axis, row in zip(axes[0], result.rows, strict=True):
        _hit_rates(axis, row)
    return _save(figure, result)


def _hit_rates(axis: Axes, row: dict[str, results.Cell]) -> None:
    rates = {key.removeprefix("hit_rate_"): value for key, value in row.items() if key.startswith("hit_rate_")}
    ordered = sorted(rates, key=lambda name: float(rates[name] or 0))
    bars = axis.barh(ordered, [float(rates[name] or 0) for name in ordered], color=BLUE)
    axis.bar_label(bars, fmt="{:.3f}", padding=3)
    axis.margins(x=0.15)
    axis.set(title=f"hit rate@10, {row['log']}")


def closed_loop(result: Result) -> Path:
    """Draw the money per event by reranking, when users react to the slates."""
    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    rows = [row for row in result.rows if row["weighting"] in ("nothing shown", "fixed 1 1 1")]
    names = [str(row["rerank"]) if row["rerank"] != "off" else str(row["weighting"]) for row in rows]
    money = [float(row["money_per_event"] or 0) for row in rows]
    axis.barh(names, money, xerr=[float(row["money_per_event_se"] or 0) for row in rows], color=BLUE)
    axis.invert_yaxis()
    axis.set(title="closed loop: money per event, by reranking")
    return _save(figure, result)


def heads(result: Result) -> Path:
    """Draw the gap between the heads' AUC and the truth's, by weighting."""
    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    names = [str(row["weighting"]) for row in result.rows]
    for task, color in zip(TASKS, (BLUE, GREY, ORANGE), strict=True):
        axis.plot(names, [float(row[f"{task}_gap"] or 0) for row in result.rows], "o", color=color, label=task)
    axis.tick_params(axis="x", rotation=30)
    axis.legend()
    axis.set(title="AUC below the truth's", ylim=(0, None))
    return _save(figure, result)


def rooflines(result: Result) -> Path:
    """Draw what the kernels reach of their card, one panel per operator with counted operations in the file."""
    panels = roofline.PANELS[result.name.rpartition("_")[0]]
    drawn = [(panel, points) for panel in panels if (points := roofline.points(result, panel))]
    figure, axes = plt.subplots(1, len(drawn), figsize=(5.4 * len(drawn), 3.8), layout="constrained", squeeze=False)
    engine = figure.get_layout_engine()
    if isinstance(engine, ConstrainedLayoutEngine):
        engine.set(rect=(0, 0.04, 1, 0.96))  # leaves room for the last line
    for axis, (panel, points) in zip(axes[0], drawn, strict=True):
        roofline.draw(axis, panel, points, roofline.find_peak(result))
    return _save(figure, result)


def _save(figure: Figure, result: Result) -> Path:
    figure.text(0.995, 0.005, f"{result.hardware} · {result.commit}", ha="right", fontsize=6, color="#666")
    IMAGES.mkdir(parents=True, exist_ok=True)
    path = IMAGES / f"{result.name}.png"
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
    return path


PICTURES: dict[str, Callable[[Result], Path]] = {draw.__name__: draw for draw in (stream, replay, heads, closed_loop)}
PICTURES |= {f"{name}_{card}": rooflines for name in roofline.PANELS for card in ("h100", "h200")}


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for name, draw in PICTURES.items():
        path = results.FOLDER / f"{name}.json"
        if path.exists():
            print(draw(results.load(path)))
        elif draw is not rooflines:  # not every card has been measured
            print(f"{path} does not exist; run its benchmark first")


if __name__ == "__main__":
    main()
