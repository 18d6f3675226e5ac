"""The product before attention, `projection.project_in`, for Hopper in CuTe DSL.

A program keeps one panel of W, 128 columns of all depths, in shared memory for its whole life, and the rows of x stream
past it: nothing else is read twice. Warps have roles. One loads. The others, in groups of four, take tiles of rows by
turns: while one group multiplies the others scale, activate and store theirs, so that the matrix units need not wait.
"""

from functools import cache
from threading import Lock
from typing import Any

import cuda.bindings.driver as cuda
import cutlass  # type: ignore[import-not-found]  # a package for NVIDIA GPUs alone
import torch
from cutlass import BFloat16, Constexpr, Float32, Int32, cute  # type: ignore[import-not-found]  # as above
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warp, warpgroup  # type: ignore[import-not-found]  # as above
from cutlass.utils import LayoutEnum, SmemAllocator, hopper_helpers  # type: ignore[import-not-found]  # as above
from torch import Tensor

from kernels.launch import device_of

# Swept by editing these (docs/adr/0002), 74,108 rows, 8 layers, one H100: 2.05 ms as it stands; with four groups 2.07;
# two, of 128 rows, 2.14; three with a depth of 64, so with barriers twice as often, 2.48.
ROWS, COLUMNS, DEPTH = 64, 128, 128  # a tile, and what a stage holds of its inner side
GROUPS, STAGES, BUFFERS = 3, 4, 1  # that multiply, blocks of x ahead, pieces a group has on their way out
REGISTERS, LOADER_REGISTERS = 160, 32  # a thread: (3 x 160 + 32) x 128 are all that a multiprocessor has
PIECE = 64  # rows and columns that leave together, 128 bytes a row
THREADS = 128  # of a group
TURN, STORED = 1, 1 + GROUPS  # named barriers, one a group each
WIDTH = 512  # of x: its panel of W takes 128 KiB of the 227
COMPILER = Lock()  # NOTE: of two compilations at a time one fails


