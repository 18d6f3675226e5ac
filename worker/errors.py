"""Every error that the worker raises on purpose.

MillraceError                  exit  retriable  what the worker does
├── ConfigError                   2  no         refuses to start
├── DeviceError                   2  no         refuses to start (defined in pipeline/errors.py)
├── StrategyError                 2  no         refuses to start (defined in pipeline/errors.py)
├── LogFileError, TrainingError   2  no         refuses to start (defined in pipeline/errors.py)
├── EvaluationError               2  no         `evaluate` scores nothing (defined in pipeline/errors.py)
├── ArtifactError                 3  no         refuses to start (defined in pipeline/errors.py)
├── SourceError                   4  no         halts: topic missing, credentials rejected, corrupt record
│   └── SourceUnavailable         4  yes        retries with back-off; at start, until `kafka.start_timeout_s`
├── StoreError                    5  no         halts: Redis rejects the function, or a ring is of another version
│   ├── StoreUnavailable          5  yes        keeps the events, pauses the partitions, retries with back-off
│   └── TopicRecreated            8  no         halts: the topic's id has changed, or offsets in Redis are past its end
├── SinkError                     4  no         halts: the slate can never be written (too large, not authorized)
│   └── SinkUnavailable           4  yes        keeps the slates, retries with back-off
├── DeadLetterLimit               6  no         halts: too many bad records, by ratio or in a row
├── NotDrained                    9  no         ended with events open or offsets not committed: they are read again
├── Stalled                       7  no         the watchdog saw lag without progress: dumps all tasks, exits
├── CrashLoop                    10  no         `run --workers`: one of them keeps failing, the others have drained
├── MemberFailed                     no         `run --workers`: the exit code of a worker that no new start mends
└── UnknownUser                  44  no         lookup: neither a slate nor a popular one (HTTP 404)

Exit 0: drained and committed, or stopped before anything was read. Exit 1: internal error. Exit 130/143: a second
signal cut the drain short, or a signal ended another command.
A message says what, where, got, want, and the next step.
"""

from pipeline.errors import (
    ArtifactError,
    DeviceError,
    EvaluationError,
    LogFileError,
    MillraceError,
    StrategyError,
    TrainingError,
)

__all__ = [
    "ArtifactError",
    "ConfigError",
    "CrashLoop",
    "DeadLetterLimit",
    "DeviceError",
    "EvaluationError",
    "LogFileError",
    "MemberFailed",
    "MillraceError",
    "NotDrained",
    "SinkError",
    "SinkUnavailable",
    "SourceError",
    "SourceUnavailable",
    "Stalled",
    "StoreError",
    "StoreUnavailable",
    "StrategyError",
    "TopicRecreated",
    "TrainingError",
    "UnknownUser",
]


class ConfigError(MillraceError):
    exit_code = 2


class SourceError(MillraceError):
    exit_code = 4


class SourceUnavailable(SourceError):
    retriable = True


class StoreError(MillraceError):
    exit_code = 5


class StoreUnavailable(StoreError):
    retriable = True


class TopicRecreated(StoreError):
    exit_code = 8


class SinkError(MillraceError):
    exit_code = 4


class SinkUnavailable(SinkError):
    retriable = True


class DeadLetterLimit(MillraceError):
    exit_code = 6


class NotDrained(MillraceError):
    exit_code = 9


class Stalled(MillraceError):
    exit_code = 7


class UnknownUser(MillraceError):
    exit_code = 44


class CrashLoop(MillraceError):
    exit_code = 10


class MemberFailed(MillraceError):
    """exit_code: of the worker."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
