import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.hierarchical_sequence_fusion.reference import hierarchical_sequence_fusion
from pipeline.features.event_features import SESSION_GAP_S, EncoderInputs
from pipeline.model.session_pooling import SessionPooling

GAP_S = SESSION_GAP_S
ITEMS = 9
FEATURES = 20
WIDTH = 4


@given(
    lengths=st.lists(st.integers(0, 25), min_size=1, max_size=5),
    recent=st.integers(1, 9),
    sessions=st.integers(1, 5),
    seed=st.integers(0, 999),
)
def test_rows_equal_the_specification(lengths: list[int], recent: int, sessions: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    steps = rng.choice([0, 5, GAP_S - 1, GAP_S, 90_000], offsets[-1])
    inputs = EncoderInputs(
        seconds=np.concatenate([np.cumsum(part) for part in np.split(steps, offsets[1:-1])]).astype(np.int32),
        item_rows=rng.integers(0, ITEMS, offsets[-1]).astype(np.int32),
        feature_ids=rng.integers(0, FEATURES, (offsets[-1], 3)).astype(np.int32),
        offsets=offsets,
    )
    table = torch.randn(ITEMS, WIDTH, generator=generator)
    features = torch.randn(FEATURES, WIDTH, generator=generator)
    strength = torch.randn(FEATURES, generator=generator)
    item_rows = torch.from_numpy(inputs.item_rows)
    feature_ids = torch.from_numpy(inputs.feature_ids)
    seconds = torch.from_numpy(inputs.seconds)
    expected, times, ends = hierarchical_sequence_fusion(
        table, features, strength, item_rows, feature_ids, seconds, torch.from_numpy(offsets), recent, sessions, GAP_S
    )
    pooling = SessionPooling.from_inputs(inputs, recent, sessions)
    assert pooling.offsets.tolist() == ends.tolist()
    assert pooling.seconds.tolist() == times[: ends[-1]].tolist()
    weights = strength[feature_ids.long()].sum(1, keepdim=True).exp()
    is_recent = torch.from_numpy(pooling.is_recent)[:, None]
    items = table[item_rows.long()]
    events = torch.where(is_recent, items * weights, items) + features[feature_ids.long()].sum(1)
    pooled = pooling.pool(events, weights.masked_fill(is_recent, 1.0))
    torch.testing.assert_close(pooled, expected[: ends[-1]], rtol=1e-4, atol=1e-4)


def test_newest_events_keep_their_rows_and_the_oldest_sessions_have_none() -> None:
    inputs = EncoderInputs(
        item_rows=np.zeros(7, np.int32),
        feature_ids=np.zeros((7, 1), np.int32),
        seconds=np.array([0, 1, 5000, 5001, 20_000, 20_001, 20_002], np.int32),
        offsets=np.array([0, 7]),
    )
    pooling = SessionPooling.from_inputs(inputs, recent=2, sessions=2)
    assert pooling.rows.tolist() == [4, 4, 0, 0, 1, 2, 3]
    assert pooling.is_recent.tolist() == [False] * 5 + [True] * 2
