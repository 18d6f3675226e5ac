"""Appending in PTX: one comparison a score and one branch for PACK of them, since one score in hundreds is appended.

As masked Triton operations the same takes 70 instructions a score: 0.95 ms for a million items and 256 users, where the
product takes 0.2 (H100). A second piece of code awaits the atomics' answers: a tile's atomics are under way together.
Waiting for each took 0.12 ms more.
"""

import triton.language as tl

from kernels.sequence_recommendation_interaction.tiles import PACK


def _operands(group: int) -> list[str]:
    """A score's operands, in groups of PACK: results first, then the arguments in order."""
    return [f"${PACK * group + number}" for number in range(PACK)]


def _code(registers: str, lines: list[str]) -> str:
    return "{" + "\n".join([registers, *lines, "done:"]) + "}"


def _take() -> str:
    """slot = take(score, bound, row, items, address of the count): the user's next slot where the bound is reached,
    else -1."""
    slot, score, bound, row, items, count = (_operands(group) for group in range(6))
    lines = [f"mov.b32 {each}, -1;" for each in slot]
    lines.append(f"setp.ge.f32 any, {score[0]}, {bound[0]};")
    lines += [f"setp.ge.or.f32 any, {score[i]}, {bound[i]}, any;" for i in range(1, PACK)]
    lines.append("@!any bra done;")
    for i in range(PACK):
        lines.append(f"setp.ge.f32 hit, {score[i]}, {bound[i]}; setp.lt.and.s32 hit, {row[i]}, {items[i]}, hit;")
        lines.append(f"@hit atom.global.relaxed.gpu.add.u32 {slot[i]}, [{count[i]}], 1;")
    return _code(".reg .pred any, hit;", lines)


def _put() -> str:
    """put(slot, score, row, capacity, address of the first slot): the key into its slot; the result is no use."""
    unused, slot, score, row, capacity, place = (_operands(group) for group in range(6))
    lines = [f"mov.b32 {each}, 0;" for each in unused]
    lines.append(f"setp.lt.u32 any, {slot[0]}, {capacity[0]};")
    lines += [f"setp.lt.or.u32 any, {slot[i]}, {capacity[i]}, any;" for i in range(1, PACK)]
    lines.append("@!any bra done;")
    for i in range(PACK):
        lines.append(f"setp.lt.u32 hit, {slot[i]}, {capacity[i]};")
        lines.append(f"add.f32 value, {score[i]}, 0f00000000; mov.b32 bits, value; shr.s32 sign, bits, 31;")
        lines.append(f"and.b32 sign, sign, 0x7fffffff; xor.b32 bits, bits, sign; not.b32 rest, {row[i]};")
        lines.append(f"mov.b64 key, {{rest, bits}}; mad.wide.u32 address, {slot[i]}, 8, {place[i]};")
        lines.append("@hit st.global.b64 [address], key;")
    registers = ".reg .pred any, hit; .reg .b32 bits, sign, rest; .reg .f32 value; .reg .b64 key, address;"
    return _code(registers, lines)


def _kinds(*kinds: str) -> tl.constexpr:
    return tl.constexpr(",".join(kind for kind in kinds for _ in range(PACK)))


TAKE, TAKE_OPERANDS = tl.constexpr(_take()), _kinds("=r", "f", "f", "r", "r", "l")
PUT, PUT_OPERANDS = tl.constexpr(_put()), _kinds("=r", "r", "f", "r", "r", "l")
