import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.sequences import UserSequences, split_index
from pipeline.features.event_features import encoder_inputs
from pipeline.features.labels import compute_labels
from pipeline.features.visit_frequency import visit_frequency
from pipeline.items.vocabulary import Vocabulary
from pipeline.records import EVENT_DTYPE, Event, EventPacker, EventSchema
from pipeline.training.batches import TrainingColumns, batch_crops, make_batch, random_crops

SCHEMA = EventSchema()
logs = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5)), min_size=1, max_size=80)  # (user, item) in time order


def corpus_of(log: list[tuple[int, int]]) -> UserSequences:
    packer = EventPacker(SCHEMA)
    packed = b"".join(packer.pack(Event(str(u), f"i{i}", "view", 1000 * t)) for t, (u, i) in enumerate(log))
    events = np.frombuffer(packed, EVENT_DTYPE)
    vocabulary = Vocabulary(f"i{i}" for i in range(6))
    return UserSequences.from_columns(events, vocabulary.tokens(events["item"]), np.array([user for user, _ in log]))


def examples_of(log: list[tuple[int, int]], repeats: bool = False) -> TrainingColumns:
    return TrainingColumns.from_sequences(corpus_of(log), SCHEMA, repeats)


def walked(log: list[tuple[int, int]]) -> list[tuple[int, list[int]]]:
    """Plain Python: users in order of their number, each with its items' tokens."""
    return [(user, [item + 1 for u, item in log if u == user]) for user in sorted({user for user, _ in log})]


@given(logs)
def test_a_corpus_holds_every_users_events_in_the_logs_order(log: list[tuple[int, int]]) -> None:
    corpus = corpus_of(log)
    runs = [corpus.tokens[a:b].tolist() for a, b in zip(corpus.offsets[:-1], corpus.offsets[1:], strict=True)]
    assert runs == [tokens for _, tokens in walked(log)]
    assert [log[place][1] + 1 for place in corpus.log_positions] == corpus.tokens.tolist()
    seen: set[tuple[int, int]] = set()
    new = {place: (pair not in seen, seen.add(pair))[0] for place, pair in enumerate(log)}
    assert corpus.is_first_touch.tolist() == [new[place] for place in corpus.log_positions.tolist()]


@given(logs, st.integers(1, 30))
def test_columns_made_from_some_users_at_a_time_are_those_of_all_at_once(log: list[tuple[int, int]], room: int) -> None:
    corpus = corpus_of(log)
    whole, parts = corpus.histories, list(corpus.histories.chunks(room))
    assert [place.start for place, _ in parts] == [0, *(place.stop for place, _ in parts[:-1])]
    assert all(len(part.events) <= room or len(part) == 1 for _, part in parts)
    codes = [encoder_inputs(part, corpus.tokens[place], 7).feature_ids for place, part in parts]
    assert np.array_equal(np.concatenate(codes), encoder_inputs(whole, corpus.tokens, 7).feature_ids)
    rhythms = [visit_frequency(part, np.arange(len(part.events))) for _, part in parts]
    assert np.array_equal(np.concatenate(rhythms), visit_frequency(whole, np.arange(len(log))))
    labels = [compute_labels(part, SCHEMA, 1000 * len(log)) for _, part in parts]
    assert np.array_equal(np.concatenate(labels), compute_labels(whole, SCHEMA, 1000 * len(log)), equal_nan=True)


@given(logs, st.integers(1, 5), st.data())
def test_a_history_ends_just_before_its_event(log: list[tuple[int, int]], cap: int, data: st.DataObject) -> None:
    corpus = corpus_of(log)
    positions = data.draw(st.lists(st.integers(0, len(log) - 1), max_size=8))
    histories = corpus.histories_before(np.array(positions, np.int64), cap)
    for row, position in enumerate(positions):
        place = int(corpus.log_positions[position])
        wanted = [time * 1000 for time, (user, _) in enumerate(log[:place]) if user == log[place][0]][-cap:]
        assert histories.ts_ms[histories.offsets[row] : histories.offsets[row + 1]].tolist() == wanted


@given(st.lists(st.integers(0, 50), min_size=1, max_size=40).map(sorted), st.floats(0, 1))
def test_a_cut_never_splits_one_time(times: list[int], share: float) -> None:
    place = split_index(np.array(times), share)
    assert place == len(times) or place == 0 or times[place - 1] < times[place]
    assert place <= share * len(times)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=20), st.integers(1, 25), st.integers(0, 99))
