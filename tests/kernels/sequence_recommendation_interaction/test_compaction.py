"""The inline code of compaction.py without a GPU: one thread of it in a small PTX interpreter, and the PTX that Triton
compiles the pass to."""

import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from struct import pack, unpack

import pytest
import torch
import triton
import triton.language as tl
from triton.backends import backends

from kernels.sequence_recommendation_interaction.compaction import APPEND, BEGIN, END
from kernels.sequence_recommendation_interaction.kernel import _key
from kernels.sequence_recommendation_interaction.tiles import PACK, TILES

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STATEMENT = re.compile(r"(?:@(!?)(\w+) )?([\w.]+) (.+)")
FORMATS = {"f32": "f", "s32": "i", "u32": "I", "b32": "I", "b64": "Q"}
OPERATIONS = {
    "setp.ge.f32": lambda a, b: a >= b,
    "setp.ge.or.f32": lambda a, b, before: a >= b or before != 0,
    "setp.lt.and.s32": lambda a, b, before: a < b and before != 0,
    "setp.lt.u32": lambda a, b: a < b,
    "mad.wide.u32": lambda a, b, c: a * b + c,
    "add.f32": lambda a, b: to_bits(a + b),
    "shr.s32": lambda a, b: a >> b & 0xFFFFFFFF,
    "and.b32": lambda a, b: a & b,
    "xor.b32": lambda a, b: a ^ b,
    "not.b32": lambda a: a ^ 0xFFFFFFFF,
    "mov.b32": lambda a: a,
    "mov.b64": lambda low, high=0: low | high << 32,
}


def to_bits(score: float) -> int:
    return unpack("I", pack("f", score))[0]


def read_operand(registers: dict[str, int], kind: str, word: str) -> float:
    """Read a register, which holds bits, as the instruction's type. Addresses are below 2^32 here."""
    bits = registers[word] if word in registers else int(word.replace("0f", "0x"), 0)
    return unpack(FORMATS[kind], pack("Q", bits % (1 << 64))[: 8 if kind == "b64" else 4])[0]


def run_ptx(text: str, registers: dict[str, int], memory: dict[int, int], *operands: int) -> None:
    """Run the subset of PTX that compaction.py uses, as one thread does."""
    registers.update((f"${number}", bits) for number, bits in enumerate(operands))
    statements = [part.strip() for part in re.split(r"[;\n]", re.sub(r"^{|}$", "", text)) if part.strip()]
    position = 0
    while position < len(statements):
        parsed = STATEMENT.fullmatch(statements[position])
        position += 1
        if parsed is None or parsed[3] == ".reg" or (parsed[2] and bool(registers[parsed[2]]) == bool(parsed[1])):
            continue  # a label, a declaration, or an instruction whose predicate is false
        target, *sources = re.findall(r"[^\s,\[\]{}]+", parsed[4])
        read = partial(read_operand, registers, parsed[3].rsplit(".")[-1])
        match parsed[3]:
            case "bra":
                position = statements.index(f"{target}:")
            case "st.global.b64":
                assert registers[target] not in memory
                memory[registers[target]] = int(read(sources[0]))
            case "atom.global.relaxed.gpu.add.u32":
                address = registers[sources[0]]
                registers[target] = memory[address]
                memory[address] += int(read(sources[1]))
            case name:
                registers[target] = int(OPERATIONS[name](*map(read, sources)))


@triton.jit
def key_kernel(scores, rows, keys, COUNT: tl.constexpr):
    index = tl.arange(0, COUNT)
    tl.store(keys + index, _key(tl.load(scores + index), tl.load(rows + index)))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("capacity", [3, 1000])
