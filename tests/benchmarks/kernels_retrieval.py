"""Streaming top-k and hierarchical fusion against torch, in one run on one GPU.

Times are medians over replays of a CUDA graph. "no graph" rows are by device events, with the L2 cache flushed before
each call; they include the host's launches. Replays gather the same rows each time, so rows that fit into the L2 cache
(50 MB) are read faster than in service; here that is a part of the candidates' rows. gb_per_s counts the bytes that
must cross the device's memory: the table once, or each event's row, and what is written; the table of small features is
not counted. max_error is against float32 sums of the same rounded inputs.

usage: python -m tests.benchmarks.kernels_retrieval [--out FOLDER] [--tune]      (on a GPU)
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.testing import do_bench_cudagraph

from kernels.hierarchical_sequence_fusion.op import hierarchical_sequence_fusion
from kernels.sequence_recommendation_interaction import launch
from kernels.sequence_recommendation_interaction.op import candidate_interaction, sequence_recommendation_interaction
from kernels.sequence_recommendation_interaction.tiles import LARGE_BATCH_USERS, TileLimits, TopKTiles
from tests.benchmarks import results
from tests.benchmarks.kernel_rows import PEAKS, arguments, card_name, device_ms, ratio, row

USERS = 256
WIDTH = 256
K = 100
EVENTS = 4096  # per user
RECENT = 256
SESSIONS = 256
GAP_S = 1800
EVENTS_PER_SESSION = 16
FEATURE_SIZES = (5, 24, 24, 7, 10, 30, 17, 17)  # number of values in use: action, gap, hour, weekday, value, dwell...
Rows = list[dict[str, Any]]  # of results.Result


@dataclass(frozen=True, slots=True)
class Work:
    """A call's operations and bytes, which do not depend on the implementation."""

    name: str
    users: int
    flop: float
    nbytes: float

    def measured(
        self, implementation: str, call: Callable[[], object], max_error: float | None = None, graph: bool = True
    ) -> dict[str, Any]:
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        extra_mib = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
        ms = replay_ms(call, rep=100) if graph else device_ms(call, warmup=20, rep=200)
        name = implementation if graph else f"{implementation}, no graph"
        needed = (self.flop, self.nbytes)
        return row(self.name, name, ms, self.users, needed, max_error, extra_mib=extra_mib)


def replay_ms(call: Callable[[], object], rep: int) -> float:
    """Return the median over replays of a CUDA graph. rep: milliseconds."""
    ms = do_bench_cudagraph(call, rep=rep, return_mode="median")
    assert isinstance(ms, float)
    return ms


