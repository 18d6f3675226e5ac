"""A model that pools old events into sessions: equal in training and serving, and causal."""

from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.hierarchical_sequence_fusion.reference import hierarchical_sequence_fusion
from pipeline import artifact as artifacts
from pipeline.backends.encoder import EncoderBatch
from pipeline.backends.item_table import ItemTable
from pipeline.backends.staging import Staging
from pipeline.backends.torch import TorchEncoder, TorchModel
from pipeline.data.sequences import UserSequences
from pipeline.evaluation.evaluate import EvaluationOptions, evaluate
from pipeline.features.event_features import N_FEATURE_IDS, SESSION_GAP_S, EncoderInputs, encoder_inputs
from pipeline.features.labels import LabelRules
from pipeline.items.catalogue import Catalogue, ItemFacts
from pipeline.items.vocabulary import Vocabulary
from pipeline.model.config import HstuConfig
from pipeline.model.heads import HeadContext
from pipeline.model.hstu import Hstu
from pipeline.records import Event, EventSchema, Histories
from pipeline.strategies.exclusion import Exclusion
from pipeline.strategies.hstu_strategy import load_hstu_strategy
from pipeline.strategies.options import PipelineOptions
from pipeline.training.batches import TrainingBatch, TrainingColumns, make_batch
from pipeline.training.multi_task_model import MultiTaskModel
from pipeline.training.train import TrainingOptions, train
from pipeline.training.trainer import TrainerOptions
from tests.pipeline.training.test_train import CREATED, RecordingCallback, rule_log

NOTHING_EXCLUDED = Exclusion(action_codes=())
ITEM_IDS = [f"i{number}" for number in range(12)]
VOCABULARY = Vocabulary(ITEM_IDS)
SCHEMA = EventSchema()
RULES = LabelRules.from_options(SCHEMA)
SERVING = PipelineOptions(device="cpu", threads=1)
CONFIG = HstuConfig(
    items=1 + len(ITEM_IDS),
    width=8,
    heads=2,
    d_qk=4,
    d_v=4,
    max_events=9,
    content_rows=0,
    recent_events=5,
    history_events=20,
)
NO_COUNTERS = {"items": np.zeros(0, np.uint64), "popularity": np.zeros(0), "values": np.zeros(0, np.float32)}
LENGTHS = (3, 5, 6, 19, 20, 21, 40)


def make_histories(lengths: tuple[int, ...] = LENGTHS) -> Histories:
    rng = np.random.default_rng(1)
    users = []
    for length in lengths:
        ts_ms = np.cumsum(rng.choice([0, 60_000, 1000 * SESSION_GAP_S, 90_000_000], length)).tolist()
        actions = rng.choice(["view", "like", "cart"], length).tolist()
        users.append(
            [Event("u", str(rng.choice(ITEM_IDS)), action, ts) for action, ts in zip(actions, ts_ms, strict=True)]
        )
    return Histories.from_events(users, SCHEMA)


def make_inputs(histories: Histories) -> EncoderInputs:
    return encoder_inputs(histories, VOCABULARY.tokens(histories.items), ItemFacts.unknown(len(histories.items)))


def make_model() -> MultiTaskModel:
    torch.manual_seed(3)
    model = MultiTaskModel(CONFIG).eval()
    for parameter in model.parameters():  # strengths and biases start at zero, which would hide errors
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def make_artifact(model: MultiTaskModel) -> artifacts.Artifact:
    return artifacts.draft(CONFIG, SCHEMA, model.state_dict(), ITEM_IDS, NO_COUNTERS)


def batch_of_newest(histories: Histories, count: int) -> TrainingBatch:
    """Return a training batch with one crop per user, of the newest events."""
    sequences = UserSequences.from_columns(histories.events, VOCABULARY.tokens(histories.items), histories.users)
    columns = TrainingColumns.from_sequences(sequences, RULES, NOTHING_EXCLUDED, ring_events=512)
    columns.older_events = CONFIG.history_length - CONFIG.recent_length
    counts = np.minimum(histories.lengths, count)
    return make_batch(columns, histories.offsets[1:] - counts, counts, 0.0, np.random.default_rng(0))


def states_and_context(model: MultiTaskModel, batch: TrainingBatch) -> tuple[list[Tensor], HeadContext]:
    """Return the heads' inputs in training: states of each crop's own events, [events, width], and the context."""
    calls: list[tuple[Tensor, Tensor, Tensor, HeadContext]] = []
    handle = model.heads.register_forward_pre_hook(lambda _, arguments: calls.append(arguments))
    model.losses(batch, np.full(CONFIG.items, 1 / CONFIG.items), np.random.default_rng(0))
    handle.remove()
    ((states, _, _, context),) = calls
    return list(states.tensor_split(torch.from_numpy(batch.offsets[1:-1]))), context


def test_training_and_serving_give_the_same_state_of_a_history() -> None:
    model = make_model()
    histories = make_histories()
    states, _ = states_and_context(model, batch_of_newest(histories, 5))
    strategy = load_hstu_strategy(make_artifact(model), Catalogue(Vocabulary(ITEM_IDS)), SERVING.exclusion, "cpu", 1)
    tokens = np.tile(np.arange(1, CONFIG.items, dtype=np.int32), (len(histories), 1))
    logits = torch.stack([crop[-1] for crop in states]) @ model.hstu.scoring_table(model.hstu.items())[1:].T
    np.testing.assert_allclose(strategy.scores(histories, tokens), logits.detach().numpy(), rtol=1e-4, atol=1e-4)