@cute.jit
def load(x_from: Any, x_to: Any, x_atom: Any, weight_from: Any, weight_to: Any, weight_atom: Any, bars: Any,
         panel_bars: Any, tile0: Int32, tiles: Int32, step: Int32) -> None:  # fmt: skip
    """One warp. A block of the panel goes ahead of the first block of x that meets it."""
    full, empty, at = bars, bars + STAGES, Int32(0)
    for tile in cutlass.range(tile0, tiles, step, unroll=1):
        for block in cutlass.range(WIDTH // DEPTH, unroll=1):
            if at < WIDTH // DEPTH:
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive_and_expect_tx(panel_bars + block, COLUMNS * DEPTH * 2)
                cute.copy(weight_atom, weight_from[None, block], weight_to[None, block], tma_bar_ptr=panel_bars + block)
            stage = at % STAGES
            cute.arch.mbarrier_wait(empty + stage, 1 - at // STAGES % 2)
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(full + stage, ROWS * DEPTH * 2)
            cute.copy(x_atom, x_from[None, tile, block], x_to[None, stage], tma_bar_ptr=full + stage)
            at += 1


@cute.jit
def multiply(mma: Any, product: Any, x_parts: Any, panel_parts: Any, bars: Any, panel_bars: Any, first: Int32,
             next_group: Int32) -> None:  # fmt: skip
    """Adds the tile's product to `product`; the last block may still run. first: blocks of x that came before."""
    full, empty = bars, bars + STAGES
    mma.set(warpgroup.Field.ACCUMULATE, True)
    warpgroup.fence()
    for block in cutlass.range(WIDTH // DEPTH, unroll=1):
        at = first + block
        stage = at % STAGES
        cute.arch.mbarrier_wait(panel_bars + block, 0)
        cute.arch.mbarrier_wait(full + stage, at // STAGES % 2)
        for k in cutlass.range_constexpr(DEPTH // 16):
            cute.gemm(mma, product, x_parts[None, None, k, stage], panel_parts[None, None, k, block], product)
        warpgroup.commit_group()
        if block == WIDTH // DEPTH - 1:
            cute.arch.barrier_arrive(barrier_id=TURN + next_group, number_of_threads=2 * THREADS)
        warpgroup.wait_group(1)
        if block > 0:
            release(empty + (at - 1) % STAGES)


@cute.jit
def release(empty: Any) -> None:
    """A warp no longer needs a stage."""
    with cute.arch.elect_one():
        cute.arch.mbarrier_arrive(empty)


@cute.jit
def normalisation(moments: Any, eps: Float32) -> Any:
    """Half the reciprocal deviation of a row, and minus the mean times that; moments: sums and sums of squares of its
    parts, by turns."""
    total, squares = Float32(0), Float32(0)
    for part in cutlass.range_constexpr(cute.size(moments) // 2):
        total += moments[2 * part]
        squares += moments[2 * part + 1]
    mean = total * (1 / WIDTH)
    variance = cute.arch.fmax(squares * (1 / WIDTH) - mean * mean, 0.0)
    scale = 0.5 * cute.math.rsqrt(variance + eps, fastmath=True)
    return scale, -mean * scale


@cute.jit
def activate(product: Any, moments: Any, columns_s: Any, half: Constexpr, side: Constexpr, lane: Int32,
             eps: Float32) -> None:  # fmt: skip
    """In place, a piece of the tile: SiLU(2 h) = h tanh(h) + h. moments: of the two rows that a thread has in it."""
    scale, offset = cute.make_rmem_tensor(2, Float32), cute.make_rmem_tensor(2, Float32)
    for r in cutlass.range_constexpr(2):
        scale[r], offset[r] = normalisation(moments[None, r, half], eps)
    for i in cutlass.range_constexpr(side * PIECE // 8, (side + 1) * PIECE // 8):
        columns = cute.make_rmem_tensor(4, Float32)  # the sums of two columns, then half their biases
        cute.autovec_copy(columns_s[None, i * 4 + lane % 4], columns)
        for r in cutlass.range_constexpr(2):
            for c in cutlass.range_constexpr(2):
                at = ((c, r, i), half, 0)
                h = product[at] * scale[r] + (columns[c] * offset[r] + columns[2 + c])
                product[at] = cute.math.tanh(h, fastmath=True) * h + h


@cute.jit
def work(mma: Any, x_s: Any, panel_s: Any, out_s: Any, out_atom: Any, out: Any, moments: Any, columns_s: Any,
         eps: Float32, bars: Any, panel_bars: Any, thread: Int32, group: Int32, panel: Int32, tile0: Int32,
         tiles: Int32, step: Int32) -> None:  # fmt: skip
    """A group of four warps: every n-th tile of the program's."""
    part, lane = mma.get_slice(0), thread % 32
    x_parts, panel_parts = mma.make_fragment_A(part.partition_A(x_s)), mma.make_fragment_B(part.partition_B(panel_s))
    product = cute.make_rmem_tensor(part.partition_shape_C((ROWS, COLUMNS)), Float32)  # ((2, 2, 16), halves, 1)
    store_atom = cute.make_copy_atom(warp.StMatrix8x8x16bOp(False, 4), BFloat16)
    storing = cute.make_tiled_copy_S(store_atom, cute.make_tiled_copy_C_atom(store_atom, mma))
    out_to, values = storing.get_slice(thread).partition_D(out_s), storing.retile(product)
    piece = cute.make_rmem_tensor(out_to.shape[:3], BFloat16)
    out_from, out_at = cpasync.tma_partition(
        out_atom, 0, cute.make_layout(1), cute.group_modes(out_s, 0, 2),
        cute.group_modes(cute.local_tile(out, (PIECE, PIECE), (None, None)), 0, 2),
    )  # fmt: skip
    own = cute.make_rmem_tensor((moments.shape[1], 2, ROWS // 64), Float32)  # of the rows that a thread has a part of

    if group == GROUPS - 1:
        cute.arch.barrier_arrive(barrier_id=TURN, number_of_threads=2 * THREADS)
    first = group * (WIDTH // DEPTH)
    for tile in cutlass.range(tile0 + group * step, tiles, GROUPS * step, unroll=1):
        for half in cutlass.range_constexpr(ROWS // 64):
            for r in cutlass.range_constexpr(2):
                row = tile * ROWS + half * 64 + thread // 32 * 16 + lane // 4 + r * 8
                cute.autovec_copy(moments[cutlass.min(row, moments.shape[0] - 1), None], own[None, r, half])
        product.fill(0.0)

        cute.arch.barrier(barrier_id=TURN + group, number_of_threads=2 * THREADS)
        multiply(mma, product, x_parts, panel_parts, bars, panel_bars, first, (group + 1) % GROUPS)
        warpgroup.wait_group(0)
        first += GROUPS * (WIDTH // DEPTH)
        release(bars + STAGES + (first - (GROUPS - 1) * (WIDTH // DEPTH) - 1) % STAGES)

        for half in cutlass.range_constexpr(ROWS // 64):
            for side in cutlass.range_constexpr(COLUMNS // PIECE):
                activate(product, own, columns_s, half, side, lane, eps)
                for i in cutlass.range_constexpr(cute.size(piece)):
                    piece[i] = values[(half * 2 + side) * cute.size(piece) + i].to(BFloat16)
                buffer = group * BUFFERS + side % BUFFERS
                if thread < 32:
                    cute.arch.cp_async_bulk_wait_group(BUFFERS - 1, read=True)
                cute.arch.barrier(barrier_id=STORED + group, number_of_threads=THREADS)
                cute.copy(storing, piece, out_to[None, None, None, buffer])
                cute.arch.fence_proxy("async.shared", space="cta")
                cute.arch.barrier(barrier_id=STORED + group, number_of_threads=THREADS)
                if thread < 32:
                    at = (None, tile * (ROWS // 64) + half, panel * (COLUMNS // PIECE) + side)
                    cute.copy(out_atom, out_from[None, buffer], out_at[at])
                    cute.arch.cp_async_bulk_commit_group()
    if thread < 32:
        cute.arch.cp_async_bulk_wait_group(0, read=True)


@cute.kernel
def project_in_kernel(
    x_atom: cute.CopyAtom, x: cute.Tensor, weight_atom: cute.CopyAtom, weight: cute.Tensor, out_atom: cute.CopyAtom,
    out: cute.Tensor, moments: cute.Tensor, sums: cute.Tensor, bias: cute.Tensor, eps: Float32, mma: cute.TiledMma,
    x_layout: cute.ComposedLayout, panel_layout: cute.ComposedLayout, out_layout: cute.ComposedLayout,
    panels: Constexpr,
) -> Any:  # fmt: skip
    """Grid: programs of one panel each, a multiple of `panels`. x: [rows, WIDTH], weight: [columns, WIDTH],
    out: [rows, columns] as the copy engine sees them; moments: [rows, 2 * parts]; sums, bias: [columns]."""
    thread, program, programs = cute.arch.thread_idx()[0], cute.arch.block_idx()[0], cute.arch.grid_dim()[0]
    warp_at = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    panel, tile0, step = program % panels, program // panels, programs // panels
    tiles = (moments.shape[0] + ROWS - 1) // ROWS

    memory = SmemAllocator()
    panel_s = memory.allocate_tensor(BFloat16, panel_layout.outer, 1024, panel_layout.inner)  # [COLUMNS, DEPTH, blocks]
    x_s = memory.allocate_tensor(BFloat16, x_layout.outer, 1024, x_layout.inner)  # [ROWS, DEPTH, STAGES]
    out_s = memory.allocate_tensor(BFloat16, out_layout.outer, 1024, out_layout.inner)  # [PIECE, PIECE, all BUFFERS]
    columns_s = memory.allocate_tensor(Float32, cute.make_layout((4, COLUMNS // 2)), 16)
    bars = memory.allocate_array(cutlass.Int64, 2 * STAGES, byte_alignment=8)  # full, then empty
    panel_bars = memory.allocate_array(cutlass.Int64, WIDTH // DEPTH, byte_alignment=8)
    if thread < COLUMNS:
        column = panel * COLUMNS + thread
        columns_s[thread % 2, thread // 2], columns_s[2 + thread % 2, thread // 2] = sums[column], 0.5 * bias[column]
    if thread == 0:
        for stage in cutlass.range_constexpr(STAGES):
            cute.arch.mbarrier_init(bars + stage, 1)
            cute.arch.mbarrier_init(bars + STAGES + stage, THREADS // 32)
        for block in cutlass.range_constexpr(WIDTH // DEPTH):
            cute.arch.mbarrier_init(panel_bars + block, 1)
    cute.arch.mbarrier_init_fence()
    cute.arch.sync_threads()

    if warp_at < 4:
        cute.arch.setmaxregister_decrease(LOADER_REGISTERS)
        if warp_at == 0:
            x_to, x_from = cpasync.tma_partition(
                x_atom, 0, cute.make_layout(1), cute.group_modes(x_s, 0, 2),
                cute.group_modes(cute.local_tile(x, (ROWS, DEPTH), (None, None)), 0, 2),
            )  # fmt: skip
            weight_to, weight_from = cpasync.tma_partition(
                weight_atom, 0, cute.make_layout(1), cute.group_modes(panel_s, 0, 2),
                cute.group_modes(cute.local_tile(weight, (COLUMNS, DEPTH), (panel, None)), 0, 2),
            )  # fmt: skip
            load(x_from, x_to, x_atom, weight_from, weight_to, weight_atom, bars, panel_bars, tile0, tiles, step)
    else:
        cute.arch.setmaxregister_increase(REGISTERS)
        work(mma, x_s, panel_s, out_s, out_atom, out, moments, columns_s, eps, bars, panel_bars, thread % THREADS,
             warp_at // 4 - 1, panel, tile0, tiles, step)  # fmt: skip


@cute.jit
def run(x_at: cute.Pointer, weight_at: cute.Pointer, out_at: cute.Pointer, moments_at: cute.Pointer,
        sums_at: cute.Pointer, bias_at: cute.Pointer, rows: Int32, eps: Float32, programs: Int32,
        stream: cuda.CUstream, columns: Constexpr, parts: Constexpr) -> None:  # fmt: skip
    """On the host: descriptors for the copy engine, and the launch."""
    x = cute.make_tensor(x_at, cute.make_layout((rows, WIDTH), stride=(WIDTH, 1)))
    weight = cute.make_tensor(weight_at, cute.make_layout((columns, WIDTH), stride=(WIDTH, 1)))
    out = cute.make_tensor(out_at, cute.make_layout((rows, columns), stride=(columns, 1)))
    moments = cute.make_tensor(moments_at, cute.make_layout((rows, 2 * parts), stride=(2 * parts, 1)))
    sums, bias = (cute.make_tensor(at, cute.make_layout(columns)) for at in (sums_at, bias_at))

    tile, order = (ROWS, COLUMNS, DEPTH), LayoutEnum.ROW_MAJOR
    x_layout = hopper_helpers.make_smem_layout_a(order, tile, BFloat16, STAGES)
    panel_layout = hopper_helpers.make_smem_layout_b(order, tile, BFloat16, WIDTH // DEPTH)
    out_layout = hopper_helpers.make_smem_layout_epi(BFloat16, order, (PIECE, PIECE), GROUPS * BUFFERS)
    bring, leave = cpasync.CopyBulkTensorTileG2SOp(), cpasync.CopyBulkTensorTileS2GOp()
    x_atom, x_tiles = cpasync.make_tiled_tma_atom(bring, x, x_layout, (ROWS, DEPTH))
    weight_atom, weight_tiles = cpasync.make_tiled_tma_atom(bring, weight, panel_layout, (COLUMNS, DEPTH))
    out_atom, out_tiles = cpasync.make_tiled_tma_atom(leave, out, out_layout, (PIECE, PIECE))
    inner = OperandMajorMode.K
    mma = hopper_helpers.make_trivial_tiled_mma(BFloat16, BFloat16, inner, inner, Float32, (1, 1, 1), (64, COLUMNS))
    project_in_kernel(
        x_atom, x_tiles, weight_atom, weight_tiles, out_atom, out_tiles, moments, sums, bias, eps, mma, x_layout,
        panel_layout, out_layout, columns // COLUMNS,
    ).launch(
        grid=(programs, 1, 1), block=((1 + GROUPS) * THREADS, 1, 1), min_blocks_per_mp=1, stream=stream
    )  # fmt: skip


def pointer(address: int, dtype: Any) -> Any:
    return cute.runtime.make_ptr(dtype, address, cute.AddressSpace.gmem, assumed_align=16)


@cache
def compiled(device: torch.device, columns: int, parts: int) -> Any:
    """Takes two to three seconds, once a process, device and shape: a compiled function stays with its first device."""
    halves, floats = [pointer(16, BFloat16)] * 3, [pointer(16, Float32)] * 3
    numbers = (Int32(1), Float32(1e-5), Int32(1), cuda.CUstream(0))
    with COMPILER:
        return cute.compile(run, *halves, *floats, *numbers, columns, parts)


@cache
def programs_of(device: torch.device, panels: int) -> int:
    """One a multiprocessor, equally many of each panel."""
    return torch.cuda.get_device_properties(device).multi_processor_count // panels * panels


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether this kernel can do it: bfloat16, rows of `WIDTH`, whole panels, no more of them than multiprocessors."""
    shapes = len(x) > 0 and x.shape[1] == WIDTH and len(weight) > 0 and len(weight) % COLUMNS == 0
    dense = x.dtype == weight.dtype == torch.bfloat16 and x.is_contiguous() and weight.is_contiguous()
    return shapes and dense and programs_of(x.device, len(weight) // COLUMNS) > 0


def project_in(x: Tensor, moments: Tensor, weight: Tensor, sums: Tensor, bias: Tensor, eps: float) -> Tensor:
    """As `projection.project_in`, of what `fits`."""
    rows, columns = len(x), len(weight)
    out = x.new_empty((rows, columns))
    stream = cuda.CUstream(torch.cuda.current_stream(x.device).cuda_stream)
    with device_of(x):
        compiled(x.device, columns, moments.shape[1])(
            *(pointer(part.data_ptr(), BFloat16) for part in (x, weight, out)),
            *(pointer(part.data_ptr(), Float32) for part in (moments, sums, bias)),
            rows, eps, programs_of(x.device, columns // COLUMNS), stream,
        )  # fmt: skip
    return out
