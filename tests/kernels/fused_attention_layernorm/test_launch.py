"""Every launch of the tables fits its cards, and a card that no table knows gets one that fits."""

from itertools import product

import pytest
import torch

from kernels.fused_attention_layernorm import projection
from kernels.fused_attention_layernorm.launch import AMPERE, HOPPER, KERNEL_CONFIGS, SAFE_CONFIG, shared_memory_bytes
from kernels.fused_attention_layernorm.projection import LARGE_IN, LARGE_OUT, SMALL, SMALL_ROWS
from kernels.launch import SHARED_BYTES
from kernels.sequence_recommendation_interaction.launch import USERS_PER_PASS, make_plan
from kernels.sequence_recommendation_interaction.launch import make_plan as plan_of
from kernels.sequence_recommendation_interaction.tiles import TILES, Card, TopKTiles, fitting_tiles, tiles_for

SMALLEST = min(SHARED_BYTES.values())


@pytest.mark.parametrize(("key", "launch"), KERNEL_CONFIGS.items(), ids=str)
def test_attentions_launches_fit_every_card_of_their_generation(key, launch):
    major, element_bytes, _ = key
    for (generation, _), available in SHARED_BYTES.items():
        assert generation != major or shared_memory_bytes(launch, 128, element_bytes) <= available


def test_attention_has_a_launch_for_hopper_and_ampere_and_one_that_fits_anywhere():
    assert {(major, 2, short) for major in (HOPPER, AMPERE) for short in (False, True)} <= set(KERNEL_CONFIGS)
    assert shared_memory_bytes(SAFE_CONFIG, 128, 4) <= SMALLEST
    assert shared_memory_bytes(SAFE_CONFIG, 256, 2) <= SMALLEST


@pytest.mark.parametrize("available", sorted(set(SHARED_BYTES.values())))
@pytest.mark.parametrize("large", [LARGE_IN, LARGE_OUT])
@pytest.mark.parametrize("rows", [1, SMALL_ROWS + 1])
def test_the_products_have_the_measured_tiles_where_they_fit_and_else_ones_that_do(rows, large, available):
    for width, element_bytes in product((16, 512, 4096), (2, 4)):
        tiles = projection.tiles_for(rows, large, element_bytes, available)
        if element_bytes == 2 and available in (SHARED_BYTES[8, 0], SHARED_BYTES[9, 0]):
            assert tiles == (large if rows > SMALL_ROWS else SMALL)
        else:
            assert tiles.shrink_to(width, width).shared_bytes(element_bytes) <= available


def test_a_card_with_less_shared_memory_than_80_multiplies_in_narrow_tiles(monkeypatch):
    launched, x = [], torch.zeros(SMALL_ROWS + 1, 256)
    monkeypatch.setattr(projection, "launch", lambda kernel, grid, *arguments, **options: launched.append(options))
    monkeypatch.setattr(projection, "shared_bytes_of", lambda device: SMALLEST)
    weight, bias = torch.zeros(256, 256), torch.zeros(256)
    moments = projection.project_out(x, weight, bias, x)[1]
    projection.project_in(x, moments, weight, bias, bias, 1e-6)
    assert len(launched) == 2
    assert all(projection.LOW_MEMORY.kernel_options.items() <= options.items() for options in launched)


@pytest.mark.parametrize(("key", "tiles"), TILES.items(), ids=str)
def test_top_ks_tiles_fit_their_card_as_often_as_they_say(key, tiles):
    capability, element_bytes, columns, many = key
    available = SHARED_BYTES[capability]
    assert tiles.programs * tiles.shared_bytes(columns * element_bytes) <= available
    assert tiles.whole_packs
    card = Card(capability, available)
    assert tiles_for(256 if many else 1, columns, element_bytes, card) == tiles


@pytest.mark.parametrize(
    ("tiles", "whole"),
    [
        (TopKTiles(64, 256, 16, 3), True), (TopKTiles(64, 16, 4, 1), True), (TopKTiles(32, 16, 4, 1), False),
        (TopKTiles(96, 16, 4, 1), False), (TopKTiles(96, 32, 4, 1), True),
    ],
)  # fmt: skip
def test_packs_are_whole_where_each_thread_has_a_multiple_of_8_scores(tiles, whole):
    assert tiles.whole_packs is whole


def test_the_sample_gives_a_stage_for_its_maxima_and_then_items():
    hopper = Card((9, 0), SHARED_BYTES[9, 0])
    sampled = make_plan(items=9_000, users=256, width=256, k=1, element_bytes=2, card=hopper)
    assert (sampled.tiles, sampled.group_size) == (TopKTiles(64, 256, 16, 3), 8)
    # (256 users + 192 items) * 512 bytes + 8 maxima of 4 bytes a user are 237,568, with two stages 204,800.
    assert sampled.sample_tiles == TopKTiles(64, 256, 16, 2)
    assert sampled.tiles.for_sample(8, 512, 237_568) == sampled.tiles
    assert sampled.tiles.for_sample(8, 512, 237_567) == sampled.sample_tiles
    assert sampled.tiles.for_sample(8, 512, 160_000) == TopKTiles(32, 256, 16, 1)


def test_top_k_has_tiles_for_every_card_that_is_known():
    assert {capability for capability, *_ in TILES} == set(SHARED_BYTES)


@pytest.mark.parametrize("users", [1, 100, 256])
@pytest.mark.parametrize("row_bytes", [32, 512, 2048])
def test_an_unknown_card_gets_tiles_that_fit_and_less_shared_memory_than_the_table_thinks_is_no_harm(users, row_bytes):
    for capability in ((7, 5), (12, 0), (9, 0)):
        tiles = tiles_for(users, row_bytes // 2, 2, Card(capability, SMALLEST))
        assert tiles == fitting_tiles(users, row_bytes, SMALLEST)
        assert tiles.shared_bytes(row_bytes) <= SMALLEST


@pytest.mark.parametrize("items", [1, 8192, 8193, 20_000, 100_000, 1_000_000, 10_000_000])
@pytest.mark.parametrize("k", [1, 10, 100, 512])
@pytest.mark.parametrize(("width", "users"), [(16, 1), (256, 256), (512, 512)])
@pytest.mark.parametrize(
    ("card", "element_bytes"),
    [(Card((7, 5), 101_376), 4), (Card((7, 5), 232_448), 4), (Card((8, 0), 166_912), 2), (Card((9, 0), 232_448), 2)],
    ids=str,
)
def test_every_plan_fits_the_machine_and_its_own_buffers(items, k, width, users, card, element_bytes):
    plan = plan_of(items, users, width, k, element_bytes, card)
    tiles, row_bytes = plan.tiles, width * element_bytes
    assert (tiles.block_users + tiles.stages * tiles.block_items) * row_bytes < card.shared_bytes
    if plan.sample_stride:
        groups, sample = items // plan.sample_stride // plan.group_size, plan.sample_tiles
        assert sample is not None
        assert sample.block_items % plan.group_size == 0
        maxima = 4 * sample.block_users * sample.block_items // plan.group_size
        assert (sample.block_users + sample.stages * sample.block_items) * row_bytes + maxima <= card.shared_bytes
        assert k * plan.sample_stride <= plan.capacity // 2
        assert 2 * k <= groups
        assert items > 1_000_000 or groups * USERS_PER_PASS * 4 <= 32 << 20
