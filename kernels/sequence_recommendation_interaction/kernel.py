"""Streaming top-k in Triton: a bound from a sample, a pass over the catalogue that keeps what reaches it, a selection.

A candidate is one int64 key: the score's bits, ordered, above the row's complement. The greatest key is the best score
and, among equals, the lowest row; all keys differ. So the order of arrival leaves no trace in the answer.
"""

import triton
import triton.language as tl

from kernels.sequence_recommendation_interaction.compaction import APPEND, APPEND_OPERANDS, BEGIN, END, THREAD_OPERANDS
from kernels.sequence_recommendation_interaction.tiles import PACK as PACKED

PACK = tl.constexpr(PACKED)
EMPTY = tl.constexpr(-(1 << 63))
ROW_MASK = tl.constexpr(0xFFFFFFFF)
NO_BOUND = tl.constexpr(-3.4028234663852886e38)  # the lowest finite float32: a score of -inf does not reach it


@triton.jit
def _ordered(score):
    """float32 -> int32 of the same order; its own inverse on bits. -0 and 0 are one."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _key(score, row):
    return (_ordered(score).to(tl.int64) << 32) | (ROW_MASK - row.to(tl.int64))


@triton.jit
def _scores(state, table, scales, row, live, stride, WIDTH: tl.constexpr, QUANTISED: tl.constexpr):
    """float32 [users, rows]: state, [users, BLOCK_WIDTH], times table[row]."""
    feature = tl.arange(0, state.shape[1])
    mask = live[:, None] & (feature < WIDTH)[None, :]
    item = tl.load(table + row.to(tl.int64)[:, None] * stride + feature[None, :], mask=mask, other=0)
    score = tl.dot(state, tl.trans(item.to(state.dtype)), input_precision="ieee")
    if QUANTISED:
        score *= tl.load(scales + row, mask=live, other=0)[None, :]
    return score


@triton.jit
def _states(states, user, users, stride, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    feature = tl.arange(0, BLOCK_WIDTH)
    mask = (user < users)[:, None] & (feature < WIDTH)[None, :]
    return tl.load(states + user.to(tl.int64)[:, None] * stride + feature[None, :], mask=mask, other=0)


@triton.jit
def _greatest_bound(keys, k, slack):
    """The greatest t that at least k keys reach; earlier as soon as k to k + slack keys reach it."""
    low, high = tl.min(keys), tl.max(keys)
    while low < high:
        middle = (low >> 1) + (high >> 1) + ((low | high) & 1)  # rounded up, without overflow
        reached = tl.sum((keys >= middle).to(tl.int32))
        done = (reached >= k) & (reached <= k + slack)
        low = tl.where(reached >= k, middle, low)
        high = tl.where(done, middle, tl.where(reached >= k, high, middle - 1))
    return low


@triton.jit
def _listed(row, seen, start, stop):
    """Whether each row occurs in the ascending seen[start:stop]."""
    low, high = tl.zeros_like(row) + start, tl.zeros_like(row) + stop
    span = stop - start
    while span > 0:
        middle = (low + high) // 2
        searching = low < high
        below = tl.load(seen + middle, mask=searching, other=0) < row
        low = tl.where(searching & below, middle + 1, low)
        high = tl.where(searching & ~below, middle, high)
        span = span // 2
    return tl.load(seen + low, mask=low < stop, other=-1) == row


@triton.jit(do_not_specialize=["users", "groups"])
def sample_kernel(
    states, table, scales, eligible, maxima, users, items, groups, state_stride, table_stride,
    STRIDE: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    BLOCK_ITEMS: tl.constexpr, BLOCK_USERS: tl.constexpr, QUANTISED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """maxima [users, groups]: the best score of each GROUP of sampled rows; one row of every STRIDE is sampled."""
    user = tl.program_id(0) * BLOCK_USERS + tl.arange(0, BLOCK_USERS)
    state = _states(states, user, users, state_stride, WIDTH, BLOCK_WIDTH)
    for start in range(tl.program_id(1) * BLOCK_ITEMS, groups * GROUP, tl.num_programs(1) * BLOCK_ITEMS):
        number = start + tl.arange(0, BLOCK_ITEMS)
        # A multiplicative hash picks the row within its stride, so that no period of the table biases the sample.
        row = number * STRIDE + ((number.to(tl.int64) * 2654435761 >> 20) % STRIDE).to(tl.int32)
        live = row < items
        score = _scores(state, table, scales, row, live, table_stride, WIDTH, QUANTISED)
        if MASKED:
            live &= tl.load(eligible + row, mask=live, other=0) != 0
        score = tl.where(live[None, :], score, -float("inf"))
        best = tl.max(tl.reshape(score, (BLOCK_USERS, BLOCK_ITEMS // GROUP, GROUP)), axis=2)
        group = start // GROUP + tl.arange(0, BLOCK_ITEMS // GROUP)
        place = maxima + user.to(tl.int64)[:, None] * groups + group[None, :]
        tl.store(place, best, mask=(user < users)[:, None] & (group < groups)[None, :])


@triton.jit(do_not_specialize=["groups", "k"])
def bound_kernel(
    maxima, seen_offsets, bounds, groups, k, highest_rank,
    STRIDE: tl.constexpr, BLOCK: tl.constexpr, SEEN: tl.constexpr,
):  # fmt: skip
    """bounds [users]: a score that k items reach for sure and few more do; NO_BOUND where the sample has too few.

    With rows to leave out the rank grows by the share of them that a sample meets.
    """
    user = tl.program_id(0)
    rank = k
    if SEEN:
        listed = (tl.load(seen_offsets + user + 1) - tl.load(seen_offsets + user)).to(tl.int32)
        rank = tl.minimum(k + listed // STRIDE + listed // (4 * STRIDE) + 8 * (listed > 0).to(tl.int32), highest_rank)
    group = tl.arange(0, BLOCK)
    best = tl.load(maxima + user.to(tl.int64) * groups + group, mask=group < groups, other=-float("inf"))
    key = _ordered(tl.where(best == best, best, -float("inf")))
    low = _greatest_bound(key, rank, rank // 16)
    bits = tl.where(low < 0, low ^ 0x7FFFFFFF, low)
    tl.store(bounds + user, tl.maximum(bits.to(tl.float32, bitcast=True), NO_BOUND))


@triton.jit
def _thread(code: tl.constexpr, capacity):
    """Runs the inline code once a thread: a warp has more threads than these elements."""
    each = tl.zeros([16], tl.int32) + capacity
    tl.inline_asm_elementwise(code, THREAD_OPERANDS, [each], tl.int32, False, 1)  # pyright: ignore[reportArgumentType]: constants of a kernel


@triton.jit
def _append(score, bound, row, items, counter, place, CAPACITY: tl.constexpr, FAST: tl.constexpr):
    """The key of each score [users, rows] that reaches its user's bound goes to that user's next slot, while there are
    any: with FAST later, see append.py."""
    if FAST:
        arguments = [score, bound, row, items, counter.to(tl.int64), place.to(tl.int64), CAPACITY]
        tl.inline_asm_elementwise(APPEND, APPEND_OPERANDS, arguments, tl.int32, False, PACK)  # pyright: ignore[reportArgumentType]: constants of a kernel
    else:
        reached = (score >= bound) & (row < items)
        slot = tl.atomic_add(tl.broadcast_to(counter, reached.shape), 1, mask=reached, sem="relaxed")
        tl.store(place + slot, _key(score, row), mask=reached & (slot < CAPACITY))


@triton.jit(do_not_specialize=["users"])
def filter_kernel(
    states, table, scales, eligible, bounds, counts, candidates, users, items, state_stride, table_stride,
    CAPACITY: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_ITEMS: tl.constexpr,
    BLOCK_USERS: tl.constexpr, QUANTISED: tl.constexpr, MASKED: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """One pass over the table: every score that reaches its user's bound is appended to that user's candidates."""
    user = tl.program_id(0) * BLOCK_USERS + tl.arange(0, BLOCK_USERS)
    own = user < users
    state = _states(states, user, users, state_stride, WIDTH, BLOCK_WIDTH)
    bound = tl.load(bounds + user, mask=own, other=float("inf"))
    counter, place = (counts + user)[:, None], (candidates + user.to(tl.int64) * CAPACITY)[:, None]
    if FAST:
        _thread(BEGIN, CAPACITY)
    for start in range(tl.program_id(1) * BLOCK_ITEMS, items, tl.num_programs(1) * BLOCK_ITEMS):
        row = start + tl.arange(0, BLOCK_ITEMS)
        live = row < items
        score = _scores(state, table, scales, row, live, table_stride, WIDTH, QUANTISED)
        if MASKED:
            live &= tl.load(eligible + row, mask=live, other=0) != 0
            score = tl.where(live[None, :], score, float("nan"))  # a NaN reaches nothing
        _append(score, bound[:, None], row[None, :], items, counter, place, CAPACITY, FAST)
    if FAST:
        _thread(END, CAPACITY)


@triton.jit(do_not_specialize=["k"])
def select_kernel(
    bounds, counts, candidates, seen, seen_offsets, failed, failures, best, rows, k,
    CAPACITY: tl.constexpr, BLOCK_K: tl.constexpr, SEEN: tl.constexpr, RESCUED: tl.constexpr,
):  # fmt: skip
    """The k greatest keys of each user's candidates, sorted. A user whose candidates may lack one goes to `failed`.

    RESCUED: only the users in `failed`, whose candidates are complete.
    """
    user = tl.program_id(0).to(tl.int64)
    if RESCUED:
        if user >= tl.load(failures):
            return
        user = tl.load(failed + user).to(tl.int64)
    count, bound, first = tl.load(counts + user), tl.load(bounds + user), candidates + user * CAPACITY
    start, stop = 0, 0
    if SEEN and not RESCUED:
        start, stop = tl.load(seen_offsets + user), tl.load(seen_offsets + user + 1)
    arguments = (count, bound, first, seen, start, stop, best + user * k, rows + user * k, k)
    if count <= CAPACITY // 4:  # as they are, mostly
        enough = _select(*arguments, CAPACITY // 4, BLOCK_K, SEEN, RESCUED)
    else:
        enough = _select(*arguments, CAPACITY, BLOCK_K, SEEN, RESCUED)
    if not enough:
        tl.store(failed + tl.atomic_add(failures, 1), user.to(tl.int32))


@triton.jit
def _select(
    count, bound, first, seen, start, stop, best, rows, k,
    SIZE: tl.constexpr, BLOCK_K: tl.constexpr, SEEN: tl.constexpr, RESCUED: tl.constexpr,
):  # fmt: skip
    """Of one user, from `count` candidates, SIZE at most; whether they are enough to tell."""
    slot = tl.arange(0, SIZE)
    key = tl.load(first + slot, mask=slot < count, other=EMPTY)
    if SEEN and not RESCUED:
        row = ROW_MASK - (key & ROW_MASK)
        key = tl.where(_listed(row, seen, start, stop), EMPTY, key)
    valid = tl.sum((key > EMPTY).to(tl.int32))
    enough = RESCUED or ((count <= SIZE) & ((valid >= k) | (bound == NO_BOUND)))
    if enough:
        taken = tl.minimum(valid, k)
        least = _greatest_bound(tl.where(key > EMPTY, key, tl.max(key)), taken + SIZE - valid, BLOCK_K - taken)
        chosen = (key >= least) & (key > EMPTY)
        tl.debug_barrier()  # the keys are in registers by now: their memory is free
        tl.store(first + tl.cumsum(chosen.to(tl.int32), axis=0) - 1, key, mask=chosen)
        tl.debug_barrier()
        place = tl.arange(0, BLOCK_K)
        kept = place < tl.sum(chosen.to(tl.int32))
        top = tl.sort(tl.load(first + place, mask=kept, other=EMPTY), descending=True)
        bits = (top >> 32).to(tl.int32)
        score = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)
        tl.store(best + place, tl.where(place < taken, score, -float("inf")), mask=place < k)
        tl.store(rows + place, tl.where(place < taken, ROW_MASK - (top & ROW_MASK), -1), mask=place < k)
    return enough


@triton.jit
def rescue_kernel(
    states, table, scales, eligible, seen, seen_offsets, counts, candidates, failed, failures, items, state_stride,
    table_stride, splits,
    CAPACITY: tl.constexpr, WIDTH: tl.constexpr, STEP: tl.constexpr, BLOCK_K: tl.constexpr,
    QUANTISED: tl.constexpr, MASKED: tl.constexpr, SEEN: tl.constexpr,
):  # fmt: skip
    """Exact and slow, for users in `failed`: each split of the table leaves its BLOCK_K best keys as candidates."""
    split = tl.program_id(0) % splits
    for number in range(tl.program_id(0) // splits, tl.load(failures), tl.num_programs(0) // splits):
        user = tl.load(failed + number).to(tl.int64)
        best = tl.full((BLOCK_K,), EMPTY, tl.int64)  # ascending
        for start in range(split * BLOCK_K, items, splits * BLOCK_K):
            row = start + tl.arange(0, BLOCK_K)
            live = row < items
            score = tl.zeros((BLOCK_K,), tl.float32)
            for feature in range(0, WIDTH, STEP):
                column = feature + tl.arange(0, STEP)
                state = tl.load(states + user * state_stride + column, mask=column < WIDTH, other=0).to(tl.float32)
                mask = live[:, None] & (column < WIDTH)[None, :]
                item = tl.load(table + row.to(tl.int64)[:, None] * table_stride + column[None, :], mask=mask, other=0)
                score += tl.sum(item.to(tl.float32) * state[None, :], axis=1)
            if QUANTISED:
                score *= tl.load(scales + row, mask=live, other=0)
            if MASKED:
                live &= tl.load(eligible + row, mask=live, other=0) != 0
            if SEEN:
                row_64 = row.to(tl.int64)
                live &= ~_listed(row_64, seen, tl.load(seen_offsets + user), tl.load(seen_offsets + user + 1))
            key = tl.where(live & (score > -float("inf")), _key(score, row), EMPTY)
            if tl.max(key) > tl.min(best):
                # Of two sorted runs laid head to tail, the greater of each pair are the BLOCK_K greatest of all.
                best = tl.sort(tl.maximum(best, tl.sort(key, descending=True)))
        tl.store(candidates + user * CAPACITY + split * BLOCK_K + tl.arange(0, BLOCK_K), best)
        tl.store(counts + user, splits * BLOCK_K)


@triton.jit(do_not_specialize=["candidates"])
def candidate_kernel(
    states, table, scales, rows, scores, candidates, state_stride, table_stride,
    WIDTH: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr, QUANTISED: tl.constexpr,
):  # fmt: skip
    """Grid (users * blocks). scores [users, candidates] of each user's own rows, -1 for none."""
    blocks = tl.cdiv(candidates, BLOCK)
    user, place = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows + user * candidates + place, mask=place < candidates, other=-1).to(tl.int64)
    live = row >= 0
    score = tl.zeros((BLOCK,), tl.float32)
    for feature in range(0, WIDTH, STEP):
        column = feature + tl.arange(0, STEP)
        state = tl.load(states + user * state_stride + column, mask=column < WIDTH, other=0).to(tl.float32)
        mask = live[:, None] & (column < WIDTH)[None, :]
        item = tl.load(table + row[:, None] * table_stride + column[None, :], mask=mask, other=0)
        score += tl.sum(item.to(tl.float32) * state[None, :], axis=1)
    if QUANTISED:
        score *= tl.load(scales + row, mask=live, other=0)
    score = tl.where(live, score, -float("inf"))
    tl.store(scores + user * candidates + place, score, mask=place < candidates)