def test_heads_are_trained_on_the_crops_own_events() -> None:
    model = make_model()
    histories = make_histories()
    _, context = states_and_context(model, batch_of_newest(histories, 5))
    inputs = make_inputs(histories).tail(5)
    items = model.hstu.items()[torch.from_numpy(inputs.item_rows)]
    assert torch.equal(context.items, items)
    torch.testing.assert_close(context.events, model.hstu.event_rows(items, torch.from_numpy(inputs.feature_ids)))


@settings(max_examples=25)
@given(position=st.integers(1, 4), seed=st.integers(0, 99))
def test_later_events_never_change_an_earlier_state(position: int, seed: int) -> None:
    model = make_model()
    rng = np.random.default_rng(seed)
    batch = batch_of_newest(make_histories((30,)), 5)
    changed = batch_of_newest(make_histories((30,)), 5)
    inputs = changed.inputs
    later = np.arange(len(inputs.item_rows)) >= len(inputs.item_rows) - 5 + position
    inputs.item_rows[later] = rng.integers(0, CONFIG.items, later.sum())
    inputs.feature_ids[later] = rng.integers(0, N_FEATURE_IDS, inputs.feature_ids[later].shape)
    inputs.seconds[later] += 5_000
    (before,), _ = states_and_context(model, batch)
    (after,), _ = states_and_context(model, changed)
    assert torch.equal(before[:position], after[:position])
    assert not torch.equal(before[position], after[position])


def test_state_depends_on_the_history_length_and_no_more() -> None:
    artifact = make_artifact(make_model())
    hstu = TorchModel.from_artifact(artifact, "cpu", 1).hstu
    encoder = TorchEncoder(hstu, ItemTable(artifact, Catalogue(Vocabulary(ITEM_IDS)), hstu.items, torch.device("cpu")))
    inputs = make_inputs(make_histories((40,)))
    inputs.seconds[:] = np.arange(40) // 10 * 90_000  # four sessions: there are rows for all of them
    matters = []
    for position in range(40):
        changed = replace(inputs, item_rows=inputs.item_rows.copy())
        changed.item_rows[position] = inputs.item_rows[position] % len(ITEM_IDS) + 1
        tails = [each.tail(encoder.max_events) for each in (inputs, changed)]
        states = [encoder.encode(EncoderBatch.from_inputs(tail, Staging(torch.device("cpu")))) for tail in tails]
        matters.append(not torch.equal(*states))
    assert matters == [False] * 20 + [True] * 20
    assert CONFIG.receptive_field - HstuConfig(max_events=9).receptive_field == 20 - 9


@pytest.mark.parametrize("strength", [False, True])
def test_sessions_equal_the_specification_in_rows_and_gradients(strength: bool) -> None:
    torch.manual_seed(5)
    hstu = Hstu(msgspec.structs.replace(CONFIG, strength=strength))
    torch.nn.init.normal_(hstu.log_strength.weight, std=0.5)
    histories = make_histories()
    inputs = make_inputs(histories).tail(CONFIG.history_length)
    arrays = (inputs.item_rows, inputs.feature_ids, inputs.seconds, inputs.offsets)
    item_rows, feature_ids, seconds, offsets = map(torch.from_numpy, arrays)
    rows, short = hstu.sequences(hstu.items()[item_rows], feature_ids, inputs)
    fused, times, ends = hierarchical_sequence_fusion(
        hstu.rotation(hstu.items()),
        hstu.feature_embedding.weight,
        hstu.log_strength.weight[:, 0] if strength else torch.zeros(N_FEATURE_IDS),
        item_rows,
        feature_ids,
        seconds,
        offsets,
        recent=5,
        sessions=4,
        gap_s=SESSION_GAP_S,
    )
    assert short.offsets.tolist() == ends.tolist()
    assert short.seconds.tolist() == times[: ends[-1]].tolist()
    is_recent = torch.zeros(len(rows), dtype=torch.bool)
    for stop, length in zip(ends[1:].tolist(), histories.lengths.tolist(), strict=True):
        is_recent[stop - min(5, length) : stop] = True
    event_rows = hstu.event_rows(hstu.items()[item_rows], feature_ids)
    recent_rows = torch.cat([part[-5:] for part in event_rows.tensor_split(offsets[1:-1])])
    expected = fused[: ends[-1]].masked_scatter(is_recent[:, None], recent_rows)
    torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-5)
    direction = torch.randn_like(rows)
    gradients = []
    for each in (rows, expected):
        hstu.zero_grad()
        (each * direction).sum().backward(retain_graph=True)
        gradients.append({name: p.grad.clone() for name, p in hstu.named_parameters() if p.grad is not None})
    assert ("log_strength.weight" in gradients[0]) == strength
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-4, msg=name)


def test_model_with_sessions_is_trained_saved_and_evaluated(tmp_path: Path) -> None:
    trainer = TrainerOptions(epochs=2, crop_length=200, events_per_batch=256)
    shape = HstuConfig(width=16, max_events=6, recent_events=4, history_events=18)
    log = rule_log(users=80, length=25)
    callback = RecordingCallback()
    manifest = train(log, tmp_path / "model", TrainingOptions(trainer, shape), SERVING, callback, CREATED)
    loaded = artifacts.load(tmp_path / "model")
    assert loaded.version == manifest.version
    assert loaded.config.recent_events == 4
    assert loaded.config.history_length == 18
    report = evaluate(loaded, log, SERVING, EvaluationOptions())
    assert 0 < report.rankings["hstu"].at[10].hit_rate.value < 1
