"""Fusion in Triton: one launch finds each user's sessions, one gathers, sums, pools and packs.

A program of the second launch, one warp, makes one token. The table of small features is read eight times an event: it
stays in the multiprocessor's first cache, past which the items' rows are led.
"""

import triton
import triton.language as tl

from kernels.hierarchical_sequence_fusion.reference import STRENGTH_CAP

CAP = tl.constexpr(STRENGTH_CAP)


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
def _event(
    table, features, strength, token, codes, column, inside, table_stride, feature_stride, FEATURES: tl.constexpr
):
    """float32: the item [columns], the sum of the features [columns] and the strength of the event with this token and
    these codes."""
    place = table + token.to(tl.int64) * table_stride + column
    item = tl.load(place, mask=inside, cache_modifier=".cg").to(tl.float32)
    beside, power = tl.zeros_like(item), 0.0
    for number in tl.static_range(FEATURES):  # pyright: ignore[reportGeneralTypeIssues]: it is Triton's to unroll
        code = tl.load(codes + number).to(tl.int64)
        beside += tl.load(features + code * feature_stride + column, mask=inside).to(tl.float32)
        power += tl.load(strength + code)
    return item, beside, tl.exp(tl.minimum(tl.maximum(power, -CAP), CAP))


@triton.jit
def fuse_kernel(
    table, features, strength, tokens, codes, seconds, offsets, starts, counts, fused, fused_seconds, fused_offsets,
    users, rows, width, table_stride, feature_stride,
    RECENT: tl.constexpr, SESSIONS: tl.constexpr, FEATURES: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    BLOCK_USERS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """One token, of a session or of one of the newest events; a place that its user lacks zeroes a row of the tail."""
    user, place = tl.program_id(0) // (SESSIONS + RECENT), tl.program_id(0) % (SESSIONS + RECENT)
    before, total = 0, 0  # tokens of the users before, of all
    for first in range(0, users, BLOCK_USERS):
        other = first + tl.arange(0, BLOCK_USERS)
        count = tl.load(counts + other, mask=other < users, other=0)
        before += tl.sum(tl.where(other < user, count, 0), axis=0)
        total += tl.sum(count, axis=0)
    start, stop = tl.load(offsets + user).to(tl.int32), tl.load(offsets + user + 1).to(tl.int32)
    older = tl.maximum(stop - RECENT, start)
    own = tl.load(counts + user)
    sessions = own - (stop - older)
    pooled = place < SESSIONS
    here = tl.where(pooled, place < sessions, place - SESSIONS < stop - older)
    at = starts + user.to(tl.int64) * (SESSIONS + 1) + place
    newest = older + place - SESSIONS
    event = tl.where(pooled, tl.load(at, mask=pooled & here, other=0), newest)
    end = tl.where(pooled, tl.load(at + 1, mask=pooled & here, other=0), newest + 1)
    # A user's tokens lie without gaps; the places it lacks are numbered after all users' tokens.
    token = tl.where(pooled, place, place - SESSIONS + sessions)
    lacking = tl.where(pooled, place - sessions, SESSIONS - sessions + newest - stop)
    row = tl.where(here, before + token, total + user * (RECENT + SESSIONS) - before + lacking).to(tl.int64)
    column = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    inside = None if EVEN else column < width
    tokens += event
    codes += event.to(tl.int64) * FEATURES
    events = tl.where(here, end - event, 0)
    mean, weights = tl.zeros((BLOCK_WIDTH,), tl.float32), 0.0
    for _ in range(events):
        item, beside, weight = _event(
            table, features, strength, tl.load(tokens), codes, column, inside, table_stride, feature_stride,
            FEATURES,
        )  # fmt: skip
        tokens, codes = tokens + 1, codes + FEATURES
        share = tl.where(pooled & (events > 1), weight, 1.0)
        mean += (item * tl.where(pooled, 1.0, weight) + beside) * share
        weights += share
    mean /= tl.where(here, weights, 1.0)
    tl.store(fused + row * width + column, mean.to(fused.dtype.element_ty), mask=(column < width) & (row < rows))
    now = tl.load(seconds + end - 1, mask=here, other=0)
    tl.store(fused_seconds + row, now, mask=row < rows)
    if (place == 0) & (tl.program_id(1) == 0):
        tl.store(fused_offsets + user, before.to(tl.int64))
        tl.store(fused_offsets + users, total.to(tl.int64))
