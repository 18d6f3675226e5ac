"""Errors that the pipeline raises on purpose; worker/errors.py draws the full tree."""


class MillraceError(Exception):
    """Base of all errors. A message says what, where, got, wanted and the next step; `exit_code`: exit status."""

    exit_code = 1
    retriable = False


class ArtifactError(MillraceError):
    """The artifact is missing, incomplete, of another version, or a file's hash does not match its manifest."""

    exit_code = 3


class LogFileError(MillraceError):
    """A recorded log cannot be read at all: no such file, unknown format, a missing column."""

    exit_code = 2


class DeviceError(MillraceError):
    """The requested device does not exist or cannot run the model."""

    exit_code = 2


class StrategyError(MillraceError):
    """A strategy of one's own cannot be loaded, or breaks a promise of every strategy."""

    exit_code = 2


class TrainingError(MillraceError):
    """The log cannot train a model (empty, one item, no user with two events)."""

    exit_code = 2


class EvaluationError(MillraceError):
    """The log cannot be scored as requested: no events, too few negatives, or events of the training log."""

    exit_code = 2
