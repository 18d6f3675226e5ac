import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.sequences import UserSequences
from pipeline.features.inputs import encode
from pipeline.features.labels import LabelRules, compute_labels
from pipeline.items.catalogue import ItemFacts
from pipeline.items.vocabulary import Vocabulary
from pipeline.records import EVENT_DTYPE, Event, EventPacker, EventSchema, Histories
from pipeline.strategies.exclusion import Exclusion
from pipeline.training.batches import TrainingColumns, batch_crops, make_batch, random_crops

SCHEMA = EventSchema()
RULES = LabelRules.from_options(SCHEMA)
RING = 512
EVERYTHING = Exclusion()
NOTHING = Exclusion(action_codes=())
CARTS = Exclusion.from_names(("cart",), 0, SCHEMA)
EXCLUSIONS = (EVERYTHING, NOTHING, CARTS, Exclusion(window_ms=4000), Exclusion(CARTS.action_codes, 7000))
Log = list[tuple[int, int]]  # (user, item) in time order
logs = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5)), min_size=1, max_size=80)


def action_at(time: int) -> str:
    return "cart" if time % 3 == 0 else "view"


def sequences_of(log: Log) -> UserSequences:
    packer = EventPacker(SCHEMA)
    packed = b"".join(packer.pack(Event(str(u), f"i{i}", action_at(t), 1000 * t)) for t, (u, i) in enumerate(log))
    events = np.frombuffer(packed, EVENT_DTYPE)
    vocabulary = Vocabulary(f"i{i}" for i in range(6))
    return UserSequences.from_columns(events, vocabulary.tokens(events["item"]), np.array([user for user, _ in log]))


def columns_of(log: Log, exclusion: Exclusion = EVERYTHING, ring_events: int = RING) -> TrainingColumns:
    return TrainingColumns.from_sequences(sequences_of(log), RULES, exclusion, ring_events)


def tokens_by_user(log: Log) -> list[list[int]]:
    """Return each user's tokens in plain Python, by ascending user."""
    return [[item + 1 for u, item in log if u == user] for user in sorted({user for user, _ in log})]


@given(logs)
def test_sequences_hold_every_users_events_in_log_order(log: Log) -> None:
    sequences = sequences_of(log)
    bounds = zip(sequences.offsets[:-1], sequences.offsets[1:], strict=True)
    assert [sequences.tokens[begin:end].tolist() for begin, end in bounds] == tokens_by_user(log)
    assert [log[position][1] + 1 for position in sequences.log_positions] == sequences.tokens.tolist()
    is_first = [pair not in log[:position] for position, pair in enumerate(log)]
    assert sequences.is_first_touch.tolist() == [is_first[position] for position in sequences.log_positions.tolist()]


@given(logs, st.integers(1, 30))
def test_columns_of_chunks_equal_columns_of_all_users(log: Log, chunk_events: int) -> None:
    sequences = sequences_of(log)
    histories = sequences.histories
    chunks = list(histories.chunks(chunk_events))
    assert [rows.start for rows, _ in chunks] == [0, *(rows.stop for rows, _ in chunks[:-1])]
    assert all(len(chunk.events) <= chunk_events or len(chunk) == 1 for _, chunk in chunks)
    facts = ItemFacts.unknown(len(log))
    parts = [encode(chunk, sequences.tokens[rows], facts.select(rows), RULES, RING) for rows, chunk in chunks]
    at_once = encode(histories, sequences.tokens, facts, RULES, RING)
    assert np.array_equal(np.concatenate([part.events.feature_ids for part in parts]), at_once.events.feature_ids)
    assert np.array_equal(np.concatenate([part.visits for part in parts]), at_once.visits)
    assert np.array_equal(np.concatenate([part.affinity.engaged for part in parts]), at_once.affinity.engaged)
    labels = [compute_labels(chunk, RULES, 1000 * len(log)) for _, chunk in chunks]
    assert np.array_equal(np.concatenate(labels), compute_labels(histories, RULES, 1000 * len(log)), equal_nan=True)


@given(logs, st.integers(1, 5), st.data())
def test_history_before_an_event_ends_just_before_it(log: Log, max_events: int, data: st.DataObject) -> None:
    sequences = sequences_of(log)
    positions = data.draw(st.lists(st.integers(0, len(log) - 1), max_size=8))
    histories = sequences.histories_before(np.array(positions, np.int64), max_events)
    for row, position in enumerate(positions):
        end = int(sequences.log_positions[position])
        expected = [time * 1000 for time, (user, _) in enumerate(log[:end]) if user == log[end][0]][-max_events:]
        assert histories.ts_ms[histories.offsets[row] : histories.offsets[row + 1]].tolist() == expected


@given(st.lists(st.integers(1, 60), min_size=1, max_size=20), st.integers(1, 25), st.integers(0, 99))
def test_crops_cover_every_event_once_within_their_length(lengths: list[int], length: int, seed: int) -> None:
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    starts, sizes = random_crops(offsets, length, np.random.default_rng(seed))
    covered = np.concatenate([np.arange(a, a + n) for a, n in zip(starts, sizes, strict=True)])
    assert sorted(covered.tolist()) == list(range(offsets[-1]))
    assert 0 < sizes.min() <= sizes.max() <= length
    users = np.searchsorted(offsets, starts, side="right")
    assert (users == np.searchsorted(offsets, starts + sizes - 1, side="right")).all()


