"""Streaming top-k in Triton: a bound from a sample, a pass over the catalogue that keeps what reaches it, a selection.

A candidate is one int64 key: the score's bits, made sortable, above the row's complement. The greatest key is the best
score and, among equals, the lowest row; all keys differ. So the order in which keys arrive does not affect the result.
"""

import triton
import triton.language as tl

from kernels.sequence_recommendation_interaction import tiles
from kernels.sequence_recommendation_interaction.compaction import APPEND, APPEND_OPERANDS, BEGIN, END, THREAD_OPERANDS

PACK = tl.constexpr(tiles.PACK)
EMPTY = tl.constexpr(-(1 << 63))
ROW_MASK = tl.constexpr(0xFFFFFFFF)
NO_BOUND = tl.constexpr(-3.4028234663852886e38)  # the lowest finite float32: a score of -inf does not reach it


@triton.jit
def _sortable_bits(score):
    """Return int32 in the order of float32 scores; the function is its own inverse on bits. -0 and 0 are equal."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _key(score, row):
    return (_sortable_bits(score).to(tl.int64) << 32) | (ROW_MASK - row.to(tl.int64))


@triton.jit
def _scores(state, table, scales, row, valid, stride, D_MODEL: tl.constexpr, QUANTISED: tl.constexpr):
    """Return float32 [users, rows]: state [users, BLOCK_D] times table[row]."""
    column = tl.arange(0, state.shape[1])
    mask = valid[:, None] & (column < D_MODEL)[None, :]
    item = tl.load(table + row.to(tl.int64)[:, None] * stride + column[None, :], mask=mask, other=0)
    score = tl.dot(state, tl.trans(item.to(state.dtype)), input_precision="ieee")
    if QUANTISED:
        score *= tl.load(scales + row, mask=valid, other=0)[None, :]
    return score


@triton.jit
def _load_states(states, user, users, stride, D_MODEL: tl.constexpr, BLOCK_D: tl.constexpr):
    column = tl.arange(0, BLOCK_D)
    mask = (user < users)[:, None] & (column < D_MODEL)[None, :]
    return tl.load(states + user.to(tl.int64)[:, None] * stride + column[None, :], mask=mask, other=0)


@triton.jit
def _bisect_threshold(keys, k, slack):
    """Return the greatest value that at least k keys reach; stop early once k to k + slack keys reach a value."""
    low = tl.min(keys)
    high = tl.max(keys)
    while low < high:
        middle = (low >> 1) + (high >> 1) + ((low | high) & 1)  # rounded up, without overflow
        reached = tl.sum((keys >= middle).to(tl.int32))
        done = (reached >= k) & (reached <= k + slack)
        low = tl.where(reached >= k, middle, low)
        high = tl.where(done, middle, tl.where(reached >= k, high, middle - 1))
    return low


@triton.jit
def _contains(row, seen, start, stop):
    """Whether each row occurs in the ascending seen[start:stop]."""
    low = tl.zeros_like(row) + start
    high = tl.zeros_like(row) + stop
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
    SAMPLE_STRIDE: tl.constexpr, GROUP_SIZE: tl.constexpr, D_MODEL: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_ITEMS: tl.constexpr, BLOCK_USERS: tl.constexpr, QUANTISED: tl.constexpr, HAS_ELIGIBLE: tl.constexpr,
):  # fmt: skip
    """Write maxima [users, groups]: the best score of each GROUP_SIZE sampled rows, one row of every SAMPLE_STRIDE."""
    user = tl.program_id(0) * BLOCK_USERS + tl.arange(0, BLOCK_USERS)
    state = _load_states(states, user, users, state_stride, D_MODEL, BLOCK_D)
    for start in range(tl.program_id(1) * BLOCK_ITEMS, groups * GROUP_SIZE, tl.num_programs(1) * BLOCK_ITEMS):
        sample = start + tl.arange(0, BLOCK_ITEMS)
        # A multiplicative hash picks the row within its stride, so that no period of the table biases the sample.
        row = sample * SAMPLE_STRIDE + ((sample.to(tl.int64) * 2654435761 >> 20) % SAMPLE_STRIDE).to(tl.int32)
        valid = row < items
        score = _scores(state, table, scales, row, valid, table_stride, D_MODEL, QUANTISED)
        if HAS_ELIGIBLE:
            valid &= tl.load(eligible + row, mask=valid, other=0) != 0
        score = tl.where(valid[None, :], score, -float("inf"))
        best = tl.max(tl.reshape(score, (BLOCK_USERS, BLOCK_ITEMS // GROUP_SIZE, GROUP_SIZE)), axis=2)
        group = start // GROUP_SIZE + tl.arange(0, BLOCK_ITEMS // GROUP_SIZE)
        pointers = maxima + user.to(tl.int64)[:, None] * groups + group[None, :]
        tl.store(pointers, best, mask=(user < users)[:, None] & (group < groups)[None, :])


@triton.jit(do_not_specialize=["groups", "k"])
def bound_kernel(
    maxima, seen_offsets, bounds, groups, k, max_rank,
    SAMPLE_STRIDE: tl.constexpr, BLOCK: tl.constexpr, HAS_SEEN: tl.constexpr,
):  # fmt: skip
    """Write bounds [users]: a score that at least k items reach and few more do; NO_BOUND if the sample has too few.

    With seen rows the rank grows by the fraction of them that a sample contains.
    """
    user = tl.program_id(0)
    rank = k
    if HAS_SEEN:
        seen = (tl.load(seen_offsets + user + 1) - tl.load(seen_offsets + user)).to(tl.int32)
        rank = k + seen // SAMPLE_STRIDE + seen // (4 * SAMPLE_STRIDE) + 8 * (seen > 0).to(tl.int32)
        rank = tl.minimum(rank, max_rank)
    group = tl.arange(0, BLOCK)
    best = tl.load(maxima + user.to(tl.int64) * groups + group, mask=group < groups, other=-float("inf"))
    key = _sortable_bits(tl.where(best == best, best, -float("inf")))
    low = _bisect_threshold(key, rank, rank // 16)
    bits = tl.where(low < 0, low ^ 0x7FFFFFFF, low)
    tl.store(bounds + user, tl.maximum(bits.to(tl.float32, bitcast=True), NO_BOUND))


@triton.jit
def _run_per_thread(code: tl.constexpr, capacity):
    """Run the inline code once per thread: a warp has more threads than the tensor has elements."""
    operand = tl.zeros([16], tl.int32) + capacity
    tl.inline_asm_elementwise(code, THREAD_OPERANDS, [operand], tl.int32, False, 1)  # pyright: ignore[reportArgumentType]: constants of a kernel


@triton.jit
def _append(score, bound, row, items, counter, first_slot, CAPACITY: tl.constexpr, USE_PTX: tl.constexpr):
    """Store the key of each score [users, rows] that reaches its user's bound in that user's next slot, while there are
    any. With USE_PTX the store is delayed, see compaction.py."""
    if USE_PTX:
        arguments = [score, bound, row, items, counter.to(tl.int64), first_slot.to(tl.int64), CAPACITY]
        tl.inline_asm_elementwise(APPEND, APPEND_OPERANDS, arguments, tl.int32, False, PACK)  # pyright: ignore[reportArgumentType]: constants of a kernel
    else:
        reached = (score >= bound) & (row < items)
        slot = tl.atomic_add(tl.broadcast_to(counter, reached.shape), 1, mask=reached, sem="relaxed")
        tl.store(first_slot + slot, _key(score, row), mask=reached & (slot < CAPACITY))


@triton.jit(do_not_specialize=["users"])
def filter_kernel(
    states, table, scales, eligible, bounds, counts, candidates, users, items, state_stride, table_stride,
    CAPACITY: tl.constexpr, D_MODEL: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_ITEMS: tl.constexpr,
    BLOCK_USERS: tl.constexpr, QUANTISED: tl.constexpr, HAS_ELIGIBLE: tl.constexpr, USE_PTX: tl.constexpr,
):  # fmt: skip
    """Append every score that reaches its user's bound to that user's candidates, in one pass over the table."""
    user = tl.program_id(0) * BLOCK_USERS + tl.arange(0, BLOCK_USERS)
    valid_user = user < users
    state = _load_states(states, user, users, state_stride, D_MODEL, BLOCK_D)
    bound = tl.load(bounds + user, mask=valid_user, other=float("inf"))
    counter = (counts + user)[:, None]
    first_slot = (candidates + user.to(tl.int64) * CAPACITY)[:, None]
    if USE_PTX:
        _run_per_thread(BEGIN, CAPACITY)
    for start in range(tl.program_id(1) * BLOCK_ITEMS, items, tl.num_programs(1) * BLOCK_ITEMS):
        row = start + tl.arange(0, BLOCK_ITEMS)
        valid = row < items
        score = _scores(state, table, scales, row, valid, table_stride, D_MODEL, QUANTISED)
        if HAS_ELIGIBLE:
            valid &= tl.load(eligible + row, mask=valid, other=0) != 0
            score = tl.where(valid[None, :], score, float("nan"))  # a NaN reaches no bound
        _append(score, bound[:, None], row[None, :], items, counter, first_slot, CAPACITY, USE_PTX)
    if USE_PTX:
        _run_per_thread(END, CAPACITY)


@triton.jit(do_not_specialize=["k"])
def select_kernel(
    bounds, counts, candidates, seen, seen_offsets, overflow_users, overflow_count, best, rows, k,
    CAPACITY: tl.constexpr, BLOCK_K: tl.constexpr, HAS_SEEN: tl.constexpr, OVERFLOW: tl.constexpr,
):  # fmt: skip
    """Write the k greatest keys of each user's candidates, sorted. A user whose candidates may lack one of them is
    added to `overflow_users`.

    OVERFLOW: only the users in `overflow_users`, whose candidates are complete.
    """
    user = tl.program_id(0).to(tl.int64)
    if OVERFLOW:
        if user >= tl.load(overflow_count):
            return
        user = tl.load(overflow_users + user).to(tl.int64)
    count = tl.load(counts + user)
    bound = tl.load(bounds + user)
    first_slot = candidates + user * CAPACITY
    start = 0
    stop = 0
    if HAS_SEEN and not OVERFLOW:
        start = tl.load(seen_offsets + user)
        stop = tl.load(seen_offsets + user + 1)
    arguments = (count, bound, first_slot, seen, start, stop, best + user * k, rows + user * k, k)
    if count <= CAPACITY // 4:  # the usual case
        complete = _select(*arguments, CAPACITY // 4, BLOCK_K, HAS_SEEN, OVERFLOW)
    else:
        complete = _select(*arguments, CAPACITY, BLOCK_K, HAS_SEEN, OVERFLOW)
    if not complete:
        tl.store(overflow_users + tl.atomic_add(overflow_count, 1), user.to(tl.int32))


@triton.jit
def _select(
    count, bound, first_slot, seen, start, stop, best, rows, k,
    SIZE: tl.constexpr, BLOCK_K: tl.constexpr, HAS_SEEN: tl.constexpr, OVERFLOW: tl.constexpr,
):  # fmt: skip
    """Select one user's best from `count` candidates, of which SIZE are read; return whether they are complete."""
    slot = tl.arange(0, SIZE)
    key = tl.load(first_slot + slot, mask=slot < count, other=EMPTY)
    if HAS_SEEN and not OVERFLOW:
        row = ROW_MASK - (key & ROW_MASK)
        key = tl.where(_contains(row, seen, start, stop), EMPTY, key)
    num_valid = tl.sum((key > EMPTY).to(tl.int32))
    complete = OVERFLOW or ((count <= SIZE) & ((num_valid >= k) | (bound == NO_BOUND)))
    if complete:
        num_results = tl.minimum(num_valid, k)
        # Empty keys count as the greatest one, which adds SIZE - num_valid to the rank.
        filled = tl.where(key > EMPTY, key, tl.max(key))
        threshold = _bisect_threshold(filled, num_results + SIZE - num_valid, BLOCK_K - num_results)
        chosen = (key >= threshold) & (key > EMPTY)
        tl.debug_barrier()  # all keys are in registers now: their memory may be overwritten
        tl.store(first_slot + tl.cumsum(chosen.to(tl.int32), axis=0) - 1, key, mask=chosen)
        tl.debug_barrier()
        rank = tl.arange(0, BLOCK_K)
        is_chosen = rank < tl.sum(chosen.to(tl.int32))
        top = tl.sort(tl.load(first_slot + rank, mask=is_chosen, other=EMPTY), descending=True)
        bits = (top >> 32).to(tl.int32)
        score = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)
        tl.store(best + rank, tl.where(rank < num_results, score, -float("inf")), mask=rank < k)
        tl.store(rows + rank, tl.where(rank < num_results, ROW_MASK - (top & ROW_MASK), -1), mask=rank < k)
    return complete