def test_thread_stores_each_score_that_reaches_its_bound_once_within_the_capacity(seed: int, capacity: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    steps = 64
    items = 200
    users = 2
    scores = torch.randint(-3, 4, (steps, PACK), generator=rng) * 0.75
    scores[torch.rand(steps, PACK, generator=rng) < 0.1] = -0.0
    scores[torch.rand(steps, PACK, generator=rng) < 0.8] = -9.0  # most packs have no score to append, or one
    scores[0, :4] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e-45])
    rows = torch.randint(0, items + 20, (steps, PACK), generator=rng, dtype=torch.int32)
    bounds = [0.0, -0.75]
    first_slots = [1 << 20, 1 << 21]
    counters = [64, 68]
    owners = [0, 1, 0, 1, 1, 1, 0, 0]  # of a pack's scores
    registers = dict.fromkeys(("pending_key", "pending_first"), 99)  # PTX leaves them undefined
    memory = {counters[0]: 0, counters[1]: 1}  # another thread has appended a candidate for the second user
    bound, counter, first_slot = ([column[owner] for owner in owners] for column in (bounds, counters, first_slots))
    run_ptx(BEGIN.value, registers, memory, 0)
    for score, row in zip(scores.tolist(), rows.tolist(), strict=True):
        floats = map(to_bits, [*score, *bound])
        operands = [*[0] * PACK, *floats, *row, *[items] * PACK, *counter, *first_slot, *[capacity] * PACK]
        run_ptx(APPEND.value, registers, memory, *operands)
    run_ptx(END.value, registers, memory, 0, capacity)
    keys = torch.empty(steps * PACK, dtype=torch.int64, device=DEVICE)
    key_kernel[(1,)](scores.flatten().to(DEVICE), rows.flatten().to(DEVICE), keys, COUNT=steps * PACK)
    for user in range(users):
        own = torch.tensor(owners).repeat(steps) == user
        reached = own & (scores.flatten() >= bounds[user]) & (rows.flatten() < items)
        expected = [key % (1 << 64) for key in keys.cpu()[reached].tolist()][: capacity - user]
        assert memory.pop(counters[user]) == reached.sum() + user
        assert [memory.pop(first_slots[user] + 8 * slot) for slot in range(user, user + len(expected))] == expected
    assert not memory


COMPILE = """
from triton import compile, knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels.sequence_recommendation_interaction.kernel import filter_kernel
from kernels.sequence_recommendation_interaction.tiles import TILES

try:
    knobs.nvidia.ptxas
except RuntimeError:
    raise SystemExit(77)
tiles = TILES[(9, 0), 2, 256, True]
constants = dict(CAPACITY=8192, D_MODEL=256, BLOCK_D=256, BLOCK_ITEMS=tiles.block_items, BLOCK_USERS=tiles.block_users,
                 QUANTISED=False, HAS_ELIGIBLE=False, USE_PTX=True)
types = dict(states="*bf16", table="*bf16", scales="*bf16", eligible="*bf16", bounds="*fp32", counts="*i32",
             candidates="*i64", users="i32", items="i32", state_stride="i32", table_stride="i32")
names = filter_kernel.arg_names
aligned = [name for name in types if types[name].startswith("*") or name.endswith("stride")]
source = ASTSource(
    filter_kernel, {name: types.get(name, "constexpr") for name in names},
    {(names.index(name),): value for name, value in constants.items()},
    {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
)
options = dict(num_warps=tiles.warps, num_stages=tiles.stages)
print(compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"])
"""


@pytest.mark.skipif("nvidia" not in backends, reason="Triton without NVIDIA's backend")
def test_compiled_pass_begins_once_appends_its_packs_and_ends_once(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    compiled = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=120
    )
    if compiled.returncode == 77:
        pytest.skip("no ptxas")
    assert compiled.returncode == 0, compiled.stderr
    ptx = compiled.stdout
    tiles = TILES[(9, 0), 2, 256, True]
    scores_per_thread = tiles.block_items * tiles.block_users // (32 * tiles.warps)
    loop = re.findall(r"bra\s+(\$L\w+);", ptx)[-1]
    before, rest = ptx.split(f"\n{loop}:")
    inside, after = rest.rsplit(f"{loop};", 1)
    store = "st.global.b64 [address], pending_key;"
    assert ptx.count(".reg .b32 pending_slot") == before.count("mov.b32 pending_slot, -1;") == 1
    assert before.count(store) == 0
    assert inside.count(store) == inside.count("atom.global") == scores_per_thread
    assert inside.count("@!any bra done;") == scores_per_thread // PACK
    assert after.count(store) == 1


def test_results_are_written_after_all_operands_have_been_read() -> None:
    """They may share a register."""
    last = max(APPEND.value.rindex(f"${operand}") for operand in range(PACK, 8 * PACK))
    assert all(APPEND.value.index(f"mov.b32 ${result}, 0;") > last for result in range(PACK))
