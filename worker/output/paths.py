"""Check output paths before a command does hours of work."""

import os
from pathlib import Path
from tempfile import TemporaryFile

from worker.errors import ConfigError


def check_file(path: Path, option: str) -> None:
    """Create the file's folder. ConfigError unless the file can be written; an existing file is not changed."""
    if path.is_dir():
        raise _error(path, option, "it is a folder")
    if not path.exists():
        check_folder(path.parent, option)
    elif not os.access(path, os.W_OK):
        raise _error(path, option, "permission denied")


def check_folder(path: Path, option: str) -> None:
    """Create the folder. ConfigError unless a file can be created in it.

    Tried for real, because `os.access` reports every folder as writable to root.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=path):
            pass
    except (FileExistsError, NotADirectoryError) as error:
        raise _error(path, option, f"{error.filename} is a file, not a folder") from error
    except OSError as error:
        raise _error(path, option, error.strerror or str(error)) from error


def _error(path: Path, option: str, reason: str) -> ConfigError:
    return ConfigError(f"{option}: {path} cannot be written: {reason}; choose another path")
