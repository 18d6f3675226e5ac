"""Streaming top-k and hierarchical fusion against what torch does otherwise, in one run on one GPU.

Median of replays of a CUDA graph; "no graph" is by device events with the second cache flushed before each call: then
the host's launches count too. Replays gather the same rows each time: what fits the second cache (50 MB) is faster than
in service, here a part of the candidates'. The bytes of gb_per_s are those that must cross the device's memory: the
table once, or each event's row, and what is written; the table of small features is not counted. max_error is against
float32 sums of the same rounded inputs.

usage: python -m tests.benchmarks.kernels_retrieval [--out FOLDER] [--tune]
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.testing import do_bench, do_bench_cudagraph

from kernels.hierarchical_sequence_fusion.op import hierarchical_sequence_fusion
from kernels.sequence_recommendation_interaction import launch
from kernels.sequence_recommendation_interaction.op import candidate_interaction, sequence_recommendation_interaction
from kernels.sequence_recommendation_interaction.tiles import MANY, Card, TopKTiles
from tests.benchmarks import results
from tests.benchmarks.kernel_rows import PEAKS, arguments, named, ratio, row

USERS, WIDTH, K = 256, 256, 100
EVENTS, RECENT, SESSIONS, GAP_S, EVENTS_A_SESSION = 4096, 256, 256, 1800, 16
FEATURE_SIZES = (5, 24, 24, 7, 10, 30, 17, 17)  # of the values that occur: action, gap, hour, weekday, value, dwell...
Rows = list[dict[str, Any]]  # of results.Result


@dataclass(frozen=True, slots=True)
class Work:
    """What a call has to do, whoever does it."""

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
        held = torch.cuda.memory_allocated()
        call()
        extra = torch.cuda.max_memory_allocated() - held
        if graph:
            ms = float(do_bench_cudagraph(call, rep=100, return_mode="median"))
        else:
            ms = float(do_bench(call, warmup=20, rep=200, return_mode="median"))
        name = implementation if graph else f"{implementation}, no graph"
        needed, extra_mib = (self.flop, self.nbytes), round(extra / 2**20, 1)
        return row(self.name, name, ms, self.users, needed, max_error, extra_mib=extra_mib)


def unit_rows(rows: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    table = torch.empty(rows, WIDTH, dtype=dtype, device="cuda")
    for part in table.split(1 << 20):
        part.copy_(F.normalize(torch.randn(part.shape, device="cuda"), dim=1))
    return table


def score_error(states: Tensor, table: Tensor, found: tuple[Tensor, Tensor]) -> float:
    """Largest distance of a returned score from the float32 score of its rank, and from that of its own row."""
    worst = 0.0
    for part in range(0, len(states), 16):
        exact = states[part : part + 16].float() @ table.float().T  # [16, items]
        scores, rows = found[0][part : part + 16], found[1][part : part + 16]
        for wanted in (exact.topk(K, dim=1).values, exact.gather(1, rows)):
            worst = max(worst, float((scores - wanted).abs().max()))
    return worst


def catalogue(items: int, users: int) -> Rows:
    states, table = unit_rows(users), unit_rows(items)
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
    small = (table.float() / scales[:, None]).round().to(torch.int8)
    call = lambda: sequence_recommendation_interaction(states, small, K, scales=scales, check_values=False)  # noqa: E731
    error = score_error(states, small.float() * scales[:, None], call())
    half = Work(work.name, work.users, work.flop, work.nbytes / 2 + 4 * len(table))
    return [half.measured("fused, int8 table", call, error)]


def tune(users: int) -> None:
    """Prints the whole call's time with every choice of tiles, and the best one as the line of tiles.TILES."""
    states, table, card = unit_rows(users), unit_rows(1_000_000), Card.of(torch.device("cuda", 0))
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    plan, catalogue = launch.plan(len(table), users, WIDTH, K, 2, card), launch.ItemRows(table, None, None)
    timed = []
    for tiles in tiles_to_try(users, card):
        tried = replace(plan, tiles=tiles, group=min(plan.group, tiles.items))
        ms = do_bench_cudagraph(
            lambda tried=tried: launch.top_k(states, catalogue, K, None, tried, processors),
            rep=50,
            return_mode="median",
        )
        timed.append((float(ms), tiles))
        print(f"{users} users: {timed[-1][0]:.4f} ms, {tiles}", flush=True)
    best = min(timed, key=lambda pair: pair[0])[1]
    print(f"    ({card.capability}, 2, {WIDTH}, {users >= MANY}): {best},", flush=True)


