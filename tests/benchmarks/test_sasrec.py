import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipeline.data.event_log import event_log_from_blocks
from pipeline.data.sequences import UserSequences
from pipeline.evaluation.full_ranking import FullRanking
from pipeline.evaluation.popularity import Popularity
from pipeline.evaluation.ranking import HeldOutEvents, evaluate_ranking
from pipeline.features.event_features import EncoderInputs
from pipeline.items.vocabulary import Vocabulary
from pipeline.records import Event, EventSchema
from pipeline.serving.exclusion import Exclusion
from pipeline.training.batches import TrainingBatch, TrainingColumns
from pipeline.training.trainer import Trainer, TrainerOptions
from tests.benchmarks.sasrec import SasRec, SasRecConfig, SasRecScorer

ITEMS = 60


def inputs_of(*rows: list[int]) -> EncoderInputs:
    tokens = np.array([token for row in rows for token in row], np.int32)
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    return EncoderInputs(tokens, np.zeros((len(tokens), 1), np.int32), np.zeros(len(tokens), np.int32), offsets)


def model_of(**more: object) -> SasRec:
    torch.manual_seed(1)
    config = {"items": ITEMS, "width": 16, "heads": 2, "max_events": 12, **more}
    return SasRec(SasRecConfig(**config)).eval()  # pyright: ignore[reportArgumentType]


def plain(model: SasRec, tokens: list[int]) -> torch.Tensor:
    """The paper's equations on one sequence, head by head: states [length, width]."""
    config, length = model.config, len(tokens)
    places = torch.arange(length - 1, -1, -1)  # the newest event's position is the last one of the table
    x = model.item_embedding(torch.tensor(tokens)) * config.width**0.5 + model.position_embedding(places)
    mask = torch.full((length, length), -torch.inf).triu(1)
    for layer in model.layers:
        asked = layer.norm_attention(x)
        q, k, v = layer.query(asked), layer.key(x), layer.value(x)
        heads = []
        for part in torch.arange(config.width).chunk(config.heads):
            scores = q[:, part] @ k[:, part].T / len(part) ** 0.5 + mask
            heads.append(scores.softmax(1) @ v[:, part])
        x = layer.norm_forward(asked + layer.out(torch.cat(heads, 1)))
        x = x + layer.outer(F.relu(layer.inner(x)))
    return model.norm(x)


@torch.inference_mode()
def test_packed_users_have_the_states_of_the_papers_equations_on_each_alone() -> None:
    model, rows = model_of(), [[3], [7, 8, 9, 10, 11], [5, 6], [1, 2, 3, 4, 5, 6, 7, 8, 9]]
    states = model(inputs_of(*rows)).split([len(row) for row in rows])
    for row, got in zip(rows, states, strict=True):
        torch.testing.assert_close(got, plain(model, row), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", ["bce", "softmax"])
def test_a_loss_is_its_definition_over_the_asked_rows(loss: str) -> None:
    model, inputs = model_of(loss=loss), inputs_of([3, 4, 5], [7, 8])
    successors, asked = np.array([4, 5, 0, 8, 0], np.int32), np.array([0, 1, 3])
    seen = np.array([0, 1, 1, 2]), np.array([3, 3, 4, 7])
    nothing = np.zeros((5, 0), np.float32)
    batch = TrainingBatch(inputs, inputs.offsets, successors, nothing, nothing, nothing, asked, seen)
    got, of_sides = model.losses(batch, np.full(ITEMS, 1 / ITEMS), np.random.default_rng(5))
    logits = model(inputs)[asked] @ model.item_embedding.weight.T
    wanted = torch.tensor([4, 5, 8])
    if loss == "softmax":
        logits[:, 0] = logits[seen] = -torch.inf
        expected = F.cross_entropy(logits, wanted)
    else:
        drawn = torch.from_numpy(np.random.default_rng(5).integers(1, ITEMS, 3))
        pairs = logits[torch.arange(3), wanted], logits[torch.arange(3), drawn]
        expected = -(F.logsigmoid(pairs[0]) + F.logsigmoid(-pairs[1])).mean()
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)
    assert not len(of_sides)


@pytest.mark.parametrize("loss", ["bce", "softmax"])
def test_a_rule_of_succession_is_learnt(loss: str) -> None:
    random, events = np.random.default_rng(0), []
    for user in range(60):
        start = int(random.integers(ITEMS - 1))
        events += [Event(f"u{user}", f"i{(start + 7 * n) % (ITEMS - 1):02}", "view", n) for n in range(12)]
    log = event_log_from_blocks([events], EventSchema())
    vocabulary = Vocabulary(log.item_ids)
    corpus = UserSequences.from_log(log, vocabulary)
    config = SasRecConfig(items=len(vocabulary), width=32, layers=1, max_events=12, dropout=0.0, loss=loss)  # pyright: ignore[reportArgumentType]
    options = TrainerOptions(epochs=30, crop_length=12, events_per_batch=128, learning_rate=1e-2)
    examples = TrainingColumns.from_sequences(corpus, EventSchema(), repeats=False)
    trainer = Trainer(lambda: SasRec(config), config.items, options, examples, torch.device("cpu"))
    for _ in range(options.epochs):
        trainer.train_epoch()
    ranker = FullRanking(SasRecScorer(trainer.model, Popularity(corpus, config.items)), vocabulary, Exclusion())
    latest = HeldOutEvents(corpus, corpus.offsets[1:] - 1, 20)
    assert evaluate_ranking(ranker, latest, 3).hit_rate > 0.8, "chance is 0.06"
