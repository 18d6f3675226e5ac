import numpy as np
import pytest

from pipeline.data.event_log import event_log_from_blocks
from pipeline.data.sequences import UserSequences
from pipeline.evaluation.head_predictions import fit_calibration, held_out_labels
from pipeline.features.labels import TASKS, LabelRules, compute_labels
from pipeline.items.vocabulary import Vocabulary
from pipeline.model.calibration import IDENTITY
from pipeline.records import DAY_MS, Event, EventSchema, Histories

SCHEMA = EventSchema()
RULES = LabelRules.from_options(SCHEMA)
DAYS = 30
Sequences = tuple[UserSequences, UserSequences, np.ndarray]  # train, fit, validation mask


@pytest.fixture
def sequences() -> Sequences:
    """Three users with one event per day; the last 10 days are the validation slice."""
    events = [Event(f"u{user}", f"i{day % 7}", "like", day * DAY_MS + user) for day in range(DAYS) for user in range(3)]
    log = event_log_from_blocks([events], SCHEMA)
    vocabulary = Vocabulary(log.item_ids)
    is_late = log.ts_ms >= 20 * DAY_MS
    train = UserSequences.from_log(log, vocabulary)
    return train, UserSequences.from_log(log.select(~is_late), vocabulary), is_late[train.log_positions]


def test_held_out_labels_are_those_that_the_validation_slice_decides(sequences: Sequences) -> None:
    train, fit, validation = sequences
    has_label = np.isfinite(held_out_labels(train, fit, validation, RULES))
    days = np.tile(np.arange(DAYS), 3)
    assert set(days[has_label[:, 0]]) == set(range(19, 29)), "the next event is in the slice"
    assert set(days[has_label[:, 1]]) == set(range(12, 22)), "a week ends within the slice"
    np.testing.assert_array_equal(has_label[:, 0], has_label[:, 2])


def test_held_out_labels_equal_all_labels_without_trained_ones(sequences: Sequences) -> None:
    train, fit, validation = sequences
    labels = held_out_labels(train, fit, validation, RULES)
    all_labels = compute_labels(train.histories, RULES, 29 * DAY_MS + 2)
    has_label = np.isfinite(labels)
    np.testing.assert_array_equal(labels[has_label], all_labels[has_label])
    is_trained = np.isfinite(compute_labels(fit.histories, RULES, 19 * DAY_MS + 2))
    assert not has_label[~validation][is_trained].any()


class Heads:
    """Heads for fit_calibration that say one of two probabilities, whatever the history."""

    def __init__(self, even: float, odd: float) -> None:
        self._even = even
        self._odd = odd

    def probabilities(self, histories: Histories, tokens: np.ndarray) -> np.ndarray:
        said = np.where(histories.lengths % 2, self._odd, self._even)
        return np.tile(said[:, None, None], (1, 1, len(TASKS)))


def daily_sequences(days: int) -> UserSequences:
    """Return 40 users with one event per day."""
    events = [Event(f"u{user}", "i1", "view", day * DAY_MS + user) for day in range(days) for user in range(40)]
    log = event_log_from_blocks([events], SCHEMA)
    return UserSequences.from_log(log, Vocabulary(log.item_ids))


@pytest.mark.parametrize(("days", "is_retention_scaled"), [(13, False), (28, True)])
def test_retention_is_scaled_only_by_labels_of_several_horizons(days: int, is_retention_scaled: bool) -> None:
    train = daily_sequences(days)
    labels = (np.random.default_rng(0).random((len(train), len(TASKS))) < 0.5).astype(np.float32)
    labels[train.offsets[1:] - 1] = np.nan
    calibration = fit_calibration(Heads(0.7, 0.9), train, labels, RULES, 64, 0)
    is_scaled = dict(zip(TASKS, (each != IDENTITY for each in calibration), strict=True))
    assert is_scaled == {"engagement": True, "retention": is_retention_scaled, "monetization": True}


def test_labels_of_one_user_count_as_one() -> None:
    """30 of 40 users are always engaged, where the heads say 0.85: a thousand labels would show that it is too much."""
    train = daily_sequences(28)
    labels = np.repeat((np.arange(40) % 4 > 0).astype(np.float32)[:, None], 28, axis=0).repeat(len(TASKS), axis=1)
    labels[train.offsets[1:] - 1] = np.nan
    calibration = fit_calibration(Heads(0.85, 0.85), train, labels, RULES, 64, 0)
    assert calibration == [IDENTITY] * len(TASKS)