def unit_rows(rows: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    table = torch.empty(rows, WIDTH, dtype=dtype, device="cuda")
    for part in table.split(1 << 20):
        part.copy_(F.normalize(torch.randn(part.shape, device="cuda"), dim=1))
    return table


def score_error(states: Tensor, table: Tensor, found: tuple[Tensor, Tensor]) -> float:
    """Return the largest distance of a score from the float32 score of its rank, and from that of its own row."""
    worst = 0.0
    for part in range(0, len(states), 16):
        exact = states[part : part + 16].float() @ table.float().T  # [16, items]
        scores = found[0][part : part + 16]
        rows = found[1][part : part + 16]
        for expected in (exact.topk(K, dim=1).values, exact.gather(1, rows)):
            worst = max(worst, float((scores - expected).abs().max()))
    return worst


def catalogue(items: int, users: int) -> Rows:
    states = unit_rows(users)
    table = unit_rows(items)
    work = Work(f"{items:,} x {WIDTH}, {users} users, top-{K}", users, 2.0 * users * items * WIDTH, items * WIDTH * 2)

    def fused(**masks: Tensor) -> tuple[Tensor, Tensor]:
        return sequence_recommendation_interaction(states, table, K, check_values=False, **masks)

    error = score_error(states, table, fused()) if items <= 1_000_000 else None
    rows = [
        work.measured("torch: product", lambda: states @ table.T),
        work.measured("torch: product, topk", lambda: (states @ table.T).topk(K, dim=1)),
        work.measured("torch: product, topk", lambda: (states @ table.T).topk(K, dim=1), graph=False),
        work.measured("fused", fused, error),
        work.measured("fused", fused, error, graph=False),
    ]
    if items == 1_000_000 and users == USERS:
        seen = torch.randint(items, (users, 1000), device="cuda").sort(dim=1).values.flatten()
        seen_offsets = torch.arange(users + 1, device="cuda") * 1000
        eligible = torch.rand(items, device="cuda") < 0.5
        masks = {"seen": seen, "seen_offsets": seen_offsets, "eligible": eligible}
        rows.append(work.measured("fused, 1000 seen a user, half eligible", lambda: fused(**masks)))
        rows += quantised(states, table, work)
    return rows


def quantised(states: Tensor, table: Tensor, work: Work) -> Rows:
    scales = table.float().abs().amax(1) / 127
    int8_table = (table.float() / scales[:, None]).round().to(torch.int8)

    def fused() -> tuple[Tensor, Tensor]:
        return sequence_recommendation_interaction(states, int8_table, K, scales=scales, check_values=False)

    error = score_error(states, int8_table.float() * scales[:, None], fused())
    int8_work = Work(work.name, work.users, work.flop, work.nbytes / 2 + 4 * len(table))
    return [int8_work.measured("fused, int8 table", fused, error)]


def tune(users: int) -> None:
    """Print the full call's time with every choice of tiles, and the best one as its line of tiles.TILES."""
    states = unit_rows(users)
    table = unit_rows(1_000_000)
    limits = TileLimits.from_device(torch.device("cuda", 0))
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    plan = launch.make_plan(len(table), users, WIDTH, K, 2, limits)
    rows = launch.ItemRows(table, None, None)
    timed: list[tuple[float, TopKTiles]] = []
    for tiles in tiles_to_try(users, limits):
        tiled = replace(plan, tiles=tiles, group_size=min(plan.group_size, tiles.block_items))
        call = partial(launch.top_k, states, rows, K, None, tiled, processors)
        timed.append((replay_ms(call, rep=50), tiles))
        print(f"{users} users: {timed[-1][0]:.4f} ms, {tiles}", flush=True)
    best = min(timed, key=lambda pair: pair[0])[1]
    print(f"    ({limits.capability}, 2, {WIDTH}, {users >= LARGE_BATCH_USERS}): {best},", flush=True)


def tiles_to_try(users: int, limits: TileLimits) -> list[TopKTiles]:
    """Return all tiles that fit the limits and fill the inline PTX code's packs."""
    sizes = itertools.product((32, 64, 128), (16, 64, 128, 256), (4, 8, 16), (2, 3), (1, 2))
    tiles = [TopKTiles(*numbers) for numbers in sizes if min(64, max(16, users)) <= numbers[1] <= max(16, users)]
    return [
        each
        for each in tiles
        if each.fills_packs
        and each.programs_per_sm * each.shared_bytes(2 * WIDTH) <= limits.shared_bytes
        and each.warps == max(4, each.block_users // 16)
    ]


def candidates(per_user: int) -> Rows:
    states = unit_rows(USERS)
    table = unit_rows(1_000_000)
    rows = torch.randint(len(table), (USERS, per_user), device="cuda")
    pairs = USERS * per_user
    work = Work(f"{per_user} candidates, {USERS} users", USERS, 2.0 * pairs * WIDTH, pairs * (WIDTH * 2 + 12))

    def fused() -> Tensor:
        return candidate_interaction(states, table, rows, check_values=False)

    def gathered() -> Tensor:
        return torch.einsum("uw,ucw->uc", states, table[rows])

    exact = torch.einsum("uw,ucw->uc", states.float(), table[rows].float())
    error = float((fused() - exact).abs().max())
    return [work.measured("torch: gather, product", gathered), work.measured("fused", fused, error)]


def events(items: int) -> dict[str, Tensor]:
    """Return arguments of hierarchical_sequence_fusion."""
    total = USERS * EVENTS
    starts = torch.tensor([0, *FEATURE_SIZES]).cumsum(0)[:-1].tolist()
    codes = [
        torch.randint(start, start + size, (total,), device="cuda")
        for start, size in zip(starts, FEATURE_SIZES, strict=True)
    ]
    pauses = torch.where(torch.rand(USERS, EVENTS, device="cuda") < 1 / EVENTS_PER_SESSION, GAP_S, 30)
    return {
        "table": unit_rows(items),
        "features": torch.randn(sum(FEATURE_SIZES), WIDTH, device="cuda").bfloat16() * 0.1,
        "log_strength": torch.randn(sum(FEATURE_SIZES), device="cuda") * 0.1,
        "tokens": torch.randint(items, (total,), device="cuda", dtype=torch.int32),
        "feature_ids": torch.stack(codes, 1).int(),
        "seconds": pauses.cumsum(1).flatten().int(),
        "offsets": torch.arange(USERS + 1, device="cuda") * EVENTS,
    }


def unfused(
    table: Tensor,
    features: Tensor,
    log_strength: Tensor,
    tokens: Tensor,
    feature_ids: Tensor,
    seconds: Tensor,
    offsets: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the same with torch's own operators, one launch or more for each."""
    weights = log_strength[feature_ids].sum(1).clamp(-20, 20).exp()
    position = torch.arange(len(tokens), device="cuda")
    user = torch.searchsorted(offsets, position, right=True) - 1
    is_recent = position >= offsets[user + 1] - RECENT
    strengths = torch.where(is_recent, weights, 1.0)[:, None].to(table.dtype)
    vectors = table[tokens] * strengths + F.embedding_bag(feature_ids, features, mode="sum")  # [events, width]
    weights = torch.where(is_recent, 1.0, weights)
    begins = is_recent | (position == offsets[user]) | (seconds.diff(prepend=seconds[:1]) >= GAP_S)
    token = begins.cumsum(0) - 1
    sums = torch.zeros(int(token[-1]) + 1, WIDTH, device="cuda").index_add_(0, token, vectors * weights[:, None])
    means = sums / torch.zeros(len(sums), device="cuda").index_add_(0, token, weights)[:, None]
    owner = user[begins]
    ends = torch.bincount(owner, minlength=USERS).cumsum(0)
    kept = ends[owner] - torch.arange(len(sums), device="cuda") <= RECENT + SESSIONS
    times = seconds[begins.roll(-1)][kept]
    lengths = torch.bincount(owner[kept], minlength=USERS)
    return means[kept].to(table.dtype), times, F.pad(lengths.cumsum(0), (1, 0))


def fusion() -> Rows:
    inputs = events(1_000_000)

    def fused() -> tuple[Tensor, Tensor, Tensor]:
        return hierarchical_sequence_fusion(**inputs, recent=RECENT, sessions=SESSIONS, gap_s=GAP_S, check_values=False)

    exact = unfused(**{name: part.float() if part.dtype == torch.bfloat16 else part for name, part in inputs.items()})
    got = fused()
    tokens = len(exact[0])
    if not (torch.equal(got[2], exact[2]) and torch.equal(got[1][:tokens], exact[1])):
        raise ValueError("the fused tokens differ from torch's")
    error = float((got[0][:tokens] - exact[0]).abs().max())
    read = USERS * EVENTS * (WIDTH * 2 + 4 * (2 + len(FEATURE_SIZES)))
    additions = 1.0 * USERS * EVENTS * WIDTH * (len(FEATURE_SIZES) + 2)  # of the features and a weighted item
    work = Work(f"{USERS} users x {EVENTS} events -> {tokens} tokens", USERS, additions, read + got[0].nbytes)
    return [
        work.measured("torch: unfused", lambda: unfused(**inputs), graph=False),
        *(work.measured("fused", fused, error, graph) for graph in (True, False)),
    ]


def copying() -> dict[str, Any]:
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return Work("copy of 1 GiB", 0, 0.0, 2.0 * (1 << 30)).measured("torch: copy", lambda: target.copy_(source))


def main() -> None:
    args = arguments(__doc__, tune="time the choices of tiles; writes no file")
    torch.manual_seed(0)
    if args.tune:
        tune(USERS)
        tune(1)
        return
    rows = [copying(), *catalogue(1_000_000, USERS), *fusion(), *candidates(500)]
    rows += [*catalogue(1_000_000, 1), *catalogue(10_000_000, USERS)]
    card = torch.cuda.get_device_name()
    peak = next(peak.gb_per_s for name, peak in PEAKS.items() if name in card)
    by_name = {(str(each["workload"]), str(each["implementation"])): each for each in reversed(rows)}
    workload = f"1,000,000 x {WIDTH}, {USERS} users"
    top_k = {name: each for (work, name), each in by_name.items() if work.startswith(workload)}
    fused = {name: each for (work, name), each in by_name.items() if "events" in work}
    metrics = {
        "top_k_speedup": ratio(top_k["torch: product, topk"], top_k["fused"]),
        "top_k_extra_mib": top_k["fused"]["extra_mib"],
        "fusion_speedup": ratio(fused["torch: unfused, no graph"], fused["fused"]),
        "fusion_peak_bandwidth_pct": 100 * fused["fused"]["gb_per_s"] / peak,
    }
    rounded = {key: round(value, 3) for key, value in metrics.items()}
    print(metrics, results.write(card_name("kernels_retrieval"), rounded, rows, args.out))


if __name__ == "__main__":
    main()
