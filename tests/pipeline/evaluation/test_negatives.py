import numpy as np
import pytest

from pipeline.data.event_log import event_log_from_blocks
from pipeline.data.sequences import UserSequences
from pipeline.errors import EvaluationError
from pipeline.evaluation.negatives import NegativeSampling, sample_negatives
from pipeline.evaluation.ranking import HeldOutEvents
from pipeline.items.vocabulary import Vocabulary
from pipeline.records import Event, EventSchema


def scored_of(users: int = 30, items: int = 40, events: int = 300) -> tuple[HeldOutEvents, np.ndarray]:
    """And the items' counts, by token."""
    random = np.random.default_rng(4)
    log = event_log_from_blocks(
        [[Event(f"u{random.integers(users)}", f"i{random.integers(items)}", "view", n) for n in range(events)]],
        EventSchema(),
    )
    corpus = UserSequences.from_log(log, Vocabulary(f"i{number}" for number in range(items)))
    return HeldOutEvents(corpus, np.arange(0, events, 2), 50), np.bincount(corpus.tokens, minlength=items + 1)


@pytest.mark.parametrize("by", ["uniform", "popularity"])
def test_negatives_are_distinct_items_that_the_user_never_touches(by: str) -> None:
    scored, counts = scored_of()
    drawn = sample_negatives(NegativeSampling(15, 0, by), scored, counts)  # pyright: ignore[reportArgumentType]
    users = np.repeat(np.arange(len(scored.sequences.offsets) - 1), np.diff(scored.sequences.offsets))
    for user, row in zip(scored.users, drawn, strict=True):
        assert len(set(row.tolist())) == 15
        assert row.min() > 0
        assert not set(row.tolist()) & set(scored.sequences.tokens[users == user].tolist())


def test_the_seed_decides_and_nothing_else() -> None:
    scored, counts = scored_of()
    first, again, other = (sample_negatives(NegativeSampling(10, seed), scored, counts) for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()


def test_uniform_ones_are_all_alike_and_popular_ones_come_as_often_as_they_are_popular() -> None:
    events = [Event("u", "i0", "view", n) for n in range(4000)]
    corpus = UserSequences.from_log(
        event_log_from_blocks([events], EventSchema()), Vocabulary(f"i{number}" for number in range(5))
    )
    scored, counts = HeldOutEvents(corpus, np.arange(4000), 1), np.array([0, 4000, 9, 19, 29, 39])
    for by, wanted in [("uniform", [0.25] * 4), ("popularity", [0.1, 0.2, 0.3, 0.4])]:
        drawn = sample_negatives(NegativeSampling(1, 0, by), scored, counts)  # pyright: ignore[reportArgumentType]
        shares = np.bincount(drawn[:, 0], minlength=6)[2:] / 4000
        assert shares == pytest.approx(wanted, abs=0.03)


def test_too_few_untouched_items_are_one_sentence() -> None:
    scored, counts = scored_of(items=20)
    with pytest.raises(
        EvaluationError, match=r"20 requested, but one user has only \d+ untouched items .* request fewer"
    ):
        sample_negatives(NegativeSampling(20), scored, counts)
