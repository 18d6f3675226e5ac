"""The log of an accuracy benchmark, and how it is split: the same for all contenders."""

from pathlib import Path

import msgspec

from pipeline.data.event_log import EventLog
from pipeline.data.item_file import read_items
from pipeline.data.log_io import read_event_log
from pipeline.features.event_features import FEATURE_COLUMNS
from pipeline.strategies.exclusion import Exclusion
from pipeline.strategies.options import PipelineOptions
from pipeline.training.preparation import TrainingOptions, TrainingSetup, prepare

Value = bool | str | int | float | tuple[str | float, ...]
Options = dict[str, Value]

# HSTU by item ids and times alone: no content, no side tasks, no strength of an action, and of the features only one
# that these logs leave empty, because the model sums over at least one column.
IDS_ONLY: Options = {
    "contents": False,
    "trainer.head_weights": (0.0, 0.0, 0.0),
    "model.strength": False,
    "model.excluded_features": tuple(name for name in FEATURE_COLUMNS if name != "device"),
}


class Setting(msgspec.Struct, frozen=True):
    """A log, its split, and what is scored.

    items:                 file of item records
    leave_out:             number of each user's latest events that are scored; 0: the events after the first
                           `train_fraction` in time
    validation_last:       number of each user's latest training events to validate on; by time the last 5 % of them
    max_validation_events: a random part of those, this many at most
    max_scored_events:     a random part of the held-out events, None for all; see ScoredEvents
    evaluations:           of a trial with epochs, evenly spaced
    max_events:            latest events of a history that a ranking is given
    repeats:               nothing is excluded: items that a user has touched are recommended, too, and trained on
    negatives:             the target is also ranked among 100 uniform negatives, as older papers do
    users:                 number of first users, None for all; max_epochs: None for no limit
    """

    log: Path
    items: Path
    leave_out: int = 0
    train_fraction: float = 0.8
    validation_last: int = 1
    max_validation_events: int = 1_000_000
    evaluations: int = 12
    max_scored_events: int | None = None
    max_events: int = 512
    repeats: bool = False
    negatives: bool = False
    users: int | None = None
    max_epochs: int | None = None
    device: str = "auto"

    @property
    def pipeline(self) -> PipelineOptions:
        exclusion = Exclusion(action_codes=()) if self.repeats else Exclusion()
        return PipelineOptions(exclusion=exclusion, device=self.device, ring_events=self.max_events)

    def read(self) -> EventLog:
        """Read the log, with the events of one time in the order in which a worker would receive them: the file's."""
        log = read_event_log(self.log)
        return log if self.users is None else log.select(log.users < self.users)

    def prepare(
        self, log: EventLog, trainer: Options | None = None, model: Options | None = None, contents: bool = False
    ) -> TrainingSetup:
        """Split the log. contents: the model reads the items' records."""
        tree = {
            "trainer": trainer or {},
            "model": model or {},
            "train_fraction": self.train_fraction,
            "leave_last_out": self.leave_out,
            "validation_last_out": self.validation_last,
            "max_validation_events": self.max_validation_events,
        }
        records = read_items(self.items).items if contents else ()
        return prepare(log, msgspec.convert(tree, TrainingOptions), self.pipeline, records)
