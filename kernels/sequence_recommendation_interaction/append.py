"""Appending in PTX: one comparison a score and one branch for PACK of them, since one score in hundreds is appended.

As masked Triton operations the same takes 70 instructions a score: 0.95 ms for a million items and 256 users, where the
product takes 0.2 (H100). A candidate's place is an atomic's answer, and nobody waits for it: what a thread finds in a
tile stays in its registers; after the tile the whole warp asks for places, and after the next one it stores.
"""

import triton.language as tl

from kernels.sequence_recommendation_interaction.tiles import PACK

# Declared for the whole function, outside of braces: these registers keep their values from tile to tile. A user of -1:
# nothing was found; a slot of -1, beyond every capacity: nothing waits.
_DECLARED = """
.reg .b32 found_user, waiting_user, waiting_slot; .reg .b64 found_key, waiting_key;
mov.b32 found_user, -1; mov.b32 waiting_slot, -1; mov.b32 $0, 0;"""

_REGISTERS = ".reg .pred any, hit, on; .reg .b32 place, bits, sign, rest; .reg .f32 value; .reg .b64 address;"


def _asked(counts: str, candidates: str, capacity: str) -> str:
    """What waits goes to its slot, if its user has so many; what was found asks for one, and waits."""
    return f"""
setp.lt.u32 on, waiting_slot, {capacity};
@on mad.lo.u32 place, waiting_user, {capacity}, waiting_slot; @on mad.wide.u32 address, place, 8, {candidates};
@on st.global.b64 [address], waiting_key;
setp.ge.s32 on, found_user, 0; mov.b32 waiting_slot, -1; mov.b64 waiting_key, found_key;
mov.b32 waiting_user, found_user; mov.b32 found_user, -1;
@on mad.wide.u32 address, waiting_user, 4, {counts};
@on atom.global.relaxed.gpu.add.u32 waiting_slot, [address], 1;"""


def _find() -> str:
    """find(score, bound, row, items, user, counts, candidates, capacity): keeps the key of a score that reaches the
    bound; a second one of the same thread waits for the first. The result is no use."""
    unused, score, bound, row, items, user, counts, candidates, capacity = (
        [f"${PACK * operand + number}" for number in range(PACK)] for operand in range(9)
    )
    lines = [f"mov.b32 {each}, 0;" for each in unused]
    lines.append(f"setp.ge.f32 any, {score[0]}, {bound[0]};")
    lines += [f"setp.ge.or.f32 any, {score[i]}, {bound[i]}, any;" for i in range(1, PACK)]
    lines.append("@!any bra done;")
    for i in range(PACK):
        lines.append(f"""
setp.ge.f32 hit, {score[i]}, {bound[i]}; setp.lt.and.s32 hit, {row[i]}, {items[i]}, hit;
@!hit bra next{i};
setp.lt.s32 on, found_user, 0;
@on bra first{i}; {_asked(counts[i], candidates[i], capacity[i])}
first{i}:
add.f32 value, {score[i]}, 0f00000000; mov.b32 bits, value; shr.s32 sign, bits, 31; and.b32 sign, sign, 0x7fffffff;
xor.b32 bits, bits, sign; not.b32 rest, {row[i]}; mov.b64 found_key, {{rest, bits}}; mov.b32 found_user, {user[i]};
next{i}:""")
    return "\n".join(["{", _REGISTERS, *lines, "done:", "}"])


def _kinds(*kinds: str) -> tl.constexpr:
    return tl.constexpr(",".join(kind for kind in kinds for _ in range(PACK)))


BEGIN, BEGIN_OPERANDS = tl.constexpr(_DECLARED), tl.constexpr("=r,r")
FIND, FIND_OPERANDS = tl.constexpr(_find()), _kinds("=r", "f", "f", "r", "r", "r", "l", "l", "r")
ASK = tl.constexpr("{" + _REGISTERS + _asked("$2", "$3", "$4") + " mov.b32 $0, 0;}")
ASK_OPERANDS = tl.constexpr("=r,r,l,l,r")