def test_crops_cover_every_event_once_and_are_no_longer_than_asked(lengths: list[int], length: int, seed: int) -> None:
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    starts, sizes = random_crops(offsets, length, np.random.default_rng(seed))
    covered = np.concatenate([np.arange(a, a + n) for a, n in zip(starts, sizes, strict=True)])
    assert sorted(covered.tolist()) == list(range(offsets[-1]))
    assert 0 < sizes.min() <= sizes.max() <= length
    users = np.searchsorted(offsets, starts, side="right")
    assert (users == np.searchsorted(offsets, starts + sizes - 1, side="right")).all()


@given(st.lists(st.integers(1, 30), min_size=1, max_size=60), st.integers(10, 100), st.integers(0, 99))
def test_batches_hold_every_crop_once(lengths: list[int], batch_events: int, seed: int) -> None:
    sizes, starts = np.array(lengths), np.arange(len(lengths))
    parts = batch_crops(starts, sizes, batch_events, np.random.default_rng(seed))
    assert sorted(np.concatenate([part[0] for part in parts]).tolist()) == starts.tolist()
    assert all((sizes[part[0]] == part[1]).all() for part in parts)
    assert all(part[1].sum() < batch_events + sizes.max() for part in parts)


@settings(deadline=None)
@given(logs, st.booleans(), st.integers(1, 20), st.integers(0, 99))
def test_a_row_asks_for_the_users_next_event_and_knows_what_the_crop_showed(
    log: list[tuple[int, int]], repeats: bool, length: int, seed: int
) -> None:
    examples, random = examples_of(log, repeats), np.random.default_rng(seed)
    starts, sizes = random_crops(examples.inputs.offsets, length, random)
    batch = make_batch(examples, starts, sizes, 0.0, random)
    order = np.argsort(sizes, kind="stable")
    index = np.concatenate([np.arange(a, a + n) for a, n in zip(starts[order], sizes[order], strict=True)])
    seen = {(int(row), int(token)) for row, token in zip(*batch.seen, strict=True)}
    wanted_seen, wanted_asked = set(), []
    for row, position in enumerate(index.tolist()):
        user = int(np.searchsorted(examples.inputs.offsets, position, side="right")) - 1
        start, stop = examples.inputs.offsets[user : user + 2].tolist()
        rows = examples.inputs.item_rows[start:stop].tolist()
        place = position - start
        following = rows[place + 1] if place + 1 < len(rows) else 0
        assert batch.successors[row] == following
        if following and (repeats or following not in rows[: place + 1]):
            crop = int(np.searchsorted(batch.inputs.offsets, row, side="right")) - 1
            shown = batch.inputs.item_rows[batch.inputs.offsets[crop] : row + 1].tolist()
            wanted_seen |= {(len(wanted_asked), token) for token in shown}
            wanted_asked.append(row)
    assert batch.target_rows.tolist() == wanted_asked
    assert seen == wanted_seen


@settings(deadline=None)
@given(logs, st.integers(1, 9), st.integers(0, 30), st.integers(0, 99))
def test_a_crop_is_shown_behind_the_older_events_of_its_own_user(
    log: list[tuple[int, int]], length: int, older: int, seed: int
) -> None:
    examples, random = examples_of(log), np.random.default_rng(seed)
    examples.older_events = older
    starts, sizes = random_crops(examples.inputs.offsets, length, random)
    batch = make_batch(examples, starts, sizes, 0.0, random)
    order = np.argsort(sizes, kind="stable")
    assert np.diff(batch.offsets).tolist() == sizes[order].tolist()
    for crop, (start, size) in enumerate(zip(starts[order], sizes[order], strict=True)):
        user = int(np.searchsorted(examples.inputs.offsets, start, side="right")) - 1
        shown = slice(max(examples.inputs.offsets[user], start - older), start + size)
        rows = slice(*batch.inputs.offsets[crop : crop + 2])
        assert batch.inputs.item_rows[rows].tolist() == examples.inputs.item_rows[shown].tolist()
        assert batch.inputs.seconds[rows].tolist() == examples.inputs.seconds[shown].tolist()
        assert (batch.inputs.feature_ids[rows] == examples.inputs.feature_ids[shown]).all()
        assert batch.successors[slice(*batch.offsets[crop : crop + 2])].tolist() == (
            examples.successors[start : start + size].tolist()
        )


def test_a_share_of_the_input_items_is_hidden_and_no_target() -> None:
    examples = examples_of([(0, step % 6) for step in range(4000)], repeats=True)
    batch = make_batch(examples, np.array([0]), np.array([4000]), 0.25, np.random.default_rng(0))
    assert 0.22 < (batch.inputs.item_rows == 0).mean() < 0.28
    assert (batch.successors[:-1] == examples.inputs.item_rows[1:]).all()
