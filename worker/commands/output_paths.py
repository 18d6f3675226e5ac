"""Where a command writes: looked at before any work, so that hours of it do not end in a folder that is not there."""

import os
from pathlib import Path
from tempfile import TemporaryFile

from worker.errors import ConfigError


def check_file(path: Path, option: str) -> None:
    """Makes its folder. ConfigError unless the file can be written; one that is there stays as it is."""
    if path.is_dir():
        raise _error(path, option, "it is a folder")
    if not path.exists():
        check_folder(path.parent, option)
    elif not os.access(path, os.W_OK):
        raise _error(path, option, "permission denied")


def check_folder(path: Path, option: str) -> None:
    """Makes it. ConfigError unless a file can be put into it, which is tried: to root all folders look writable."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise _error(path, option, error.strerror or str(error)) from error


def _error(path: Path, option: str, why: str) -> ConfigError:
    return ConfigError(f"{option}: {path} cannot be written: {why}; name another place")