@given(st.lists(st.integers(1, 30), min_size=1, max_size=60), st.integers(10, 100), st.integers(0, 99))
def test_batches_hold_every_crop_once(lengths: list[int], events_per_batch: int, seed: int) -> None:
    sizes = np.array(lengths)
    starts = np.arange(len(lengths))
    batches = batch_crops(starts, sizes, events_per_batch, np.random.default_rng(seed))
    assert sorted(np.concatenate([crops for crops, _ in batches]).tolist()) == starts.tolist()
    assert all((sizes[crops] == crop_lengths).all() for crops, crop_lengths in batches)
    assert all(crop_lengths.sum() < events_per_batch + sizes.max() for _, crop_lengths in batches)


@given(logs, st.sampled_from(EXCLUSIONS), st.integers(1, 12), st.integers(1, 20), st.integers(0, 99))
def test_row_targets_the_next_event_among_what_serving_would_not_exclude(
    log: Log, exclusion: Exclusion, ring_events: int, length: int, seed: int
) -> None:
    columns = columns_of(log, exclusion, ring_events)
    rng = np.random.default_rng(seed)
    starts, sizes = random_crops(columns.inputs.events.offsets, length, rng)
    batch = make_batch(columns, starts, sizes, 0.0, rng)
    order = np.argsort(sizes, kind="stable")
    expected_excluded = set()
    expected_rows = []
    for row, (start, position) in enumerate(positions_of_crops(starts[order], sizes[order])):
        user = int(np.searchsorted(columns.inputs.events.offsets, position, side="right")) - 1
        begin, end = columns.inputs.events.offsets[user : user + 2].tolist()
        following = int(columns.inputs.events.item_rows[position + 1]) if position + 1 < end else 0
        assert batch.successors[row] == following
        ring = range(max(begin, position + 1 - ring_events), position + 1)
        excluding = [event for event in ring if excludes(exclusion, columns.events, event, position)]
        tokens = columns.inputs.events.item_rows
        if following and following not in tokens[excluding].tolist():
            own = [int(tokens[event]) for event in excluding if event >= start]
            expected_excluded |= {(len(expected_rows), token) for token in own}
            expected_rows.append(row)
    assert batch.target_rows.tolist() == expected_rows
    assert {(int(target), int(token)) for target, token in zip(*batch.excluded, strict=True)} == expected_excluded


def positions_of_crops(starts: np.ndarray, sizes: np.ndarray) -> list[tuple[int, int]]:
    """Return (start of its crop, position) of each row."""
    return [(a, position) for a, n in zip(starts.tolist(), sizes.tolist(), strict=True) for position in range(a, a + n)]


def excludes(exclusion: Exclusion, events: np.ndarray, event: int, newest: int) -> bool:
    """Return in plain Python whether the event keeps its item off the slate after `newest`."""
    history = Histories(events, np.array([0, len(events)]))
    if exclusion.action_codes is not None and history.actions[event] not in exclusion.action_codes:
        return False
    return not exclusion.window_ms or history.ts_ms[event] >= history.ts_ms[newest] - exclusion.window_ms


@given(logs, st.integers(1, 9), st.integers(0, 30), st.integers(0, 99))
def test_crop_inputs_begin_with_older_events_of_the_same_user(log: Log, length: int, older: int, seed: int) -> None:
    columns = columns_of(log)
    columns.older_events = older
    rng = np.random.default_rng(seed)
    starts, sizes = random_crops(columns.inputs.events.offsets, length, rng)
    batch = make_batch(columns, starts, sizes, 0.0, rng)
    order = np.argsort(sizes, kind="stable")
    assert np.diff(batch.offsets).tolist() == sizes[order].tolist()
    for crop, (start, size) in enumerate(zip(starts[order], sizes[order], strict=True)):
        user = int(np.searchsorted(columns.inputs.events.offsets, start, side="right")) - 1
        source = slice(max(columns.inputs.events.offsets[user], start - older), start + size)
        rows = slice(*batch.inputs.offsets[crop : crop + 2])
        assert batch.inputs.item_rows[rows].tolist() == columns.inputs.events.item_rows[source].tolist()
        assert batch.inputs.seconds[rows].tolist() == columns.inputs.events.seconds[source].tolist()
        assert (batch.inputs.feature_ids[rows] == columns.inputs.events.feature_ids[source]).all()
        own_rows = slice(*batch.offsets[crop : crop + 2])
        assert batch.successors[own_rows].tolist() == columns.successors[start : start + size].tolist()


def test_fraction_of_input_items_is_made_unknown_but_no_target() -> None:
    columns = columns_of([(0, step % 6) for step in range(4000)], exclusion=NOTHING)
    batch = make_batch(columns, np.array([0]), np.array([4000]), 0.25, np.random.default_rng(0))
    assert 0.22 < (batch.inputs.item_rows == 0).mean() < 0.28
    assert (batch.successors[:-1] == columns.inputs.events.item_rows[1:]).all()
