"""SASRec as in the paper: states, losses, and that it learns."""

import msgspec
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipeline.data.event_log import EventLog, event_log_from_blocks
from pipeline.data.sequences import UserSequences
from pipeline.evaluation.full_ranking import FullRanking
from pipeline.evaluation.popularity import Popularity
from pipeline.evaluation.ranking import HeldOutEvents, evaluate_ranking
from pipeline.features.affinity import AffinityEvents
from pipeline.features.event_features import EncoderInputs
from pipeline.features.labels import LabelRules
from pipeline.items.vocabulary import Vocabulary
from pipeline.records import Event, EventSchema
from pipeline.strategies.exclusion import Exclusion
from pipeline.training.batches import TrainingBatch, TrainingColumns
from pipeline.training.trainer import Trainer, TrainerOptions
from tests.benchmarks.sasrec import SasRec, SasRecConfig, SasRecLayer, SasRecScorer

ITEMS = 60
MARKOV_STEP = 7  # each item of the generated log is this far after the one before


def make_inputs(*rows: list[int]) -> EncoderInputs:
    """Pack users' tokens."""
    tokens = np.array([token for row in rows for token in row], np.int32)
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    return EncoderInputs(tokens, np.zeros((len(tokens), 1), np.int32), np.zeros(len(tokens), np.int32), offsets)


def make_model(**options: object) -> SasRec:
    torch.manual_seed(1)
    config = {"items": ITEMS, "width": 16, "heads": 2, "max_events": 12, **options}
    return SasRec(msgspec.convert(config, SasRecConfig)).eval()


def paper_states(model: SasRec, tokens: list[int]) -> torch.Tensor:
    """Compute the paper's equations on one sequence, head by head: states [length, width]."""
    config = model.config
    length = len(tokens)
    positions = torch.arange(length - 1, -1, -1)  # the latest event has the table's last position
    x = model.item_embedding(torch.tensor(tokens)) * config.width**0.5 + model.position_embedding(positions)
    mask = torch.full((length, length), -torch.inf).triu(1)
    for layer in model.layers:
        assert isinstance(layer, SasRecLayer)
        normed = layer.norm_attention(x)
        q = layer.query(normed)
        k = layer.key(x)
        v = layer.value(x)
        heads = []
        for part in torch.arange(config.width).chunk(config.heads):
            scores = q[:, part] @ k[:, part].T / len(part) ** 0.5 + mask
            heads.append(scores.softmax(1) @ v[:, part])
        x = layer.norm_forward(normed + layer.out(torch.cat(heads, 1)))
        x = x + layer.outer(F.relu(layer.inner(x)))
    return model.norm(x)


@torch.inference_mode()
def test_states_of_packed_users_follow_the_papers_equations() -> None:
    model = make_model()
    rows = [[3], [7, 8, 9, 10, 11], [5, 6], [1, 2, 3, 4, 5, 6, 7, 8, 9]]
    states = model(make_inputs(*rows)).split([len(row) for row in rows])
    for row, got in zip(rows, states, strict=True):
        torch.testing.assert_close(got, paper_states(model, row), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", ["bce", "softmax"])
def test_loss_equals_its_definition_over_the_target_rows(loss: str) -> None:
    model = make_model(loss=loss)
    inputs = make_inputs([3, 4, 5], [7, 8])
    successors = np.array([4, 5, 0, 8, 0], np.int32)
    target_rows = np.array([0, 1, 3])
    excluded = np.array([0, 1, 1, 2]), np.array([3, 3, 4, 7])
    empty = np.zeros((5, 0), np.float32)
    none = np.zeros(5, np.int32)
    affinity = AffinityEvents(none, none, none, none, inputs.offsets)
    batch = TrainingBatch(inputs, affinity, inputs.offsets, successors, none, none, empty, empty, target_rows, excluded)
    got, side_losses = model.losses(batch, np.full(ITEMS, 1 / ITEMS), np.random.default_rng(5))
    logits = model(inputs)[target_rows] @ model.item_embedding.weight.T
    targets = torch.tensor([4, 5, 8])
    if loss == "softmax":
        logits[:, 0] = -torch.inf
        logits[excluded] = -torch.inf
        expected = F.cross_entropy(logits, targets)
    else:
        negatives = torch.from_numpy(np.random.default_rng(5).integers(1, ITEMS, 3))
        positive, negative = (logits[torch.arange(3), each] for each in (targets, negatives))
        expected = -(F.logsigmoid(positive) + F.logsigmoid(-negative)).mean()
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)
    assert not len(side_losses)


def markov_log() -> EventLog:
    """Return a log in which every event's item determines the next one."""
    rng = np.random.default_rng(0)
    events = []
    for user in range(60):
        start = int(rng.integers(ITEMS - 1))
        events += [Event(f"u{user}", f"i{(start + MARKOV_STEP * n) % (ITEMS - 1):02}", "view", n) for n in range(12)]
    return event_log_from_blocks([events], EventSchema())


@pytest.mark.parametrize("loss", ["bce", "softmax"])
def test_deterministic_successors_are_learned(loss: str) -> None:
    log = markov_log()
    vocabulary = Vocabulary(log.item_ids)
    sequences = UserSequences.from_log(log, vocabulary)
    model = {"items": len(vocabulary), "width": 32, "layers": 1, "max_events": 12, "dropout": 0.0, "loss": loss}
    config = msgspec.convert(model, SasRecConfig)
    options = TrainerOptions(epochs=30, crop_length=12, events_per_batch=128, learning_rate=1e-2)
    rules = LabelRules.from_options(EventSchema())
    columns = TrainingColumns.from_sequences(sequences, rules, Exclusion(), ring_events=512)
    trainer = Trainer(lambda: SasRec(config), config.items, options, columns, torch.device("cpu"))
    for _ in range(options.epochs):
        trainer.train_epoch()
    ranker = FullRanking(SasRecScorer(trainer.model, Popularity(sequences, config.items)), vocabulary, Exclusion())
    latest = HeldOutEvents(sequences, sequences.offsets[1:] - 1, 20)
    assert evaluate_ranking(ranker, latest, 3).hit_rate > 0.8, "chance is 0.06"
