"""Tiles of top-k: those of the table fit their GPUs, and any other GPU gets tiles that fit."""

import pytest

from kernels.launch import SHARED_BYTES
from kernels.sequence_recommendation_interaction.launch import USERS_PER_PASS, make_plan
from kernels.sequence_recommendation_interaction.tiles import TILES, TileLimits, TopKTiles, fitting_tiles, tiles_for

SMALLEST = min(SHARED_BYTES.values())


@pytest.mark.parametrize(("key", "tiles"), TILES.items(), ids=str)
def test_tabled_tiles_fit_their_card_with_all_programs(
    key: tuple[tuple[int, int], int, int, bool], tiles: TopKTiles
) -> None:
    capability, element_bytes, columns, large_batch = key
    available = SHARED_BYTES[capability]
    assert tiles.programs_per_sm * tiles.shared_bytes(columns * element_bytes) <= available
    assert tiles.fills_packs
    limits = TileLimits(capability, available)
    assert tiles_for(256 if large_batch else 1, columns, element_bytes, limits) == tiles


@pytest.mark.parametrize(
    ("tiles", "filled"),
    [
        (TopKTiles(64, 256, 16, 3), True),
        (TopKTiles(64, 16, 4, 1), True),
        (TopKTiles(32, 16, 4, 1), False),
        (TopKTiles(96, 16, 4, 1), False),
        (TopKTiles(96, 32, 4, 1), True),
    ],
)
def test_packs_are_filled_if_each_thread_has_a_multiple_of_8_scores(tiles: TopKTiles, filled: bool) -> None:
    assert tiles.fills_packs is filled


def test_sample_gives_up_stages_and_then_items_for_its_maxima() -> None:
    hopper = TileLimits((9, 0), SHARED_BYTES[9, 0])
    plan = make_plan(items=9_000, users=256, width=256, k=1, element_bytes=2, limits=hopper)
    assert (plan.tiles, plan.group_size) == (TopKTiles(64, 256, 16, 3), 8)
    # (256 users + 192 items) * 512 bytes + 8 maxima of 4 bytes per user are 237,568, with two stages 204,800.
    assert plan.sample_tiles == TopKTiles(64, 256, 16, 2)
    assert plan.tiles.for_sample(8, 512, 237_568) == plan.tiles
    assert plan.tiles.for_sample(8, 512, 237_567) == plan.sample_tiles
    assert plan.tiles.for_sample(8, 512, 160_000) == TopKTiles(32, 256, 16, 1)


def test_table_covers_every_capability_of_known_shared_memory() -> None:
    assert {capability for capability, *_ in TILES} == set(SHARED_BYTES)


@pytest.mark.parametrize("users", [1, 100, 256])
@pytest.mark.parametrize("row_bytes", [32, 512, 2048])
def test_card_that_is_unknown_or_has_little_shared_memory_gets_tiles_that_fit(users: int, row_bytes: int) -> None:
    for capability in ((7, 5), (12, 0), (9, 0)):
        tiles = tiles_for(users, row_bytes // 2, 2, TileLimits(capability, SMALLEST))
        assert tiles == fitting_tiles(users, row_bytes, SMALLEST)
        assert tiles.shared_bytes(row_bytes) <= SMALLEST


@pytest.mark.parametrize("items", [1, 8192, 8193, 20_000, 100_000, 1_000_000, 10_000_000])
@pytest.mark.parametrize("k", [1, 10, 100, 512])
@pytest.mark.parametrize(("width", "users"), [(16, 1), (256, 256), (512, 512)])
@pytest.mark.parametrize(
    ("limits", "element_bytes"),
    [
        (TileLimits((7, 5), 101_376), 4),
        (TileLimits((7, 5), 232_448), 4),
        (TileLimits((8, 0), 166_912), 2),
        (TileLimits((9, 0), 232_448), 2),
    ],
    ids=str,
)
def test_every_plan_fits_the_card_and_its_own_buffers(
    items: int, k: int, width: int, users: int, limits: TileLimits, element_bytes: int
) -> None:
    plan = make_plan(items, users, width, k, element_bytes, limits)
    row_bytes = width * element_bytes
    tiles = plan.tiles
    assert (tiles.block_users + tiles.stages * tiles.block_items) * row_bytes < limits.shared_bytes
    if plan.sample_stride:
        groups = items // plan.sample_stride // plan.group_size
        sample = plan.sample_tiles
        assert sample is not None
        assert sample.block_items % plan.group_size == 0
        maxima = 4 * sample.block_users * sample.block_items // plan.group_size
        stored = (sample.block_users + sample.stages * sample.block_items) * row_bytes
        assert stored + maxima <= limits.shared_bytes
        assert k * plan.sample_stride <= plan.capacity // 2
        assert 2 * k <= groups
        assert items > 1_000_000 or groups * USERS_PER_PASS * 4 <= 32 << 20
