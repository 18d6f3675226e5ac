import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.strategies import retrieval
from pipeline.strategies.retrieval import ExcludedItems, FusedRetrieval, Retrieval, top_k_by_groups


def brute_force(table: np.ndarray, states: np.ndarray, excluded: set[tuple[int, int]], k: int) -> list[list[int]]:
    rows = []
    for user, state in enumerate(states):
        allowed = [row for row in range(1, len(table)) if (user, row) not in excluded]
        best = sorted(allowed, key=lambda row: -float(table[row] @ state))[:k]
        rows.append(best + [0] * (k - len(best)))
    return rows


def excluded_items(users: np.ndarray, rows: np.ndarray, n: int) -> ExcludedItems:
    """Return the exclusion of these pairs for n users."""
    order = np.argsort(users, kind="stable")
    offsets = np.searchsorted(users[order], np.arange(n + 1))
    return ExcludedItems(offsets, torch.from_numpy(users[order]), torch.from_numpy(rows[order].astype(np.int64)))


def nothing(n: int) -> ExcludedItems:
    return excluded_items(np.empty(0, np.int64), np.empty(0, np.int64), n)


@pytest.fixture(autouse=True)
def _small_catalogues_are_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "FUSED_MIN_SCORES", 0)


@pytest.mark.parametrize("kind", [Retrieval, FusedRetrieval])
@given(
    users=st.integers(1, 9),
    items=st.integers(2, 12),
    k=st.integers(1, 15),
    seed=st.integers(0, 999),
    pairs=st.integers(0, 40),
)
def test_top_k_equals_brute_force(
    kind: type[Retrieval | FusedRetrieval], users: int, items: int, k: int, seed: int, pairs: int
) -> None:
    rng = np.random.default_rng(seed)
    table = rng.normal(size=(items, 4)).astype(np.float32)
    states = rng.normal(size=(users, 4)).astype(np.float32)
    excluded_users = rng.integers(0, users, pairs)
    excluded_rows = rng.integers(0, items, pairs)
    retrieved = kind(torch.from_numpy(table)).top_k(
        torch.from_numpy(states), excluded_items(excluded_users, excluded_rows, users), k
    )
    found, scores = (column.numpy() for column in retrieved)
    excluded = set(zip(excluded_users.tolist(), excluded_rows.tolist(), strict=True))
    assert found.tolist() == brute_force(table, states, excluded, k)
    assert np.isneginf(scores[found == 0]).all()
    finite = np.where(np.isneginf(scores), -1e9, scores)
    assert (np.diff(finite, axis=1) <= 0).all()


def test_large_catalogue_is_scored_in_chunks_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    table = torch.randn(50, 8)
    states = torch.randn(23, 8)
    excluded = excluded_items(np.arange(23).repeat(4), np.tile([1, 2, 3, 49], 23), 23)
    at_once = Retrieval(table).top_k(states, excluded, 7)
    monkeypatch.setattr(retrieval, "CHUNK_SCORES", 150)
    in_chunks = Retrieval(table).top_k(states, excluded, 7)
    assert (in_chunks[0] == at_once[0]).all()
    np.testing.assert_allclose(in_chunks[1], at_once[1], rtol=1e-5)


def test_half_precision_finds_candidates_and_float32_orders_them() -> None:
    torch.manual_seed(2)
    table = torch.randn(900, 16)
    states = torch.randn(5, 16)
    excluded = excluded_items(np.arange(5).repeat(3), np.tile([3, 700, 899], 5), 5)
    found, scores = FusedRetrieval(table).top_k(states, excluded, 10)
    expected, exact = Retrieval(table).top_k(states, excluded, 10)
    assert found.tolist() == expected.tolist()
    np.testing.assert_allclose(scores, exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", [Retrieval, FusedRetrieval])
def test_new_and_rewritten_vectors_are_found_from_then_on(kind: type[Retrieval | FusedRetrieval]) -> None:
    torch.manual_seed(4)
    table = torch.randn(70, 8)
    states = torch.randn(6, 8)
    grown = kind(table[:20].clone(), 0.5)
    for end in (21, 22, 70):
        vectors = torch.cat([table[:3], -table[3:4], table[4:end]])
        grown.set_vectors(vectors, np.array([3, *range(end - (48 if end == 70 else 1), end)]))
        grown.block(np.array([0, 5]))
        at_once = kind(vectors, 0.5)
        at_once.block(np.array([0, 5]))
        for found, expected in zip(
            grown.top_k(states, nothing(len(states)), 9), at_once.top_k(states, nothing(len(states)), 9), strict=True
        ):
            assert (found == expected).all()


@pytest.mark.parametrize("kind", [Retrieval, FusedRetrieval])
def test_scores_are_products_over_the_temperature(kind: type[Retrieval | FusedRetrieval]) -> None:
    torch.manual_seed(5)
    table = torch.randn(40, 8)
    states = torch.randn(3, 8)
    each = kind(table, 0.25)
    found, scores = each.top_k(states, nothing(len(states)), 7)
    np.testing.assert_allclose(scores, (4 * states @ table.T).gather(1, found), rtol=1e-5)
    np.testing.assert_allclose(each.scores(states, found), scores, rtol=1e-5)


def test_slate_longer_than_the_operators_limit_is_found_in_memory() -> None:
    torch.manual_seed(3)
    table = torch.randn(900, 8)
    states = torch.randn(2, 8)
    found, _ = FusedRetrieval(table).top_k(states, nothing(len(states)), 480)
    expected, _ = Retrieval(table).top_k(states, nothing(len(states)), 480)
    assert found.tolist() == expected.tolist()


@given(
    users=st.integers(0, 3),
    items=st.integers(1, 700),
    k=st.integers(0, 12),
    distinct=st.sampled_from([1, 3, 1000]),
    missing=st.sampled_from([0.0, 0.5, 0.99, 1.0]),
    seed=st.integers(0, 99),
)
def test_top_k_by_groups_equals_top_k_at_once_also_with_ties_and_too_few_items(
    users: int, items: int, k: int, distinct: int, missing: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    scores = torch.from_numpy(rng.integers(0, distinct, (users, items)).astype(np.float32))
    scores[torch.from_numpy(rng.random((users, items)) < missing)] = -torch.inf
    k = min(k, items)
    best, rows = top_k_by_groups(scores, k)
    assert torch.equal(best, scores.topk(k, dim=1).values)
    assert torch.equal(best, scores.gather(1, rows))
    assert all(len(set(row)) == k for row in rows.tolist()), "no row twice"


@pytest.mark.parametrize("items", [64 * 2 * 10, 5_000])
def test_cpu_never_sorts_a_large_catalogue_at_once(items: int, monkeypatch: pytest.MonkeyPatch) -> None:
    widest = 0
    topk = torch.Tensor.topk

    def watched(x: torch.Tensor, *args: int, **options: int) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal widest
        widest = max(widest, x.shape[1])
        return topk(x, *args, **options)

    monkeypatch.setattr(torch.Tensor, "topk", watched)
    torch.manual_seed(6)
    Retrieval(torch.randn(items, 4)).top_k(torch.randn(2, 4), nothing(2), 10)
    assert widest < items
