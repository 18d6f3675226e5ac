import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.hierarchical_sequence_fusion.reference import hierarchical_sequence_fusion
from pipeline.features.event_features import SESSION_GAP_MS, EncoderInputs
from pipeline.model.session_pooling import SessionPooling

GAP_S = SESSION_GAP_MS // 1000


@settings(deadline=None)
@given(st.lists(st.integers(0, 25), min_size=1, max_size=5), st.integers(1, 9), st.integers(1, 5), st.integers(0, 999))
def test_rows_are_the_specifications(lengths: list[int], recent: int, sessions: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    steps = random.choice([0, 5, GAP_S - 1, GAP_S, 90_000], offsets[-1])
    seconds = np.concatenate([np.cumsum(part) for part in np.split(steps, offsets[1:-1])]).astype(np.int32)
    tokens = random.integers(0, 9, offsets[-1]).astype(np.int32)
    codes = random.integers(0, 20, (offsets[-1], 3)).astype(np.int32)
    table, features, strength = (torch.randn(*shape, generator=generator) for shape in ((9, 4), (20, 4), (20,)))
    wanted, times, ends = hierarchical_sequence_fusion(
        table, features, strength, *map(torch.from_numpy, (tokens, codes, seconds, offsets)), recent, sessions, GAP_S
    )
    condensed = SessionPooling.from_inputs(EncoderInputs(tokens, codes, seconds, offsets), recent, sessions)
    assert condensed.offsets.tolist() == ends.tolist()
    assert condensed.seconds.tolist() == times[: ends[-1]].tolist()
    weights = strength[codes.astype(np.int64)].sum(1, keepdim=True).exp()
    whole, items = torch.from_numpy(condensed.is_recent)[:, None], table[tokens.astype(np.int64)]
    events = torch.where(whole, items * weights, items) + features[codes.astype(np.int64)].sum(1)
    found = condensed.pool(events, weights.masked_fill(whole, 1.0))
    torch.testing.assert_close(found, wanted[: ends[-1]], rtol=1e-4, atol=1e-4)


def test_the_newest_events_keep_a_row_of_their_own_and_too_old_sessions_have_none() -> None:
    seconds = np.array([0, 1, 5000, 5001, 20_000, 20_001, 20_002], np.int32)
    nothing = np.zeros((7, 1), np.int32)
    condensed = SessionPooling.from_inputs(
        EncoderInputs(nothing[:, 0], nothing, seconds, np.array([0, 7])), recent=2, sessions=2
    )
    assert condensed.rows.tolist() == [4, 4, 0, 0, 1, 2, 3]
    assert condensed.is_recent.tolist() == [False] * 5 + [True] * 2
