"""Warm start: training continues from an artifact, as in a daily refresh.

The log must hold everything that its events need as context: the days to train on and the history before them. Events
later than the latest one in the artifact's counters are new, unless their times are not believed (event_clock.py). All
training events train the model, but only new ones are counted (popularity, co-occurrence, events and values of items)
and serve as validation: the artifact was trained on the others. Its items keep their tokens, whether they are in the
log or not; new items come after them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import torch

from pipeline.artifact import Artifact
from pipeline.counters.counters import Counters
from pipeline.data.event_log import EventLog
from pipeline.data.sequences import UserSequences
from pipeline.errors import TrainingError
from pipeline.event_clock import latest_believed
from pipeline.features.labels import LabelOptions, LabelRules
from pipeline.items.catalogue import Catalogue
from pipeline.items.vocabulary import Vocabulary
from pipeline.model.config import HstuConfig
from pipeline.records import EventSchema, Item
from pipeline.training.multi_task_model import MultiTaskModel

CHANGEABLE = ("items", "dropout", "attention_dropout", "feature_dropout")  # fields that are not the model's shape
CALIBRATION = "heads.calibration"  # fitted again after every training


@dataclass(slots=True, frozen=True)
class WarmStart:
    """The artifact to continue from."""

    artifact: Artifact

    @property
    def config(self) -> HstuConfig:
        return self.artifact.config

    @property
    def latest_ms(self) -> int:
        """Time of the latest event in the artifact's counters."""
        return int(self.artifact.counters["as_of_ms"][0])

    def check(self, model: HstuConfig, schema: EventSchema, labels: LabelOptions) -> None:
        """Raise TrainingError for another shape or other labels, ArtifactError for a schema that it cannot read."""
        self.artifact.check_schema(schema)
        if LabelRules.from_options(schema, labels) != LabelRules.from_options(schema, self.artifact.manifest.labels):
            raise TrainingError(
                f"--warm-start: artifact {self.artifact.version} was trained on other labels,"
                f" {msgspec.json.encode(self.artifact.manifest.labels).decode()}; restore them in the configuration's"
                " [labels], or train without --warm-start"
            )
        requested = msgspec.structs.asdict(model)
        own = msgspec.structs.asdict(self.config)
        if wrong := [name for name in own if requested[name] != own[name] and name not in CHANGEABLE]:
            got = ", ".join(f"{name} {requested[name]}" for name in wrong)
            want = ", ".join(f"{name} {own[name]}" for name in wrong)
            raise TrainingError(
                f"--warm-start: artifact {self.artifact.version} has {want}, requested: {got}; a warm start keeps the"
                " model's shape: leave these options out, or train without --warm-start"
            )

    def check_records(self, items: Sequence[Item]) -> None:
        """Raise TrainingError for item records that the artifact's model cannot read."""
        if items and not self.config.content_rows:
            raise TrainingError(
                f"--items: artifact {self.artifact.version} was trained without item metadata and cannot read it;"
                " leave --items out, or train without --warm-start"
            )

    def new_events(self, log: EventLog) -> np.ndarray:
        """Return bool [n]: which events are new. TrainingError when none is."""
        is_new = self._is_new(log.ts_ms)
        if not is_new.any():
            raise TrainingError(
                f"--warm-start: none of the {len(log)} training events is later than the latest that artifact"
                f" {self.artifact.version} was trained on (ts_ms {self.latest_ms}); give a log that continues after it,"
                " or split later (--train-fraction 1)"
            )
        return is_new

    def _is_new(self, ts_ms: np.ndarray) -> np.ndarray:
        """Return bool [n]: which of these times of a log are later than the artifact's, and believed."""
        return (ts_ms > self.latest_ms) & (ts_ms <= latest_believed(ts_ms))

    def load_into(self, catalogue: Catalogue) -> None:
        """Restore the artifact's item metadata; the catalogue's vocabulary must begin with its items."""
        items = len(self.artifact.item_ids)
        catalogue.restore(np.arange(1, items + 1), self.artifact.metadata.state, np.ones(items, bool))

    def update_counters(self, counters: Counters, train: UserSequences) -> None:
        """Restore the artifact's counters and count new events alone, each after its user's earlier ones."""
        counters.restore(self.artifact.counters)
        counters.observe(train.histories, self._is_new(train.histories.ts_ms))

    def item_events(self, sequences: UserSequences, items: int) -> np.ndarray:
        """Return int64 [items]: training events by token, the artifact's and the sequences' new ones."""
        events = np.bincount(sequences.tokens[self._is_new(sequences.histories.ts_ms)], minlength=items)
        events[1 : len(self.artifact.item_ids) + 1] += self.artifact.metadata.events
        return events

    def item_values(self, vocabulary: Vocabulary) -> np.ndarray:
        """Return float32 [items]: item values by the artifact, 0 = none."""
        counters = self.artifact.counters
        values = np.zeros(len(vocabulary), np.float32)
        values[vocabulary.tokens(counters["items"])] = counters["values"]
        return values

    @torch.no_grad()
    def init_model(self, model: MultiTaskModel) -> MultiTaskModel:
        """Copy the artifact's weights into a new model of as many items or more, and return it.

        A new item's row is initialised with the vector of its content, at the length of a random row; without content
        it stays a random row.
        """
        weights = model.state_dict()
        for name, weight in self.artifact.weights.items():
            if name != CALIBRATION:
                has_grown = weights[name].shape != weight.shape
                (weights[name][: len(weight)] if has_grown else weights[name]).copy_(weight)
        vectors = model.hstu.items
        first_new = len(self.artifact.item_ids) + 1
        if vectors.item_content is not None and first_new < len(vectors.item_content):
            content = vectors.item_content.select(np.arange(first_new, len(vectors.item_content)))
            has_content = ~content.missing.all(1)
            rows = vectors.embedding.weight[first_new:]
            rows[has_content] = (vectors.from_content(content) * rows.norm(dim=1, keepdim=True))[has_content]
        return model
