"""Going on from an artifact: what a daily refresh takes over, and what is new to it.

The log given holds all that its events need as context: the days to learn from and the history before them. Its events
later than the newest one behind the artifact's counters are new. All events before the cut train the model, but only
new ones are counted (popularity, co-occurrence, events and values of items) and judge it: the artifact knows the
others. Its items keep their tokens and stay, be they in the log or not; new items come after them.
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
from pipeline.items.catalogue import Catalogue
from pipeline.items.vocabulary import Vocabulary
from pipeline.model.config import HstuConfig
from pipeline.records import EventSchema, Item
from pipeline.training.trainer import MultiTaskModel

CHANGEABLE = (
    "items",
    "dropout",
    "attention_dropout",
    "column_dropout",
)  # fields that are not the shape: they may change
CALIBRATION = "heads.calibration"  # found anew behind every training


@dataclass(slots=True, frozen=True)
class WarmStart:
    """The artifact to go on from."""

    artifact: Artifact

    @property
    def config(self) -> HstuConfig:
        return self.artifact.config

    @property
    def latest_ms(self) -> int:
        """The time of the newest event behind its counters."""
        return int(self.artifact.counters["as_of_ms"][0])

    def check(self, model: HstuConfig, schema: EventSchema) -> None:
        """TrainingError for a shape that is not the artifact's, ArtifactError for a schema that it cannot read."""
        self.artifact.check_schema(schema)
        got, own = (msgspec.structs.asdict(config) for config in (model, self.config))
        if wrong := [name for name in own if got[name] != own[name] and name not in CHANGEABLE]:
            asked, has = (", ".join(f"{name} {shape[name]}" for name in wrong) for shape in (got, own))
            raise TrainingError(
                f"--warm-start: artifact {self.artifact.version} has {has}, asked for is {asked}; a warm start keeps"
                " the shape: leave these options out, or train without --warm-start"
            )

    def check_records(self, items: Sequence[Item]) -> None:
        if items and not self.config.content_rows:
            raise TrainingError(
                f"--items: artifact {self.artifact.version} was trained without records of items and cannot read them;"
                " leave --items out, or train without --warm-start"
            )

    def new_events(self, log: EventLog) -> np.ndarray:
        """bool [n]. TrainingError when there is none."""
        new = log.ts_ms > self.latest_ms
        if not new.any():
            raise TrainingError(
                f"--warm-start: none of the {len(log)} events before the cut is later than the newest that artifact"
                f" {self.artifact.version} was made from (ts_ms {self.latest_ms}); give a log that goes on from there,"
                " or cut later (--train-fraction 1)"
            )
        return new

    def load_into(self, catalogue: Catalogue) -> None:
        """Tell all that is known of the items; the catalogue's vocabulary begins with them."""
        items = len(self.artifact.item_ids)
        catalogue.restore(np.arange(1, items + 1), self.artifact.metadata.state, np.ones(items, bool))

    def update_counters(self, counters: Counters, known: UserSequences) -> None:
        """Go on counting: new events alone, each after its user's earlier ones."""
        counters.restore(self.artifact.counters)
        new = np.concatenate([[0], np.cumsum(known.histories.ts_ms > self.latest_ms)])
        counters.observe(known.histories, np.diff(new[known.offsets]))

    def item_events(self, corpus: UserSequences, items: int) -> np.ndarray:
        """int64 [items]: how many events have taught each token's item, the corpus' new ones among them."""
        events = np.bincount(corpus.tokens[corpus.histories.ts_ms > self.latest_ms], minlength=items)
        events[1 : len(self.artifact.item_ids) + 1] += self.artifact.metadata.events
        return events

    def item_values(self, vocabulary: Vocabulary) -> np.ndarray:
        """float32 [items]: what it says of items' values, 0 = nothing."""
        counters, values = self.artifact.counters, np.zeros(len(vocabulary), np.float32)
        values[vocabulary.tokens(counters["items"])] = counters["values"]
        return values

    @torch.no_grad()
    def init_model(self, model: MultiTaskModel) -> MultiTaskModel:
        """Give a new model, of as many items or more, the artifact's weights.

        A new item's row begins as the vector of its contents, as long as other rows begin; without contents as the row
        of any new model.
        """
        weights = model.state_dict()
        for name, weight in self.artifact.weights.items():
            if name != CALIBRATION:
                grown = weights[name].shape != weight.shape
                (weights[name][: len(weight)] if grown else weights[name]).copy_(weight)
        vectors, first = model.hstu.items, len(self.artifact.item_ids) + 1
        if vectors.item_content is not None and first < len(vectors.item_content):
            contents = vectors.item_content.select(np.arange(first, len(vectors.item_content)))
            known = ~contents.missing.all(1)
            rows = vectors.embedding.weight[first:]
            rows[known] = (vectors.from_content(contents) * rows.norm(dim=1, keepdim=True))[known]
        return model
