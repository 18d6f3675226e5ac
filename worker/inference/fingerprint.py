"""What a path shows now, without reading it: told by one look from the next."""

from pathlib import Path

Fingerprint = tuple[str, ...]


def fingerprint(folder: Path) -> Fingerprint:
    """Equal while neither the symlink, nor the folder, nor a file directly in it has changed; first the real path.

    A folder that is missing or may not be read is a sight as well: the path and the reason.
    """
    try:
        real = folder.resolve(strict=True)
        files = sorted((entry.name, entry.stat()) for entry in real.iterdir())
    except OSError as error:
        return str(folder), str(error.strerror)
    return str(real), *(f"{name} {stat.st_ino} {stat.st_size} {stat.st_mtime_ns}" for name, stat in files)
