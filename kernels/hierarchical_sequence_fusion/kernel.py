"""Fusion in Triton: one launch finds each user's sessions, one gathers, sums, pools and packs.

A program of the second launch, one warp, makes one fused row. The table of small features is read eight times per
event and stays in the L1 cache; the items' rows bypass it.
"""

import triton
import triton.language as tl

from kernels.hierarchical_sequence_fusion.reference import STRENGTH_CAP

CAP = tl.constexpr(STRENGTH_CAP)


@triton.jit
def session_kernel(
    seconds, offsets, starts, counts, gap_s, RECENT: tl.constexpr, SESSIONS: tl.constexpr, BLOCK: tl.constexpr
):
    """Find the sessions. Grid (users).

    starts: int32 [users, SESSIONS + 1], the first event of each pooled session and the end of the last one; counts:
    int32 [users], the fused rows of each user.
    """
    user = tl.program_id(0)
    start = tl.load(offsets + user).to(tl.int32)
    stop = tl.load(offsets + user + 1).to(tl.int32)
    recent_start = tl.maximum(stop - RECENT, start)
    found = start * 0
    for first in range(start, recent_start, BLOCK):
        event = first + tl.arange(0, BLOCK)
        found += tl.sum(_is_session_start(seconds, event, start, recent_start, gap_s), axis=0)
    next_slot = tl.minimum(SESSIONS - found, 0)  # slots below zero are sessions that are too old
    user_starts = starts + user.to(tl.int64) * (SESSIONS + 1)
    for first in range(start, recent_start, BLOCK):
        event = first + tl.arange(0, BLOCK)
        is_start = _is_session_start(seconds, event, start, recent_start, gap_s)
        slot = next_slot + tl.cumsum(is_start, axis=0) - 1
        tl.store(user_starts + slot, event, mask=(is_start != 0) & (slot >= 0))
        next_slot += tl.sum(is_start, axis=0)
    pooled = tl.minimum(found, SESSIONS)
    tl.store(user_starts + pooled, recent_start)
    tl.store(counts + user, pooled + stop - recent_start)


@triton.jit
def _is_session_start(seconds, event, start, recent_start, gap_s):
    """Return int32: 1 where a session begins."""
    has_previous = (event > start) & (event < recent_start)
    now = tl.load(seconds + event, mask=has_previous, other=0).to(tl.int64)
    previous = tl.load(seconds + event - 1, mask=has_previous, other=0).to(tl.int64)
    return ((has_previous & (now - previous >= gap_s)) | ((event == start) & (event < recent_start))).to(tl.int32)


@triton.jit
def _unpack_pair(value, PAIRS: tl.constexpr):
    """Return float32 of both columns of a word of two bfloat16; without PAIRS the single column twice."""
    if PAIRS:
        return (value << 16).to(tl.float32, bitcast=True), (value & -65536).to(tl.float32, bitcast=True)
    value_f32 = value.to(tl.float32)
    return value_f32, value_f32


@triton.jit
def _pack_pair(low, high):
    """Return int32: two columns rounded to bfloat16."""
    low = low.to(tl.bfloat16).to(tl.int16, bitcast=True)
    high = high.to(tl.bfloat16).to(tl.int16, bitcast=True)
    return (low.to(tl.int32) & 0xFFFF) | (high.to(tl.int32) << 16)


@triton.jit
def _sum_features(
    features, log_strength, feature_ids, inside, STRIDE: tl.constexpr, FEATURES: tl.constexpr, PAIRS: tl.constexpr
):
    """Return float32: the sum of the event's features, both halves, and its strength."""
    low = 0.0
    high = 0.0
    log_sum = 0.0
    for number in tl.static_range(FEATURES):  # pyright: ignore[reportGeneralTypeIssues]: it is Triton's to unroll
        feature = tl.load(feature_ids + number).to(tl.uint32).to(tl.uint64)  # unsigned: no sign to extend
        row = tl.load(features + feature * STRIDE, mask=inside)
        left, right = _unpack_pair(row, PAIRS)  # pyright: ignore[reportGeneralTypeIssues]: Triton's call
        low, high = (low + left, high + right) if number else (left, right)
        log_sum += tl.load(log_strength + feature)
    log_sum = tl.minimum(tl.maximum(log_sum, -CAP, tl.PropagateNan.ALL), CAP, tl.PropagateNan.ALL)
    return low, high, tl.exp(log_sum)


