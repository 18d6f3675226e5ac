"""Where one MessagePack object ends and the next begins: msgspec decodes an object, but does not cut a stream."""

from collections.abc import Iterator
from typing import IO

CHUNK_BYTES = 1 << 20
# Bytes behind the first one, for the types of a fixed size (msgpack specification, "Formats").
FIXED = {0xC0: 0, 0xC2: 0, 0xC3: 0, 0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4,
         0xD3: 8, 0xD4: 2, 0xD5: 3, 0xD6: 5, 0xD7: 9, 0xD8: 17}  # fmt: skip
# Bytes of the length behind the first one: of bytes (bin, str), of bytes with a type byte (ext), of elements.
BYTES = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}
EXTENSIONS = {0xC7: 1, 0xC8: 2, 0xC9: 4}
ELEMENTS = {0xDC: (2, 1), 0xDD: (4, 1), 0xDE: (2, 2), 0xDF: (4, 2)}


def objects(file: IO[bytes]) -> Iterator[tuple[bytes, str]]:
    """(bytes, '') of each object; what cannot be cut any more comes last, as (bytes, reason)."""
    held = b""
    while chunk := file.read(CHUNK_BYTES):
        held, at = held + chunk, 0
        while at < len(held):
            try:
                end = _end(held, at)
            except ValueError as error:
                yield held[at : at + 256], f"{error}; the rest of the log cannot be read"
                return
            except IndexError:  # it goes on in the next chunk
                break
            yield held[at:end], ""
            at = end
        held = held[at:]
    if held:
        yield held[:256], "the log ends in the middle of an object"


def _end(data: bytes, at: int) -> int:
    """Where the object at `at` ends. IndexError: not in these bytes."""
    open_ = 1
    while open_:
        size, inner = _head(data, at)
        at += size
        open_ += inner - 1
    if at > len(data):
        raise IndexError
    return at


def _head(data: bytes, at: int) -> tuple[int, int]:
    """(bytes of this object's head and, if it has no elements, its content; number of its elements)."""
    first = data[at]
    if first <= 0x7F or first >= 0xE0:
        return 1, 0
    if first <= 0x8F:
        return 1, 2 * (first & 0x0F)
    if first <= 0x9F:
        return 1, first & 0x0F
    if first <= 0xBF:
        return 1 + (first & 0x1F), 0
    if first in FIXED:
        return 1 + FIXED[first], 0
    if first in ELEMENTS:
        width, each = ELEMENTS[first]
        return 1 + width, each * _length(data, at, width)
    if first in BYTES:
        return 1 + BYTES[first] + _length(data, at, BYTES[first]), 0
    if first in EXTENSIONS:
        return 2 + EXTENSIONS[first] + _length(data, at, EXTENSIONS[first]), 0
    raise ValueError(f"byte 0x{first:02x} begins no MessagePack object")


def _length(data: bytes, at: int, width: int) -> int:
    if at + 1 + width > len(data):
        raise IndexError
    return int.from_bytes(data[at + 1 : at + 1 + width], "big")
