"""A model that reads old events in sessions: the same in training and in service, and blind to what is to come."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from torch import Tensor

from kernels.hierarchical_sequence_fusion.reference import hierarchical_sequence_fusion
from pipeline import artifact as artifacts
from pipeline.backends.torch import TorchEncoder
from pipeline.data.sequences import UserSequences
from pipeline.evaluation.evaluate import EvaluationOptions, evaluate
from pipeline.features.event_features import N_FEATURE_IDS, SESSION_GAP_MS, EncoderInputs, encoder_inputs
from pipeline.items.catalogue import Catalogue
from pipeline.items.vocabulary import Vocabulary
from pipeline.model.config import HstuConfig
from pipeline.model.heads import HeadContext
from pipeline.model.hstu import Hstu
from pipeline.records import Event, EventSchema, Histories
from pipeline.serving.hstu_strategy import HstuStrategy
from pipeline.serving.pipeline import PipelineOptions
from pipeline.training.batches import TrainingBatch, TrainingColumns, make_batch
from pipeline.training.train import TrainingOptions, train
from pipeline.training.trainer import MultiTaskModel, TrainerOptions
from tests.pipeline.training.test_train import CREATED, Silent, log_of

IDS = [f"i{number}" for number in range(12)]
VOCABULARY, SCHEMA, SERVING = Vocabulary(IDS), EventSchema(), PipelineOptions(device="cpu", threads=1)
CONFIG = HstuConfig(
    items=1 + len(IDS), width=8, heads=2, d_qk=4, d_v=4, max_events=9, content_rows=0, recent_events=5,
    history_events=20,
)  # fmt: skip
NO_COUNTERS = {"items": np.zeros(0, np.uint64), "popularity": np.zeros(0), "values": np.zeros(0, np.float32)}
LENGTHS = (3, 5, 6, 19, 20, 21, 40)


def histories_of(lengths: tuple[int, ...] = LENGTHS) -> Histories:
    random, users = np.random.default_rng(1), []
    for length in lengths:
        ts_ms = np.cumsum(random.choice([0, 60_000, SESSION_GAP_MS, 90_000_000], length))
        actions = random.choice(["view", "like", "cart"], length)
        users.append([Event("u", str(random.choice(IDS)), str(a), int(t)) for a, t in zip(actions, ts_ms, strict=True)])
    return Histories.from_events(users, SCHEMA)


def model() -> MultiTaskModel:
    torch.manual_seed(3)
    made = MultiTaskModel(CONFIG).eval()
    for parameter in made.parameters():  # strengths and biases begin at zero and would hide their errors
        torch.nn.init.normal_(parameter, std=0.3)
    return made


def batch_of_newest(histories: Histories, count: int) -> TrainingBatch:
    """One crop a user, of the newest events, as training would take it."""
    corpus = UserSequences.from_columns(histories.events, VOCABULARY.tokens(histories.items), histories.users)
    examples = TrainingColumns.from_sequences(corpus, SCHEMA, repeats=True)
    examples.older_events = CONFIG.history_length - CONFIG.recent_length
    counts = np.minimum(histories.lengths, count)
    return make_batch(examples, histories.offsets[1:] - counts, counts, 0.0, np.random.default_rng(0))


def asked_in_training(trained: MultiTaskModel, batch: TrainingBatch) -> tuple[list[Tensor], HeadContext]:
    """States of each crop's own events, [events, width] a crop, and what the heads read beside them."""
    told: list[tuple[Tensor, Tensor, Tensor, HeadContext]] = []
    handle = trained.heads.register_forward_pre_hook(lambda _, arguments: told.append(arguments))
    trained.losses(batch, np.full(CONFIG.items, 1 / CONFIG.items), np.random.default_rng(0))
    handle.remove()
    ((states, _, _, context),) = told
    return list(states.tensor_split(torch.from_numpy(batch.offsets[1:-1]))), context


def test_service_and_training_give_the_same_state_on_the_same_history() -> None:
    trained, histories = model(), histories_of()
    states, _ = asked_in_training(trained, batch_of_newest(histories, 5))
    artifact = artifacts.draft(CONFIG, SCHEMA, trained.state_dict(), IDS, NO_COUNTERS)
    rung = HstuStrategy(artifact, Catalogue(Vocabulary(IDS)), SERVING.exclusion, "cpu", 1)
    tokens = np.tile(np.arange(1, CONFIG.items, dtype=np.int32), (len(histories), 1))
    logits = torch.stack([run[-1] for run in states]) @ trained.hstu.scoring_table(trained.hstu.items())[1:].T
    np.testing.assert_allclose(rung.scores(histories, tokens), logits.detach().numpy(), rtol=1e-4, atol=1e-4)


def test_the_heads_are_trained_on_a_crops_own_events() -> None:
    trained, histories = model(), histories_of()
    batch = batch_of_newest(histories, 5)
    _, context = asked_in_training(trained, batch)
    own = np.concatenate([run[-5:] for run in np.split(np.arange(len(histories.items)), histories.offsets[1:-1])])
    tokens = torch.from_numpy(VOCABULARY.tokens(histories.items)[own])
    codes = encoder_inputs(histories, VOCABULARY.tokens(histories.items), CONFIG.items).feature_ids[own]
    items = trained.hstu.items()[tokens]
    assert torch.equal(context.items, items)
    torch.testing.assert_close(context.events, trained.hstu.event_rows(items, torch.from_numpy(codes)))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(0, 99))