def tiles_to_try(users: int, card: Card) -> list[TopKTiles]:
    """All that fit the card and fill the inline code's packs."""
    sizes = itertools.product((32, 64, 128), (16, 64, 128, 256), (4, 8, 16), (2, 3), (1, 2))
    tiles = [TopKTiles(*numbers) for numbers in sizes if min(64, max(16, users)) <= numbers[1] <= max(16, users)]
    return [each for each in tiles if each.whole_packs and each.programs * each.shared_bytes(2 * WIDTH) <=
            card.shared_bytes and each.warps == max(4, each.users // 16)]  # fmt: skip


def candidates(per_user: int) -> Rows:
    states, table = unit_rows(USERS), unit_rows(1_000_000)
    rows = torch.randint(len(table), (USERS, per_user), device="cuda")
    pairs = USERS * per_user
    work = Work(f"{per_user} candidates, {USERS} users", USERS, 2.0 * pairs * WIDTH, pairs * (WIDTH * 2 + 12))
    call = lambda: candidate_interaction(states, table, rows, check_values=False)  # noqa: E731
    exact = torch.einsum("uw,ucw->uc", states.float(), table[rows].float())
    unfused = lambda: torch.einsum("uw,ucw->uc", states, table[rows])  # noqa: E731
    error = float((call() - exact).abs().max())
    return [work.measured("torch: gather, product", unfused), work.measured("fused", call, error)]


def events(items: int) -> dict[str, Tensor]:
    total = USERS * EVENTS
    starts = torch.tensor([0, *FEATURE_SIZES]).cumsum(0)[:-1].tolist()
    codes = [
        torch.randint(start, start + size, (total,), device="cuda")
        for start, size in zip(starts, FEATURE_SIZES, strict=True)
    ]
    pauses = torch.where(torch.rand(USERS, EVENTS, device="cuda") < 1 / EVENTS_A_SESSION, GAP_S, 30)
    return {
        "table": unit_rows(items),
        "features": torch.randn(sum(FEATURE_SIZES), WIDTH, device="cuda").bfloat16() * 0.1,
        "strength": torch.randn(sum(FEATURE_SIZES), device="cuda") * 0.1,
        "tokens": torch.randint(items, (total,), device="cuda", dtype=torch.int32),
        "codes": torch.stack(codes, 1).int(),
        "seconds": pauses.cumsum(1).flatten().int(),
        "offsets": torch.arange(USERS + 1, device="cuda") * EVENTS,
    }


def unfused(table: Tensor, features: Tensor, strength: Tensor, tokens: Tensor, codes: Tensor, seconds: Tensor,
            offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The same by torch's own operators, a launch or more for each."""
    weights = strength[codes].sum(1).clamp(-20, 20).exp()
    place = torch.arange(len(tokens), device="cuda")
    user = torch.searchsorted(offsets, place, right=True) - 1
    newest = place >= offsets[user + 1] - RECENT
    strengths = torch.where(newest, weights, 1.0)[:, None].to(table.dtype)
    vectors = table[tokens] * strengths + F.embedding_bag(codes, features, mode="sum")  # [events, width]
    weights = torch.where(newest, 1.0, weights)
    begins = newest | (place == offsets[user]) | (seconds.diff(prepend=seconds[:1]) >= GAP_S)
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
    made = events(1_000_000)
    call = lambda: hierarchical_sequence_fusion(  # noqa: E731
        **made, recent=RECENT, sessions=SESSIONS, gap_s=GAP_S, check_values=False
    )
    exact = unfused(**{name: part.float() if part.dtype == torch.bfloat16 else part for name, part in made.items()})
    found, tokens = call(), len(exact[0])
    if not (torch.equal(found[2], exact[2]) and torch.equal(found[1][:tokens], exact[1])):
        raise ValueError("the fused tokens are not those of torch")
    error = float((found[0][:tokens] - exact[0]).abs().max())
    read = USERS * EVENTS * (WIDTH * 2 + 4 * (2 + len(FEATURE_SIZES)))
    additions = 1.0 * USERS * EVENTS * WIDTH * (len(FEATURE_SIZES) + 2)  # of the features and a weighted item
    work = Work(f"{USERS} users x {EVENTS} events -> {tokens} tokens", USERS, additions, read + found[0].nbytes)
    fused = [work.measured("fused", call, error, graph) for graph in (True, False)]
    return [work.measured("torch: unfused", lambda: unfused(**made), graph=False), *fused]


def copying() -> dict[str, Any]:
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return Work("copy of 1 GiB", 0, 0.0, 2.0 * (1 << 30)).measured("torch: copy", lambda: target.copy_(source))


def main() -> None:
    args = arguments(__doc__, tune="time the tiles to choose from; no file")
    torch.manual_seed(0)
    if args.tune:
        tune(USERS)
        tune(1)
        return
    rows = [copying(), *catalogue(1_000_000, USERS), *fusion(), *candidates(500)]
    rows += [*catalogue(1_000_000, 1), *catalogue(10_000_000, USERS)]
    card = torch.cuda.get_device_name()
    peak = next(peak.gb_per_s for name, peak in PEAKS.items() if name in card)
    found = {(str(each["workload"]), str(each["implementation"])): each for each in reversed(rows)}
    top = {name: each for (work, name), each in found.items() if work.startswith(f"1,000,000 x {WIDTH}, {USERS} users")}
    fuse = {name: each for (work, name), each in found.items() if "events" in work}
    metrics = {
        "top_k_speedup": ratio(top["torch: product, topk"], top["fused"]),
        "top_k_extra_mib": top["fused"]["extra_mib"],
        "fusion_speedup": ratio(fuse["torch: unfused, no graph"], fuse["fused"]),
        "fusion_peak_bandwidth_pct": 100 * fuse["fused"]["gb_per_s"] / peak,
    }
    path = results.write(
        named("kernels_retrieval"), {key: round(value, 3) for key, value in metrics.items()}, rows, args.out
    )
    print(metrics, path)


if __name__ == "__main__":
    main()
