import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.serving import retrieval
from pipeline.serving.retrieval import FusedRetrieval, Retrieval


def brute_force(table: np.ndarray, states: np.ndarray, excluded: set[tuple[int, int]], k: int) -> list[list[int]]:
    rows = []
    for row, state in enumerate(states):
        allowed = [token for token in range(1, len(table)) if (row, token) not in excluded]
        best = sorted(allowed, key=lambda token: -float(table[token] @ state))[:k]
        rows.append(best + [0] * (k - len(best)))
    return rows


@pytest.fixture(autouse=True)
def _small_catalogues_are_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "FUSED_MIN_SCORES", 0)


@pytest.mark.parametrize("kind", [Retrieval, FusedRetrieval])
@settings(deadline=None)
@given(st.integers(1, 9), st.integers(2, 12), st.integers(1, 15), st.integers(0, 999), st.integers(0, 40))
def test_it_finds_what_looking_at_every_item_finds(
    kind: type[Retrieval | FusedRetrieval], users: int, items: int, k: int, seed: int, pairs: int
) -> None:
    random = np.random.default_rng(seed)
    table, states = random.normal(size=(items, 4)).astype(np.float32), random.normal(size=(users, 4)).astype(np.float32)
    rows, tokens = random.integers(0, users, pairs), random.integers(0, items + 3, pairs).astype(np.int32)
    found, scores = kind(torch.from_numpy(table)).top_k(torch.from_numpy(states), rows, tokens, k)
    excluded = set(zip(rows.tolist(), tokens.tolist(), strict=True))
    assert found.tolist() == brute_force(table, states, excluded, k)
    assert np.isneginf(scores[found == 0]).all()
    listed = np.where(np.isneginf(scores), -1e9, scores)
    assert (np.diff(listed, axis=1) <= 0).all()


def test_a_large_catalogue_is_scored_in_parts_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    table, states = torch.randn(50, 8), torch.randn(23, 8)
    rows, tokens = np.arange(23).repeat(4), np.tile([1, 2, 3, 49], 23)
    whole = Retrieval(table).top_k(states, rows, tokens, 7)
    monkeypatch.setattr(retrieval, "CHUNK_SCORES", 150)
    parts = Retrieval(table).top_k(states, rows, tokens, 7)
    assert (parts[0] == whole[0]).all()
    np.testing.assert_allclose(parts[1], whole[1], rtol=1e-5)


def test_half_precision_chooses_among_many_and_float32_orders_what_it_chose() -> None:
    torch.manual_seed(2)
    table, states = torch.randn(900, 16), torch.randn(5, 16)
    rows, tokens = np.arange(5).repeat(3), np.tile([3, 700, 899], 5)
    (found, scores), (wanted, exact) = (
        each.top_k(states, rows, tokens, 10) for each in (FusedRetrieval(table), Retrieval(table))
    )
    assert found.tolist() == wanted.tolist()
    np.testing.assert_allclose(scores, exact, rtol=1e-6, atol=1e-6)


def test_a_slate_beyond_the_operators_reach_is_found_in_memory() -> None:
    torch.manual_seed(3)
    table, states = torch.randn(900, 8), torch.randn(2, 8)
    nothing = np.empty(0, np.int64)
    long, wanted = (each.top_k(states, nothing, nothing, 480)[0] for each in (FusedRetrieval(table), Retrieval(table)))
    assert long.tolist() == wanted.tolist()
