import numpy as np
import pytest

from pipeline.data.event_log import event_log_from_blocks
from pipeline.data.sequences import UserSequences
from pipeline.errors import EvaluationError
from pipeline.evaluation.negatives import NegativeSampling, sample_negatives
from pipeline.evaluation.ranking import HeldOutEvents
from pipeline.items.vocabulary import Vocabulary
from pipeline.records import Event, EventSchema


def random_test_events(users: int = 30, items: int = 40, events: int = 300) -> tuple[HeldOutEvents, np.ndarray]:
    """Return every second event of a random log, and the event counts by token."""
    rng = np.random.default_rng(4)
    log = event_log_from_blocks(
        [[Event(f"u{rng.integers(users)}", f"i{rng.integers(items)}", "view", n) for n in range(events)]],
        EventSchema(),
    )
    sequences = UserSequences.from_log(log, Vocabulary(f"i{number}" for number in range(items)))
    return HeldOutEvents(sequences, np.arange(0, events, 2), 50), np.bincount(sequences.tokens, minlength=items + 1)


@pytest.mark.parametrize("by", ["uniform", "popularity"])
def test_negatives_are_distinct_items_that_the_user_never_touches(by: str) -> None:
    test, counts = random_test_events()
    negatives = sample_negatives(NegativeSampling(15, 0, by), test, counts)  # pyright: ignore[reportArgumentType]
    users = np.repeat(np.arange(len(test.sequences.offsets) - 1), np.diff(test.sequences.offsets))
    for user, row in zip(test.users, negatives, strict=True):
        assert len(set(row.tolist())) == 15
        assert row.min() > 0
        assert not set(row.tolist()) & set(test.sequences.tokens[users == user].tolist())


def test_negatives_depend_on_the_seed_alone() -> None:
    test, counts = random_test_events()
    first, again, other = (sample_negatives(NegativeSampling(10, seed), test, counts) for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()


@pytest.mark.parametrize(
    ("by", "expected"), [("uniform", [0.25] * 4), ("popularity", [0.1, 0.2, 0.3, 0.4])], ids=["uniform", "popularity"]
)
def test_negatives_are_drawn_uniformly_or_by_popularity(by: str, expected: list[float]) -> None:
    log = event_log_from_blocks([[Event("u", "i0", "view", 0)]], EventSchema())
    sequences = UserSequences.from_log(log, Vocabulary(f"i{number}" for number in range(5)))
    test = HeldOutEvents(sequences, np.zeros(4000, np.int64), 1)  # the same event 4000 times
    counts = np.array([0, 4000, 9, 19, 29, 39])
    negatives = sample_negatives(NegativeSampling(1, 0, by), test, counts)  # pyright: ignore[reportArgumentType]
    frequency = np.bincount(negatives[:, 0], minlength=6)[2:] / 4000
    assert frequency == pytest.approx(expected, abs=0.03)


def test_too_few_untouched_items_are_rejected() -> None:
    test, counts = random_test_events(items=20)
    with pytest.raises(EvaluationError, match=r"20 requested, but one user has only \d+ untouched .* request fewer"):
        sample_negatives(NegativeSampling(20), test, counts)