@triton.jit
def overflow_kernel(
    states, table, scales, eligible, seen, seen_offsets, counts, candidates, overflow_users, overflow_count, items,
    state_stride, table_stride, splits,
    CAPACITY: tl.constexpr, D_MODEL: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    QUANTISED: tl.constexpr, HAS_ELIGIBLE: tl.constexpr, HAS_SEEN: tl.constexpr,
):  # fmt: skip
    """Replace the candidates of `overflow_users`, exactly and slowly, by the BLOCK_K best keys of each split of the
    table."""
    split = tl.program_id(0) % splits
    for index in range(tl.program_id(0) // splits, tl.load(overflow_count), tl.num_programs(0) // splits):
        user = tl.load(overflow_users + index).to(tl.int64)
        best = tl.full((BLOCK_K,), EMPTY, tl.int64)  # ascending
        for start in range(split * BLOCK_K, items, splits * BLOCK_K):
            row = start + tl.arange(0, BLOCK_K)
            valid = row < items
            score = tl.zeros((BLOCK_K,), tl.float32)
            for first in range(0, D_MODEL, BLOCK_D):
                column = first + tl.arange(0, BLOCK_D)
                state = tl.load(states + user * state_stride + column, mask=column < D_MODEL, other=0).to(tl.float32)
                mask = valid[:, None] & (column < D_MODEL)[None, :]
                item = tl.load(table + row.to(tl.int64)[:, None] * table_stride + column[None, :], mask=mask, other=0)
                score += tl.sum(item.to(tl.float32) * state[None, :], axis=1)
            if QUANTISED:
                score *= tl.load(scales + row, mask=valid, other=0)
            if HAS_ELIGIBLE:
                valid &= tl.load(eligible + row, mask=valid, other=0) != 0
            if HAS_SEEN:
                row_64 = row.to(tl.int64)
                valid &= ~_contains(row_64, seen, tl.load(seen_offsets + user), tl.load(seen_offsets + user + 1))
            key = tl.where(valid & (score > -float("inf")), _key(score, row), EMPTY)
            if tl.max(key) > tl.min(best):
                # Of an ascending and a descending run, the greater of each pair are the BLOCK_K greatest of both.
                best = tl.sort(tl.maximum(best, tl.sort(key, descending=True)))
        tl.store(candidates + user * CAPACITY + split * BLOCK_K + tl.arange(0, BLOCK_K), best)
        tl.store(counts + user, splits * BLOCK_K)


@triton.jit(do_not_specialize=["candidates"])
def candidate_kernel(
    states, table, scales, rows, scores, candidates, state_stride, table_stride,
    D_MODEL: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, QUANTISED: tl.constexpr,
):  # fmt: skip
    """Write scores [users, candidates] of each user's own rows, -1 for none. Grid (users * blocks)."""
    blocks = tl.cdiv(candidates, BLOCK)
    user = (tl.program_id(0) // blocks).to(tl.int64)
    candidate = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows + user * candidates + candidate, mask=candidate < candidates, other=-1).to(tl.int64)
    valid = row >= 0
    score = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, D_MODEL, BLOCK_D):
        column = first + tl.arange(0, BLOCK_D)
        state = tl.load(states + user * state_stride + column, mask=column < D_MODEL, other=0).to(tl.float32)
        mask = valid[:, None] & (column < D_MODEL)[None, :]
        item = tl.load(table + row[:, None] * table_stride + column[None, :], mask=mask, other=0)
        score += tl.sum(item.to(tl.float32) * state[None, :], axis=1)
    if QUANTISED:
        score *= tl.load(scales + row, mask=valid, other=0)
    score = tl.where(valid, score, -float("inf"))
    tl.store(scores + user * candidates + candidate, score, mask=candidate < candidates)
