"""Fusion in Triton: one launch finds each user's sessions, one gathers, sums, pools and packs.

A program of the second launch makes one pooled token, or a few of the newest events. The table of small features is
read eight times an event: it stays in the multiprocessor's first cache, past which the items' rows are led.
"""

import triton
import triton.language as tl


@triton.jit
def span_kernel(
    seconds, offsets, starts, counts, gap_s, RECENT: tl.constexpr, SESSIONS: tl.constexpr, BLOCK: tl.constexpr
):
    """starts int32 [users, SESSIONS + 1]: the first event of each pooled token and the end of the last; counts int32
    [users], the tokens of each user."""
    user = tl.program_id(0)
    start, stop = tl.load(offsets + user).to(tl.int32), tl.load(offsets + user + 1).to(tl.int32)
    older = tl.maximum(stop - RECENT, start)
    found = start * 0
    for first in range(start, older, BLOCK):
        found += tl.sum(_begins(seconds, first + tl.arange(0, BLOCK), start, older, gap_s), axis=0)
    place = tl.minimum(SESSIONS - found, 0)  # below zero: sessions that are too old
    own = starts + user.to(tl.int64) * (SESSIONS + 1)
    for first in range(start, older, BLOCK):
        event = first + tl.arange(0, BLOCK)
        begins = _begins(seconds, event, start, older, gap_s)
        slot = place + tl.cumsum(begins, axis=0) - 1
        tl.store(own + slot, event, mask=(begins != 0) & (slot >= 0))
        place += tl.sum(begins, axis=0)
    kept = tl.minimum(found, SESSIONS)
    tl.store(own + kept, older)
    tl.store(counts + user, kept + stop - older)


@triton.jit
def _begins(seconds, event, start, older, gap_s):
    """int32: 1 where a session begins."""
    after = (event > start) & (event < older)
    now = tl.load(seconds + event, mask=after, other=0).to(tl.int64)
    before = tl.load(seconds + event - 1, mask=after, other=0).to(tl.int64)
    return ((after & (now - before >= gap_s)) | ((event == start) & (event < older))).to(tl.int32)


@triton.jit
def _events(
    table, features, strength, tokens, codes, event, live, column, inside, table_stride, feature_stride,
    FEATURES: tl.constexpr,
):  # fmt: skip
    """float32 [events, columns] vectors and [events] weights, of dead ones 0."""
    mask = live[:, None] & inside[None, :]
    token = tl.load(tokens + event, mask=live, other=0).to(tl.int64)
    place = table + token[:, None] * table_stride + column[None, :]
    vector = tl.load(place, mask=mask, other=0, cache_modifier=".cg").to(tl.float32)
    power = tl.zeros(event.shape, tl.float32)
    for number in tl.static_range(FEATURES):
        code = tl.load(codes + event.to(tl.int64) * FEATURES + number, mask=live, other=0)
        place = features + code[:, None] * feature_stride + column[None, :]
        vector += tl.load(place, mask=mask, other=0).to(tl.float32)
        power += tl.load(strength + code, mask=live, other=0)
    weight = tl.exp(tl.minimum(tl.maximum(power, -20.0), 20.0))
    return vector, tl.where(live, weight, 0.0)


@triton.jit
def _pool(
    table, features, strength, tokens, codes, first, last, column, inside, target, written, table_stride,
    feature_stride, FEATURES: tl.constexpr, EVENTS: tl.constexpr,
):  # fmt: skip
    """The weighted mean of events first .. last - 1; zeros if there are none."""
    pooled = tl.zeros(column.shape, tl.float32)
    weights = 0.0
    for start in range(first, last, EVENTS):
        event = start + tl.arange(0, EVENTS)
        vector, weight = _events(
            table, features, strength, tokens, codes, event, event < last, column, inside, table_stride,
            feature_stride, FEATURES,
        )  # fmt: skip
        pooled += tl.sum(vector * weight[:, None], axis=0)
        weights += tl.sum(weight, axis=0)
    pooled /= tl.where(first < last, weights, 1.0)
    tl.store(target + column, pooled.to(target.dtype.element_ty), mask=inside & written)


@triton.jit
def _copy(
    table, features, strength, tokens, codes, event, live, column, inside, fused, target, written, table_stride,
    feature_stride, FEATURES: tl.constexpr,
):  # fmt: skip
    """Live events as they are, zeros for the others."""
    vector, _ = _events(  # pyright: ignore[reportGeneralTypeIssues]: to it, a call of a kernel never returns
        table, features, strength, tokens, codes, event, live, column, inside, table_stride, feature_stride, FEATURES
    )
    place = fused + target[:, None] + column[None, :]
    tl.store(place, vector.to(fused.dtype.element_ty), mask=written[:, None] & inside[None, :])


@triton.jit
def fuse_kernel(
    table, features, strength, tokens, codes, seconds, offsets, starts, counts, fused, fused_seconds, fused_offsets,
    users, rows, width, table_stride, feature_stride,
    RECENT: tl.constexpr, SESSIONS: tl.constexpr, FEATURES: tl.constexpr, EVENTS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr, BLOCK_USERS: tl.constexpr,
):  # fmt: skip
    """One pooled token, or EVENTS of the newest events; a place that its user lacks zeroes a row of the unused tail."""
    slots: tl.constexpr = SESSIONS + (RECENT + EVENTS - 1) // EVENTS
    user, slot = tl.program_id(0) // slots, tl.program_id(0) % slots
    before, total = 0, 0  # tokens of the users before, of all
    for first in range(0, users, BLOCK_USERS):
        other = first + tl.arange(0, BLOCK_USERS)
        count = tl.load(counts + other, mask=other < users, other=0)
        before += tl.sum(tl.where(other < user, count, 0), axis=0)
        total += tl.sum(count, axis=0)
    start, stop = tl.load(offsets + user).to(tl.int32), tl.load(offsets + user + 1).to(tl.int32)
    older = tl.maximum(stop - RECENT, start)
    kept = tl.load(counts + user) - (stop - older)
    unused = total + user * (RECENT + SESSIONS) - before - kept  # tail row of a pooled token's place, less the place
    column = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    inside = column < width
    if slot < SESSIONS:
        at = starts + user.to(tl.int64) * (SESSIONS + 1) + slot
        first = tl.load(at, mask=slot < kept, other=0)
        last = tl.load(at + 1, mask=slot < kept, other=0)
        row = tl.where(slot < kept, before + slot, unused + slot).to(tl.int64)
        _pool(
            table, features, strength, tokens, codes, first, last, column, inside, fused + row * width, row < rows,
            table_stride, feature_stride, FEATURES, EVENTS,
        )  # fmt: skip
        now = tl.load(seconds + last - 1, mask=slot < kept, other=0)
        tl.store(fused_seconds + row, now, mask=row < rows)
    else:
        place = (slot - SESSIONS) * EVENTS + tl.arange(0, EVENTS)
        live = older + place < stop
        target = tl.where(live, before + kept + place, unused + SESSIONS + place - (stop - older)).to(tl.int64)
        written = (place < RECENT) & (target < rows)
        _copy(
            table, features, strength, tokens, codes, older + place, live, column, inside, fused, target * width,
            written, table_stride, feature_stride, FEATURES,
        )  # fmt: skip
        times = tl.load(seconds + older + place, mask=live, other=0)
        tl.store(fused_seconds + target, times, mask=written)
    if (slot == 0) & (tl.program_id(1) == 0):
        tl.store(fused_offsets + user, before.to(tl.int64))
        tl.store(fused_offsets + users, total.to(tl.int64))