@triton.jit
def fuse_kernel(
    table, features, log_strength, tokens, feature_ids, seconds, offsets, starts, counts, fused, fused_seconds,
    fused_offsets, users, rows, width, table_stride, FEATURE_STRIDE: tl.constexpr,
    RECENT: tl.constexpr, SESSIONS: tl.constexpr, FEATURES: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_USERS: tl.constexpr, EVEN_D: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Write one fused row, of a session or a recent event. Grid (users * (SESSIONS + RECENT), width / BLOCK_D).

    Each user has SESSIONS + RECENT slots; a program whose slot is empty zeroes a row after the last user's. Sessions
    come first: at the end, the many short programs of recent events run next to the last long sessions.
    PAIRS: table, features and fused hold int32 words of two bfloat16; width and strides count words.
    """
    program = tl.program_id(0)
    pooled = program < users * SESSIONS
    recent_program = program - users * SESSIONS
    user = tl.where(pooled, program // max(SESSIONS, 1), recent_program // max(RECENT, 1))
    slot = tl.where(pooled, program % max(SESSIONS, 1), SESSIONS + recent_program % max(RECENT, 1))
    before = 0  # rows of the users before
    total = 0  # rows of all users
    for first in range(0, users, BLOCK_USERS):
        other = first + tl.arange(0, BLOCK_USERS)
        count = tl.load(counts + other, mask=other < users, other=0)
        before += tl.sum(tl.where(other < user, count, 0), axis=0)
        total += tl.sum(count, axis=0)
    start = tl.load(offsets + user).to(tl.int32)
    stop = tl.load(offsets + user + 1).to(tl.int32)
    recent_start = tl.maximum(stop - RECENT, start)
    user_rows = tl.load(counts + user)
    sessions = user_rows - (stop - recent_start)
    filled = tl.where(pooled, slot < sessions, slot - SESSIONS < stop - recent_start)
    start_pointer = starts + user.to(tl.int64) * (SESSIONS + 1) + slot
    recent_event = recent_start + slot - SESSIONS
    event = tl.where(pooled, tl.load(start_pointer, mask=pooled & filled, other=0), recent_event)
    end = tl.where(pooled, tl.load(start_pointer + 1, mask=pooled & filled, other=0), recent_event + 1)
    # A user's rows have no gaps; empty slots are numbered after the rows of all users.
    user_row = tl.where(pooled, slot, slot - SESSIONS + sessions)
    empty_slot = tl.where(pooled, slot - sessions, SESSIONS - sessions + recent_event - stop)
    row = tl.where(filled, before + user_row, total + user * (RECENT + SESSIONS) - before + empty_slot).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = None if EVEN_D else column < width
    tokens += event
    feature_ids += event.to(tl.int64) * FEATURES
    events = tl.where(filled, end - event, 0)
    table = table + column
    features = features + column
    low = tl.zeros((BLOCK_D,), tl.float32)
    high = tl.zeros((BLOCK_D,), tl.float32)
    weights = 0.0
    for _ in range(events):
        item = tl.load(table + tl.load(tokens).to(tl.int64) * table_stride, mask=inside, cache_modifier=".cg")
        left, right, strength = _sum_features(
            features, log_strength, feature_ids, inside, FEATURE_STRIDE, FEATURES, PAIRS
        )
        tokens = tokens + 1
        feature_ids = feature_ids + FEATURES
        weight = tl.where(pooled & (events > 1), strength, 1.0)
        item_weight = tl.where(pooled, weight, strength)
        item_low, item_high = _unpack_pair(item, PAIRS)
        low += item_low * item_weight + left * weight
        high += item_high * item_weight + right * weight
        weights += weight
    weights = tl.where(filled, weights, 1.0)
    value = _pack_pair(low / weights, high / weights) if PAIRS else (low / weights).to(fused.dtype.element_ty)
    tl.store(fused + row * width + column, value, mask=(column < width) & (row < rows))
    last_seconds = tl.load(seconds + end - 1, mask=filled, other=0)
    tl.store(fused_seconds + row, last_seconds, mask=row < rows)
    if (slot == 0) & (tl.program_id(1) == 0):
        tl.store(fused_offsets + user, before.to(tl.int64))
        tl.store(fused_offsets + users, total.to(tl.int64))
