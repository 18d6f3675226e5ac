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
def _halves(value, WORDS: tl.constexpr):
    """float32 of both columns of a word of two bfloat16; with one column a value, that one twice."""
    if WORDS:
        return (value << 16).to(tl.float32, bitcast=True), (value & -65536).to(tl.float32, bitcast=True)
    wide = value.to(tl.float32)
    return wide, wide


@triton.jit
def _word(low, high):
    """int32: two columns rounded to bfloat16."""
    low, high = low.to(tl.bfloat16).to(tl.int16, bitcast=True), high.to(tl.bfloat16).to(tl.int16, bitcast=True)
    return (low.to(tl.int32) & 0xFFFF) | (high.to(tl.int32) << 16)


@triton.jit
def _beside(features, strength, codes, inside, STRIDE: tl.constexpr, FEATURES: tl.constexpr, WORDS: tl.constexpr):
    """float32: the sum of the features, both halves, and the strength of the event with these codes."""
    low, high, power = 0.0, 0.0, 0.0
    for number in tl.static_range(FEATURES):  # pyright: ignore[reportGeneralTypeIssues]: it is Triton's to unroll
        code = tl.load(codes + number).to(tl.uint32).to(tl.uint64)  # without a sign there is none to extend
        row = tl.load(features + code * STRIDE, mask=inside)
        left, right = _halves(row, WORDS)  # pyright: ignore[reportGeneralTypeIssues]: Triton's call
        low, high = (low + left, high + right) if number else (left, right)
        power += tl.load(strength + code)
    power = tl.minimum(tl.maximum(power, -CAP, tl.PropagateNan.ALL), CAP, tl.PropagateNan.ALL)
    return low, high, tl.exp(power)


@triton.jit
def fuse_kernel(
    table, features, strength, tokens, codes, seconds, offsets, starts, counts, fused, fused_seconds, fused_offsets,
    users, rows, width, table_stride, FEATURE_STRIDE: tl.constexpr,
    RECENT: tl.constexpr, SESSIONS: tl.constexpr, FEATURES: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    BLOCK_USERS: tl.constexpr, EVEN: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """One token, of a session or of one of the newest events; a place that its user lacks zeroes a row of the tail.

    Sessions come first: at the end, the many short programs of the newest events run beside the last long sessions.
    WORDS: table, features and fused hold int32 words of two bfloat16; width and strides count words.
    """
    turn = tl.program_id(0)
    pooled = turn < users * SESSIONS
    behind = turn - users * SESSIONS
    user = tl.where(pooled, turn // max(SESSIONS, 1), behind // max(RECENT, 1))
    place = tl.where(pooled, turn % max(SESSIONS, 1), SESSIONS + behind % max(RECENT, 1))
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
    table, features = table + column, features + column
    low, high, weights = tl.zeros((BLOCK_WIDTH,), tl.float32), tl.zeros((BLOCK_WIDTH,), tl.float32), 0.0
    for _ in range(events):
        item = tl.load(table + tl.load(tokens).to(tl.int64) * table_stride, mask=inside, cache_modifier=".cg")
        left, right, weight = _beside(features, strength, codes, inside, FEATURE_STRIDE, FEATURES, WORDS)
        tokens, codes = tokens + 1, codes + FEATURES
        share = tl.where(pooled & (events > 1), weight, 1.0)
        strong = tl.where(pooled, share, weight)
        item_low, item_high = _halves(item, WORDS)
        low += item_low * strong + left * share
        high += item_high * strong + right * share
        weights += share
    weights = tl.where(here, weights, 1.0)
    value = _word(low / weights, high / weights) if WORDS else (low / weights).to(fused.dtype.element_ty)
    tl.store(fused + row * width + column, value, mask=(column < width) & (row < rows))
    now = tl.load(seconds + end - 1, mask=here, other=0)
    tl.store(fused_seconds + row, now, mask=row < rows)
    if (place == 0) & (tl.program_id(1) == 0):
        tl.store(fused_offsets + user, before.to(tl.int64))
        tl.store(fused_offsets + users, total.to(tl.int64))
