"""The product before attention, `projection.project_in`, for Hopper in CuTe DSL.

A program keeps one panel of W, 128 columns of full depth, in shared memory, and the rows of x stream past it: nothing
else is read twice. Warps are specialised: one produces (loads), the others consume, in groups of four that take tiles
of rows in turn. While one group multiplies, the others activate and store, so the matrix units need not wait.
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

from kernels.launch import device_guard

# Swept by editing these (docs/adr/0002), 74,108 rows, 8 layers, one H100: 2.05 ms as it stands; with four groups 2.07;
# two, of 128 rows, 2.14; three with a depth of 64, so with barriers twice as often, 2.48.
BLOCK_M = 64
BLOCK_N = 128
BLOCK_K = 128  # depth of one stage
GROUPS = 3  # of consumers
STAGES = 4  # blocks of x in flight
BUFFERS = 1  # store tiles of a group in flight
CONSUMER_REGISTERS = 160  # per thread; (3 x 160 + 32) x 128 is all that a multiprocessor has
PRODUCER_REGISTERS = 32
STORE_TILE = 64  # rows and columns of one store, 128 bytes per row
GROUP_THREADS = 128
TURN_BARRIER = 1  # first id of the named barriers, one per group
STORE_BARRIER = 1 + GROUPS
D_MODEL = 512  # width of x: a panel of W takes 128 KiB of the 227
COMPILE_LOCK = Lock()  # NOTE: one of two simultaneous compilations fails


@cute.jit
def load(x_global: Any, x_smem: Any, x_atom: Any, w_global: Any, panel_smem: Any, weight_atom: Any, mbars: Any,
         panel_mbars: Any, tile0: Int32, tiles: Int32, step: Int32) -> None:  # fmt: skip
    """Load in one warp: each block of the panel goes before the first block of x that is multiplied by it."""
    full = mbars
    empty = mbars + STAGES
    index = Int32(0)
    for tile in cutlass.range(tile0, tiles, step, unroll=1):
        for block in cutlass.range(D_MODEL // BLOCK_K, unroll=1):
            if index < D_MODEL // BLOCK_K:
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive_and_expect_tx(panel_mbars + block, BLOCK_N * BLOCK_K * 2)
                cute.copy(weight_atom, w_global[None, block], panel_smem[None, block], tma_bar_ptr=panel_mbars + block)
            stage = index % STAGES
            cute.arch.mbarrier_wait(empty + stage, 1 - index // STAGES % 2)
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(full + stage, BLOCK_M * BLOCK_K * 2)
            cute.copy(x_atom, x_global[None, tile, block], x_smem[None, stage], tma_bar_ptr=full + stage)
            index += 1


@cute.jit
def multiply(mma: Any, product: Any, x_fragments: Any, panel_fragments: Any, mbars: Any, panel_mbars: Any,
             first: Int32, next_group: Int32) -> None:  # fmt: skip
    """Add the tile's product to `product`; the last block may still run on return. first: earlier blocks of x."""
    full = mbars
    empty = mbars + STAGES
    mma.set(warpgroup.Field.ACCUMULATE, True)
    warpgroup.fence()
    for block in cutlass.range(D_MODEL // BLOCK_K, unroll=1):
        index = first + block
        stage = index % STAGES
        cute.arch.mbarrier_wait(panel_mbars + block, 0)
        cute.arch.mbarrier_wait(full + stage, index // STAGES % 2)
        for k in cutlass.range_constexpr(BLOCK_K // 16):
            cute.gemm(mma, product, x_fragments[None, None, k, stage], panel_fragments[None, None, k, block], product)
        warpgroup.commit_group()
        if block == D_MODEL // BLOCK_K - 1:
            cute.arch.barrier_arrive(barrier_id=TURN_BARRIER + next_group, number_of_threads=2 * GROUP_THREADS)
        warpgroup.wait_group(1)
        if block > 0:
            release(empty + (index - 1) % STAGES)


@cute.jit
def release(empty: Any) -> None:
    """Signal that this warp no longer needs a stage."""
    with cute.arch.elect_one():
        cute.arch.mbarrier_arrive(empty)


@cute.jit
def normalisation(row_stats: Any, eps: Float32) -> Any:
    """Return half a row's reciprocal deviation r, and -mean * r. row_stats: sum and sum of squares of each part."""
    total = Float32(0)
    squares = Float32(0)
    for part in cutlass.range_constexpr(cute.size(row_stats) // 2):
        total += row_stats[2 * part]
        squares += row_stats[2 * part + 1]
    mean = total * (1 / D_MODEL)
    variance = cute.arch.fmax(squares * (1 / D_MODEL) - mean * mean, 0.0)
    scale = 0.5 * cute.math.rsqrt(variance + eps, fastmath=True)
    return scale, -mean * scale


@cute.jit
def activate(product: Any, row_stats: Any, columns_smem: Any, half: Constexpr, side: Constexpr, lane: Int32,
             eps: Float32) -> None:  # fmt: skip
    """Activate a store tile in place: SiLU(2 h) = h tanh(h) + h. row_stats: of the two rows that a thread has in it."""
    scale = cute.make_rmem_tensor(2, Float32)
    offset = cute.make_rmem_tensor(2, Float32)
    for r in cutlass.range_constexpr(2):
        scale[r], offset[r] = normalisation(row_stats[None, r, half], eps)
    for i in cutlass.range_constexpr(side * STORE_TILE // 8, (side + 1) * STORE_TILE // 8):
        columns = cute.make_rmem_tensor(4, Float32)  # the sums of two columns, then half their biases
        cute.autovec_copy(columns_smem[None, i * 4 + lane % 4], columns)
        for r in cutlass.range_constexpr(2):
            for c in cutlass.range_constexpr(2):
                index = ((c, r, i), half, 0)
                h = product[index] * scale[r] + (columns[c] * offset[r] + columns[2 + c])
                product[index] = cute.math.tanh(h, fastmath=True) * h + h


@cute.jit
def consume(mma: Any, x_smem: Any, panel_smem: Any, out_smem: Any, out_atom: Any, out: Any, row_stats: Any,
            columns_smem: Any, eps: Float32, mbars: Any, panel_mbars: Any, thread: Int32, group: Int32,
            panel: Int32, tile0: Int32, tiles: Int32, step: Int32) -> None:  # fmt: skip
    """Multiply, activate and store in a group of four warps: every GROUPS-th tile of the program."""
    part = mma.get_slice(0)
    lane = thread % 32
    x_fragments = mma.make_fragment_A(part.partition_A(x_smem))
    panel_fragments = mma.make_fragment_B(part.partition_B(panel_smem))
    product = cute.make_rmem_tensor(part.partition_shape_C((BLOCK_M, BLOCK_N)), Float32)  # ((2, 2, 16), halves, 1)
    store_atom = cute.make_copy_atom(warp.StMatrix8x8x16bOp(False, 4), BFloat16)
    tiled_copy = cute.make_tiled_copy_S(store_atom, cute.make_tiled_copy_C_atom(store_atom, mma))
    out_to = tiled_copy.get_slice(thread).partition_D(out_smem)
    values = tiled_copy.retile(product)
    store_tile = cute.make_rmem_tensor(out_to.shape[:3], BFloat16)
    out_from, out_global = cpasync.tma_partition(
        out_atom, 0, cute.make_layout(1), cute.group_modes(out_smem, 0, 2),
        cute.group_modes(cute.local_tile(out, (STORE_TILE, STORE_TILE), (None, None)), 0, 2),
    )  # fmt: skip
    own_stats = cute.make_rmem_tensor((row_stats.shape[1], 2, BLOCK_M // 64), Float32)  # of the thread's rows
    if group == GROUPS - 1:
        cute.arch.barrier_arrive(barrier_id=TURN_BARRIER, number_of_threads=2 * GROUP_THREADS)
    first = group * (D_MODEL // BLOCK_K)
    for tile in cutlass.range(tile0 + group * step, tiles, GROUPS * step, unroll=1):
        for half in cutlass.range_constexpr(BLOCK_M // 64):
            for r in cutlass.range_constexpr(2):
                row = tile * BLOCK_M + half * 64 + thread // 32 * 16 + lane // 4 + r * 8
                cute.autovec_copy(row_stats[cutlass.min(row, row_stats.shape[0] - 1), None], own_stats[None, r, half])
        product.fill(0.0)
        cute.arch.barrier(barrier_id=TURN_BARRIER + group, number_of_threads=2 * GROUP_THREADS)
        multiply(mma, product, x_fragments, panel_fragments, mbars, panel_mbars, first, (group + 1) % GROUPS)
        warpgroup.wait_group(0)
        first += GROUPS * (D_MODEL // BLOCK_K)
        release(mbars + STAGES + (first - (GROUPS - 1) * (D_MODEL // BLOCK_K) - 1) % STAGES)
        for half in cutlass.range_constexpr(BLOCK_M // 64):
            for side in cutlass.range_constexpr(BLOCK_N // STORE_TILE):
                activate(product, own_stats, columns_smem, half, side, lane, eps)
                for i in cutlass.range_constexpr(cute.size(store_tile)):
                    store_tile[i] = values[(half * 2 + side) * cute.size(store_tile) + i].to(BFloat16)
                buffer = group * BUFFERS + side % BUFFERS
                if thread < 32:
                    cute.arch.cp_async_bulk_wait_group(BUFFERS - 1, read=True)
                cute.arch.barrier(barrier_id=STORE_BARRIER + group, number_of_threads=GROUP_THREADS)
                cute.copy(tiled_copy, store_tile, out_to[None, None, None, buffer])
                cute.arch.fence_proxy("async.shared", space="cta")
                cute.arch.barrier(barrier_id=STORE_BARRIER + group, number_of_threads=GROUP_THREADS)
                if thread < 32:
                    index = (None, tile * (BLOCK_M // 64) + half, panel * (BLOCK_N // STORE_TILE) + side)
                    cute.copy(out_atom, out_from[None, buffer], out_global[index])
                    cute.arch.cp_async_bulk_commit_group()
    if thread < 32:
        cute.arch.cp_async_bulk_wait_group(0, read=True)


@cute.kernel
def project_in_kernel(
    x_atom: cute.CopyAtom, x: cute.Tensor, weight_atom: cute.CopyAtom, weight: cute.Tensor, out_atom: cute.CopyAtom,
    out: cute.Tensor, row_stats: cute.Tensor, sums: cute.Tensor, bias: cute.Tensor, eps: Float32, mma: cute.TiledMma,
    x_layout: cute.ComposedLayout, panel_layout: cute.ComposedLayout, out_layout: cute.ComposedLayout,
    panels: Constexpr,
) -> Any:  # fmt: skip
    """Write out. Grid: programs of one panel each, a multiple of `panels`. x: [rows, D_MODEL], weight: [columns,
    D_MODEL], out: [rows, columns] as the copy engine sees them; row_stats: [rows, 2 * parts]; sums, bias: [columns]."""
    thread = cute.arch.thread_idx()[0]
    program = cute.arch.block_idx()[0]
    warp_index = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    panel = program % panels
    tile0 = program // panels
    step = cute.arch.grid_dim()[0] // panels
    tiles = (row_stats.shape[0] + BLOCK_M - 1) // BLOCK_M
    memory = SmemAllocator()
    # [BLOCK_N, BLOCK_K, blocks], [BLOCK_M, BLOCK_K, STAGES], [STORE_TILE, STORE_TILE, GROUPS * BUFFERS]
    panel_smem = memory.allocate_tensor(BFloat16, panel_layout.outer, 1024, panel_layout.inner)
    x_smem = memory.allocate_tensor(BFloat16, x_layout.outer, 1024, x_layout.inner)
    out_smem = memory.allocate_tensor(BFloat16, out_layout.outer, 1024, out_layout.inner)
    columns_smem = memory.allocate_tensor(Float32, cute.make_layout((4, BLOCK_N // 2)), 16)
    mbars = memory.allocate_array(cutlass.Int64, 2 * STAGES, byte_alignment=8)  # full, then empty
    panel_mbars = memory.allocate_array(cutlass.Int64, D_MODEL // BLOCK_K, byte_alignment=8)
    if thread < BLOCK_N:
        column = panel * BLOCK_N + thread
        column_sum = sums[column]
        half_bias = 0.5 * bias[column]
        columns_smem[thread % 2, thread // 2] = column_sum
        columns_smem[2 + thread % 2, thread // 2] = half_bias
    if thread == 0:
        for stage in cutlass.range_constexpr(STAGES):
            cute.arch.mbarrier_init(mbars + stage, 1)
            cute.arch.mbarrier_init(mbars + STAGES + stage, GROUP_THREADS // 32)
        for block in cutlass.range_constexpr(D_MODEL // BLOCK_K):
            cute.arch.mbarrier_init(panel_mbars + block, 1)
    cute.arch.mbarrier_init_fence()
    cute.arch.sync_threads()
    if warp_index < 4:
        cute.arch.setmaxregister_decrease(PRODUCER_REGISTERS)
        if warp_index == 0:
            x_to, x_global = cpasync.tma_partition(
                x_atom, 0, cute.make_layout(1), cute.group_modes(x_smem, 0, 2),
                cute.group_modes(cute.local_tile(x, (BLOCK_M, BLOCK_K), (None, None)), 0, 2),
            )  # fmt: skip
            panel_to, w_global = cpasync.tma_partition(
                weight_atom, 0, cute.make_layout(1), cute.group_modes(panel_smem, 0, 2),
                cute.group_modes(cute.local_tile(weight, (BLOCK_N, BLOCK_K), (panel, None)), 0, 2),
            )  # fmt: skip
            load(x_global, x_to, x_atom, w_global, panel_to, weight_atom, mbars, panel_mbars, tile0, tiles, step)
    else:
        cute.arch.setmaxregister_increase(CONSUMER_REGISTERS)
        consume(mma, x_smem, panel_smem, out_smem, out_atom, out, row_stats, columns_smem, eps, mbars, panel_mbars,
                thread % GROUP_THREADS, warp_index // 4 - 1, panel, tile0, tiles, step)  # fmt: skip


@cute.jit
def launch_kernel(x_pointer: cute.Pointer, weight_pointer: cute.Pointer, out_pointer: cute.Pointer,
                  stats_pointer: cute.Pointer, sums_pointer: cute.Pointer, bias_pointer: cute.Pointer, rows: Int32,
                  eps: Float32, programs: Int32, stream: cuda.CUstream, columns: Constexpr,
                  parts: Constexpr) -> None:  # fmt: skip
    """Make the copy engine's descriptors and launch the kernel, on the host."""
    x = cute.make_tensor(x_pointer, cute.make_layout((rows, D_MODEL), stride=(D_MODEL, 1)))
    weight = cute.make_tensor(weight_pointer, cute.make_layout((columns, D_MODEL), stride=(D_MODEL, 1)))
    out = cute.make_tensor(out_pointer, cute.make_layout((rows, columns), stride=(columns, 1)))
    row_stats = cute.make_tensor(stats_pointer, cute.make_layout((rows, 2 * parts), stride=(2 * parts, 1)))
    sums, bias = (cute.make_tensor(pointer, cute.make_layout(columns)) for pointer in (sums_pointer, bias_pointer))
    tile = (BLOCK_M, BLOCK_N, BLOCK_K)
    order = LayoutEnum.ROW_MAJOR
    x_layout = hopper_helpers.make_smem_layout_a(order, tile, BFloat16, STAGES)
    panel_layout = hopper_helpers.make_smem_layout_b(order, tile, BFloat16, D_MODEL // BLOCK_K)
    out_layout = hopper_helpers.make_smem_layout_epi(BFloat16, order, (STORE_TILE, STORE_TILE), GROUPS * BUFFERS)
    to_smem = cpasync.CopyBulkTensorTileG2SOp()
    to_global = cpasync.CopyBulkTensorTileS2GOp()
    x_atom, x_tiles = cpasync.make_tiled_tma_atom(to_smem, x, x_layout, (BLOCK_M, BLOCK_K))
    weight_atom, weight_tiles = cpasync.make_tiled_tma_atom(to_smem, weight, panel_layout, (BLOCK_N, BLOCK_K))
    out_atom, out_tiles = cpasync.make_tiled_tma_atom(to_global, out, out_layout, (STORE_TILE, STORE_TILE))
    major = OperandMajorMode.K
    mma = hopper_helpers.make_trivial_tiled_mma(BFloat16, BFloat16, major, major, Float32, (1, 1, 1), (64, BLOCK_N))
    project_in_kernel(
        x_atom, x_tiles, weight_atom, weight_tiles, out_atom, out_tiles, row_stats, sums, bias, eps, mma, x_layout,
        panel_layout, out_layout, columns // BLOCK_N,
    ).launch(
        grid=(programs, 1, 1), block=((1 + GROUPS) * GROUP_THREADS, 1, 1), min_blocks_per_mp=1, stream=stream
    )  # fmt: skip


def make_pointer(address: int, dtype: Any) -> Any:
    return cute.runtime.make_ptr(dtype, address, cute.AddressSpace.gmem, assumed_align=16)


@cache
def compile_kernel(device: torch.device, columns: int, parts: int) -> Any:
    """Compile in two to three seconds, once per process, device and shape: the result only runs on its first device."""
    pointers = [make_pointer(16, BFloat16)] * 3 + [make_pointer(16, Float32)] * 3
    with COMPILE_LOCK:
        return cute.compile(launch_kernel, *pointers, Int32(1), Float32(1), Int32(1), cuda.CUstream(0), columns, parts)


@cache
def count_programs(device: torch.device, panels: int) -> int:
    """Return at most one program per multiprocessor, equally many for each panel."""
    return torch.cuda.get_device_properties(device).multi_processor_count // panels * panels


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel supports the input: bfloat16, width D_MODEL, entire panels, no more of them than SMs."""
    shapes = len(x) > 0 and x.shape[1] == D_MODEL and len(weight) > 0 and len(weight) % BLOCK_N == 0
    dense = x.dtype == weight.dtype == torch.bfloat16 and x.is_contiguous() and weight.is_contiguous()
    return shapes and dense and count_programs(x.device, len(weight) // BLOCK_N) > 0


def project_in(x: Tensor, row_stats: Tensor, weight: Tensor, sums: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Return `projection.project_in` of input that `fits`."""
    columns = len(weight)
    out = x.new_empty((len(x), columns))
    stream = cuda.CUstream(torch.cuda.current_stream(x.device).cuda_stream)
    with device_guard(x):
        compile_kernel(x.device, columns, row_stats.shape[1])(
            *(make_pointer(part.data_ptr(), BFloat16) for part in (x, weight, out)),
            *(make_pointer(part.data_ptr(), Float32) for part in (row_stats, sums, bias)),
            len(x), eps, count_programs(x.device, columns // BLOCK_N), stream,
        )  # fmt: skip
    return out
