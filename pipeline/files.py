"""Exchange, flush and hash files."""

import ctypes
import hashlib
import os
from errno import EINVAL, ENOSYS
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # of renameat2(2), Linux 3.15


def exchange(first: Path, second: Path) -> None:
    """Exchange the names of two existing files or folders of one filesystem, in one step. Raises OSError.

    Where the filesystem or the system cannot do it at once, three renames do, and for a moment neither name exists.
    """
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:  # not glibc 2.28 or newer
        _rename_in_turn(first, second)
        return
    paths = os.fsencode(first), os.fsencode(second)
    if renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0:
        return
    number = ctypes.get_errno()
    if number not in (EINVAL, ENOSYS):
        raise OSError(number, os.strerror(number), str(first), None, str(second))
    _rename_in_turn(first, second)


def _rename_in_turn(first: Path, second: Path) -> None:
    between = first.with_name(f"{first.name}.exchange")
    second.rename(between)
    first.rename(second)
    between.rename(first)


def flush(path: Path) -> None:
    """Return when the file, or the folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_mismatch(found: str, expected: str) -> str:
    """Return the part of an error that says how a file differs from its manifest; '' when it does not."""
    return "" if found == expected else f"SHA-256 is {found[:16]}…, the manifest says {expected[:16]}…"
