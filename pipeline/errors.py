"""What the model side raises on purpose; worker/errors.py draws the whole tree."""


class MillraceError(Exception):
    """A message says what, where, got, wanted, and the next step. `exit_code` is the command's exit status."""

    exit_code = 1
    retriable = False


class ArtifactError(MillraceError):
    """The artifact is missing, incomplete, of another version, or a file's hash does not match its manifest."""

    exit_code = 3


class LogFileError(MillraceError):
    """A recorded log cannot be read at all: no such file, unknown format, a column that is not there."""

    exit_code = 2


class DeviceError(MillraceError):
    """Torch has no such device here."""

    exit_code = 2


class TrainingError(MillraceError):
    """The log cannot train a model (empty, one item, no user with two events)."""

    exit_code = 2


class EvaluationError(MillraceError):
    """The log cannot be scored as asked: nothing to score, too few negatives, or events that taught the artifact."""

    exit_code = 2
