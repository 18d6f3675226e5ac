"""A cheap fingerprint of a folder, to detect changes without reading its files."""

import os
from pathlib import Path

Fingerprint = tuple[str, ...]


def fingerprint(folder: Path) -> Fingerprint:
    """Return a value that stays equal until the symlink, the folder or a file directly in it changes.

    Its first element is the real path. For a missing or unreadable folder it is the path and the reason.
    """
    try:
        # Not Path.resolve: before Python 3.13 it raises RuntimeError for a link that points to itself.
        real_path = Path(os.path.realpath(folder, strict=True))
        files = sorted((entry.name, entry.stat()) for entry in real_path.iterdir())
    except OSError as error:
        return str(folder), str(error.strerror)
    return str(real_path), *(f"{name} {stat.st_ino} {stat.st_size} {stat.st_mtime_ns}" for name, stat in files)
