import numpy as np

from pipeline.data.event_log import event_log_from_blocks
from pipeline.data.sequences import UserSequences
from pipeline.evaluation.head_predictions import held_out_labels
from pipeline.features.labels import compute_labels
from pipeline.items.vocabulary import Vocabulary
from pipeline.records import Event, EventSchema

SCHEMA, DAY_MS = EventSchema(), 86_400_000
DAYS = 30


def corpora() -> tuple[UserSequences, UserSequences, np.ndarray]:
    """Three users, one event a day and user; the last 10 days are the validation slice."""
    rows = [Event(f"u{user}", f"i{day % 7}", "like", day * DAY_MS + user) for day in range(DAYS) for user in range(3)]
    log = event_log_from_blocks([rows], SCHEMA)
    vocabulary, late = Vocabulary(log.item_ids), log.ts_ms >= 20 * DAY_MS
    known = UserSequences.from_log(log, vocabulary)
    return known, UserSequences.from_log(log.select(~late), vocabulary), late[known.log_positions]


def test_labels_to_calibrate_on_are_those_that_only_the_validation_slice_tells() -> None:
    known, fit, validation = corpora()
    labels = held_out_labels(known, fit, validation, SCHEMA)
    days = np.tile(np.arange(DAYS), 3)
    told = np.isfinite(labels)
    assert set(days[told[:, 0]]) == set(range(19, 29)), "the next event lies in the slice"
    assert set(days[told[:, 1]]) == set(range(12, 22)), "a week passes within the slice"
    np.testing.assert_array_equal(told[:, 0], told[:, 2])


def test_they_are_the_labels_of_the_whole_and_none_of_them_was_learnt() -> None:
    known, fit, validation = corpora()
    labels = held_out_labels(known, fit, validation, SCHEMA)
    whole = compute_labels(known.histories, SCHEMA, 29 * DAY_MS + 2)
    told = np.isfinite(labels)
    np.testing.assert_array_equal(labels[told], whole[told])
    learnt = np.isfinite(compute_labels(fit.histories, SCHEMA, 19 * DAY_MS + 2))
    assert not told[~validation][learnt].any()
