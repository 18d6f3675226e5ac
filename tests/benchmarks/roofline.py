"""Rooflines from the kernels' result files: what was reached, and what the card's memory and units allow.

A point is a row of the results: operations per second over operations per byte, both as the benchmark counted them
(those that are needed, whatever the implementation does). Rows without counted operations have no point. A panel lists
the rows that it shows.
"""

from dataclasses import dataclass

from matplotlib.axes import Axes

from tests.benchmarks.kernel_rows import PEAKS, Peak
from tests.benchmarks.results import Cell, Result

OURS = "#2a6f97"
OTHERS = "#8d99a6"
ROOF = "#444444"


@dataclass(frozen=True, slots=True)
class Panel:
    """An operator's rows: those whose workload contains `workloads` and whose implementation is listed."""

    title: str
    workloads: str
    implementations: tuple[str, ...]
    matrix_units: bool = True


@dataclass(frozen=True, slots=True)
class Point:
    """A measured row. intensity: operations per byte of memory traffic."""

    workload: str
    implementation: str
    intensity: float
    tflops: float

    @property
    def ours(self) -> bool:
        return not self.implementation.startswith(("torch", "cuBLAS"))


PANELS = {
    "kernels": (
        Panel(
            "fused_attention_layernorm",
            "users",
            ("kernels: attention alone", "torch: compiled, padded", "kernels: graph", "cuBLAS: products alone"),
        ),
    ),
    "kernels_retrieval": (
        Panel(
            "sequence_recommendation_interaction",
            "users",
            ("fused", "fused, int8 table", "torch: product", "torch: product, topk", "torch: gather, product"),
        ),
        Panel("hierarchical_sequence_fusion", "events", ("fused", "torch: unfused, no graph"), matrix_units=False),
    ),
}


def points(result: Result, panel: Panel) -> list[Point]:
    """Return the points of the panel's rows."""
    found = []
    for row in result.rows:
        workload = str(row["workload"])
        implementation = str(row["implementation"])
        is_other = "events" in workload and panel.workloads != "events"  # workloads of events name users too
        if panel.workloads not in workload or is_other or implementation not in panel.implementations:
            continue
        tflops = _number(row["tflops"])
        gb_per_s = _number(row["gb_per_s"])
        if tflops and gb_per_s:
            found.append(Point(workload, implementation, 1e3 * tflops / gb_per_s, tflops))
    return found


def find_peak(result: Result) -> Peak:
    """Return the peaks of the result's card. ValueError when PEAKS has no datasheet of it."""
    for name, peak in PEAKS.items():
        if name in result.hardware:
            return peak
    raise ValueError(f"{result.name}: no datasheet of '{result.hardware}', want one of {', '.join(PEAKS)}")


def draw(axis: Axes, panel: Panel, measured: list[Point], peak: Peak) -> None:
    """Draw the roof and one kind of marker per implementation, filled for this project's."""
    limit = peak.matrix_tflops if panel.matrix_units else peak.float32_tflops
    ridge = 1e3 * limit / peak.gb_per_s
    low = min(point.intensity for point in measured) / 3
    high = max(ridge, *(point.intensity for point in measured)) * 4
    axis.loglog([low, ridge, high], [low * peak.gb_per_s / 1e3, limit, limit], color=ROOF, lw=1.2)
    units = "matrix units" if panel.matrix_units else "float32 units"
    axis.text(high, limit * 1.2, f"{limit:,.0f} TFLOP/s, {units}", ha="right", fontsize=7, color=ROOF)
    axis.text(low * 1.1, low * peak.gb_per_s / 1e3 * 3, f"{peak.gb_per_s / 1e3:.2f} TB/s", fontsize=7, color=ROOF)
    for implementation, marker in zip(panel.implementations, "osD^v", strict=False):
        own = [point for point in measured if point.implementation == implementation]
        if own:
            color = OURS if own[0].ours else OTHERS
            x = [point.intensity for point in own]
            y = [point.tflops for point in own]
            axis.plot(x, y, marker, color=color, mfc=color if own[0].ours else "white", ms=6, label=implementation)
    axis.set(xlabel="operations per byte", ylabel="TFLOP/s", ylim=(None, limit * 3))
    axis.set_title(panel.title, fontsize=9)
    axis.grid(True, which="major", color="#e3e7eb", lw=0.6)
    axis.set_axisbelow(True)
    axis.legend(fontsize=7, loc="lower right", frameon=False)


def _number(cell: Cell) -> float:
    return float(cell or 0)