def test_a_later_event_never_changes_an_earlier_state(place: int, seed: int) -> None:
    trained, random = model(), np.random.default_rng(seed)
    batch, changed = (batch_of_newest(histories_of((30,)), 5) for _ in range(2))
    later = np.arange(len(changed.inputs.item_rows)) >= len(changed.inputs.item_rows) - 5 + place
    changed.inputs.item_rows[later] = random.integers(0, CONFIG.items, later.sum())
    changed.inputs.feature_ids[later] = random.integers(0, N_FEATURE_IDS, changed.inputs.feature_ids[later].shape)
    changed.inputs.seconds[later] += 5_000
    ((before,), _), ((after,), _) = asked_in_training(trained, batch), asked_in_training(trained, changed)
    assert torch.equal(before[:place], after[:place])
    assert not torch.equal(before[place], after[place])


def test_a_state_knows_of_events_before_its_rows_and_of_none_before_its_history() -> None:
    encoder = TorchEncoder(artifacts.draft(CONFIG, SCHEMA, model().state_dict(), IDS, NO_COUNTERS), "cpu", 1)
    histories = histories_of((40,))
    inputs = encoder_inputs(histories, VOCABULARY.tokens(histories.items), CONFIG.items)
    inputs.seconds[:] = np.arange(40) // 10 * 90_000  # four sessions, the rows have room for all
    told = []
    for place in range(40):
        changed = EncoderInputs(inputs.item_rows.copy(), inputs.feature_ids, inputs.seconds, inputs.offsets)
        changed.item_rows[place] = inputs.item_rows[place] % len(IDS) + 1
        states = [encoder.encode(events.tail(encoder.max_events)) for events in (inputs, changed)]
        told.append(not torch.equal(*states))
    assert told == [False] * 20 + [True] * 20
    assert CONFIG.receptive_field - HstuConfig(max_events=9).receptive_field == 20 - 9


@pytest.mark.parametrize("strength", [False, True])
def test_sessions_are_the_specifications_and_so_are_their_gradients(strength: bool) -> None:
    config, histories = replace(CONFIG, strength=strength), histories_of()
    torch.manual_seed(5)
    hstu = Hstu(config)
    torch.nn.init.normal_(hstu.log_strength.weight, std=0.5)
    inputs = encoder_inputs(histories, VOCABULARY.tokens(histories.items), config.items).tail(config.history_length)
    tokens, codes, seconds, offsets = map(
        torch.from_numpy, (inputs.item_rows, inputs.feature_ids, inputs.seconds, inputs.offsets)
    )
    rows, short = hstu.sequences(hstu.items()[tokens], codes, inputs)
    specified, times, ends = hierarchical_sequence_fusion(
        hstu.rotation(hstu.items()), hstu.feature_embedding.weight,
        hstu.log_strength.weight[:, 0] if strength else torch.zeros(N_FEATURE_IDS),
        tokens, codes, seconds, offsets, 5, 4, SESSION_GAP_MS // 1000,
    )  # fmt: skip
    assert short.offsets.tolist() == ends.tolist()
    assert short.seconds.tolist() == times[: ends[-1]].tolist()
    newest = torch.zeros(len(rows), dtype=torch.bool)
    for stop, length in zip(ends[1:].tolist(), histories.lengths.tolist(), strict=True):
        newest[stop - min(5, length) : stop] = True
    own = hstu.event_rows(hstu.items()[tokens], codes)
    kept = torch.cat([part[-5:] for part in own.tensor_split(offsets[1:-1])])
    wanted = specified[: ends[-1]].masked_scatter(newest[:, None], kept)
    torch.testing.assert_close(rows, wanted, rtol=1e-4, atol=1e-5)
    direction, gradients = torch.randn_like(rows), []
    for made in (rows, wanted):
        hstu.zero_grad()
        (made * direction).sum().backward(retain_graph=True)
        gradients.append({name: p.grad.clone() for name, p in hstu.named_parameters() if p.grad is not None})
    assert ("log_strength.weight" in gradients[0]) == strength
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-4, msg=name)


def test_a_model_of_sessions_is_trained_saved_and_judged_alike(tmp_path: Path) -> None:
    trainer = TrainerOptions(epochs=2, crop_length=200, events_per_batch=256)
    shape = HstuConfig(width=16, max_events=6, recent_events=4, history_events=18)
    log, observer = log_of(), Silent()
    manifest = train(log, tmp_path / "model", TrainingOptions(trainer, shape), SERVING, observer, CREATED)
    loaded = artifacts.load(tmp_path / "model")
    assert (loaded.version, loaded.config.recent_events, loaded.config.history_length) == (manifest.version, 4, 18)
    report = evaluate(loaded, log, SERVING, EvaluationOptions())
    assert 0 < report.rankings["hstu"].at[10].hit_rate.value < 1
