"""Appending in PTX: one comparison per score and one branch per PACK of them, since one score in hundreds is appended.

As masked Triton operations the same takes 70 instructions per score, and the pass over a million items for 256 users
0.95 instead of 0.27 ms (H100). The slot of a candidate is the result of an atomic, for which no thread waits: it keeps
its latest candidate in registers of its own and stores it when it finds the next one, tiles later, or at the end.
"""

import triton.language as tl

from kernels.sequence_recommendation_interaction.tiles import PACK

# The registers are declared for the entire function, outside of braces, and so keep their values from tile to tile. A
# slot of -1 is beyond every capacity: nothing is pending.
# NOTE: no document promises that inline code finds its registers again. A compiler that drops them, or that duplicates
# or reorders the code, loses candidates; so results are compared with torch's before a model serves on a GPU
# (`check_fused_retrieval` in pipeline/strategies/retrieval.py).
_DECLARE = ".reg .b32 pending_slot; .reg .b64 pending_key, pending_first; mov.b32 pending_slot, -1; mov.b32 $0, 0;"


def _store_pending(capacity: str) -> str:
    """Return PTX that stores the pending key in its slot, if that is within the user's capacity."""
    return (
        f"setp.lt.u32 fits, pending_slot, {capacity}; mad.wide.u32 address, pending_slot, 8, pending_first; "
        "@fits st.global.b64 [address], pending_key;"
    )


def _append() -> str:
    """Return PTX of append(score, bound, row, items, address of the count, address of the first slot, capacity).

    It puts the key of a score that reaches the bound into the user's next slot. Its result is unused.
    """
    unused, score, bound, row, items, count, first, capacity = (
        [f"${PACK * operand + number}" for number in range(PACK)] for operand in range(8)
    )
    lines = [f"setp.ge.f32 any, {score[0]}, {bound[0]};"]
    lines += [f"setp.ge.or.f32 any, {score[i]}, {bound[i]}, any;" for i in range(1, PACK)]
    lines.append("@!any bra done;")
    for i in range(PACK):
        lines.append(f"setp.ge.f32 hit, {score[i]}, {bound[i]}; setp.lt.and.s32 hit, {row[i]}, {items[i]}, hit;")
        lines.append(f"@!hit bra next{i}; {_store_pending(capacity[i])}")
        lines.append(f"add.f32 value, {score[i]}, 0f00000000; mov.b32 bits, value; shr.s32 sign, bits, 31;")
        lines.append(f"and.b32 sign, sign, 0x7fffffff; xor.b32 bits, bits, sign; not.b32 rest, {row[i]};")
        lines.append(f"mov.b64 pending_key, {{rest, bits}}; mov.b64 pending_first, {first[i]};")
        lines.append(f"atom.global.relaxed.gpu.add.u32 pending_slot, [{count[i]}], 1; next{i}:")
    registers = ".reg .pred any, hit, fits; .reg .b32 bits, sign, rest; .reg .f32 value; .reg .b64 address;"
    results = [f"mov.b32 {result}, 0;" for result in unused]  # last: they may share registers with the arguments
    return "{" + "\n".join([registers, *lines, "done:", *results]) + "}"


def _constraints(*kinds: str) -> tl.constexpr:
    return tl.constexpr(",".join(kind for kind in kinds for _ in range(PACK)))


BEGIN = tl.constexpr(_DECLARE)
APPEND = tl.constexpr(_append())
APPEND_OPERANDS = _constraints("=r", "f", "f", "r", "r", "l", "l", "r")
END = tl.constexpr("{.reg .pred fits; .reg .b64 address; " + _store_pending("$1") + " mov.b32 $0, 0;}")
THREAD_OPERANDS = tl.constexpr("=r,r")  # of BEGIN and END: an unused result, and the capacity
