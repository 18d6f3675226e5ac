"""A model's weights in a safetensors file (huggingface.co/docs/safetensors: format), of which the item table is not
read into memory.

The item table is nearly all of a large model, and whoever serves it needs something else: the items' unit vectors. So
it is read in parts, each of which becomes vectors before the next one is read. The file stays open: another one in its
place changes nothing, and a part that was overwritten since the file was checked is an error.
"""

import hashlib
import math
import os
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated
from zlib import crc32

import msgspec
import torch
from msgspec import Meta
from torch import Tensor

from pipeline.errors import ArtifactError
from pipeline.files import hash_mismatch
from pipeline.files import sha256 as file_sha256
from pipeline.manifest import COPY_AGAIN

ITEM_TABLE = "hstu.items.embedding.weight"  # [1 + items, width]
PART_BYTES = 8 << 20
Size = Annotated[int, Meta(ge=0, lt=1 << 62)]


class TensorHeader(msgspec.Struct, frozen=True):
    """A tensor's entry in the file's header; offsets are from the header's end."""

    dtype: str
    shape: list[Size]
    data_offsets: tuple[Size, Size]


class WeightsFile(Mapping[str, Tensor]):
    """Weights by name. All but the item table are in memory; that one is read at each access."""

    def __init__(self, path: Path, sha256: str) -> None:
        """Read and check the file in one pass. ArtifactError: its hash differs, or a weight is not finite."""
        self._path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise ArtifactError(f"artifact {path}: {error.strerror}; {COPY_AGAIN}") from error
        weakref.finalize(self, os.close, self._descriptor)
        digest = hashlib.sha256()
        self._in_memory: dict[str, Tensor] = {}
        self._checksums: list[int] = []  # of the item table's parts
        try:
            self._start, self._headers = self._read_header(digest)
            not_finite = [name for name in self._headers if not self._check(name, digest)]
            found = digest.hexdigest()
        except ArtifactError:
            if mismatch := hash_mismatch(file_sha256(path), sha256):  # why it cannot be read
                raise ArtifactError(f"artifact {path}: {mismatch}; {COPY_AGAIN}") from None
            raise
        if mismatch := hash_mismatch(found, sha256):
            raise ArtifactError(f"artifact {path}: {mismatch}; {COPY_AGAIN}")
        if not_finite:
            raise ArtifactError(f"artifact {path}: {not_finite[0]} has numbers that are not finite; train again")

    def __getitem__(self, name: str) -> Tensor:
        if name in self._in_memory:
            return self._in_memory[name]
        return torch.cat([part for _, part in self.parts(name)])

    def __iter__(self) -> Iterator[str]:
        return iter(self._headers)

    def __len__(self) -> int:
        return len(self._headers)

    def parts(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """Yield the item table in parts: each one's first row, and float32 [rows, width].

        ArtifactError for one that was overwritten since the file was checked.
        """
        width = self._headers[name].shape[1]
        for number, block in enumerate(self._blocks(name)):
            if crc32(block) != self._checksums[number]:
                raise ArtifactError(f"artifact {self._path}: was overwritten while it was read; {COPY_AGAIN}")
            yield number * self._part_rows(name), torch.frombuffer(block, dtype=torch.float32).view(-1, width)

    def _read_header(self, digest: "hashlib._Hash") -> tuple[int, dict[str, TensorHeader]]:
        """Return where the data begin, and the tensors' entries in the order of their data."""
        length = self._read(0, 8)
        digest.update(length)
        size = int.from_bytes(length, "little")
        content = self._read(8, min(size, os.fstat(self._descriptor).st_size))
        digest.update(content)
        try:
            header = msgspec.json.decode(content, type=dict[str, msgspec.Raw])
            header.pop("__metadata__", None)
            entries = {name: msgspec.json.decode(entry, type=TensorHeader) for name, entry in header.items()}
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise ArtifactError(f"artifact {self._path}: no safetensors file: {error}; {COPY_AGAIN}") from error
        ordered = dict(sorted(entries.items(), key=lambda entry: entry[1].data_offsets))
        self._check_layout(ordered, os.fstat(self._descriptor).st_size - 8 - size)
        return 8 + size, ordered

    def _check_layout(self, ordered: dict[str, TensorHeader], data_bytes: int) -> None:
        """Raise ArtifactError unless the tensors fill the data one after the other, the item table among them."""
        position = 0
        for name, entry in ordered.items():
            start, end = entry.data_offsets
            if entry.dtype != "F32" or start != position or end - start != 4 * math.prod(entry.shape):
                raise ArtifactError(
                    f"artifact {self._path}: {name} is {entry.dtype} {entry.shape} at bytes {start} to {end}, want F32"
                    f" from byte {position} on; train again"
                )
            position = end
        if position != data_bytes:
            raise ArtifactError(
                f"artifact {self._path}: has {data_bytes} bytes of data, its header says {position}; {COPY_AGAIN}"
            )
        table = ordered.get(ITEM_TABLE)
        if table is None or len(table.shape) != 2 or not all(table.shape):
            raise ArtifactError(
                f"artifact {self._path}: {ITEM_TABLE} is {table.shape if table else 'missing'}, want rows of a width;"
                " train again"
            )

    def _check(self, name: str, digest: "hashlib._Hash") -> bool:
        """Add a tensor's bytes to the digest, keep it unless it is the item table, return whether it is finite."""
        is_finite = True
        kept = [torch.empty(0)]
        for block in self._blocks(name):
            digest.update(block)
            values = torch.frombuffer(block, dtype=torch.float32)
            is_finite &= bool(values.isfinite().all())
            if name == ITEM_TABLE:
                self._checksums.append(crc32(block))
            else:
                kept.append(values)
        if name != ITEM_TABLE:
            self._in_memory[name] = torch.cat(kept).view(self._headers[name].shape)
        return is_finite

    def _blocks(self, name: str) -> Iterator[bytearray]:
        """Yield a tensor's bytes in blocks of complete rows."""
        header = self._headers[name]
        start, end = header.data_offsets
        step = 4 * self._part_rows(name) * max(1, header.shape[1] if len(header.shape) == 2 else 1)
        for position in range(start, end, step):
            yield self._read(self._start + position, min(step, end - position))

    def _part_rows(self, name: str) -> int:
        shape = self._headers[name].shape
        return max(1, PART_BYTES // (4 * max(1, shape[1] if len(shape) == 2 else 1)))

    def _read(self, position: int, size: int) -> bytearray:
        """Return exactly this many bytes of the file, or an ArtifactError."""
        content = bytearray(size)
        filled = os.preadv(self._descriptor, [content], position)
        while 0 < filled < size:
            count = os.preadv(self._descriptor, [memoryview(content)[filled:]], position + filled)
            if not count:
                break
            filled += count
        if filled < size:
            raise ArtifactError(f"artifact {self._path}: ends after {position + filled} bytes; {COPY_AGAIN}")
        return content


def item_table_parts(weights: Mapping[str, Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Yield the item table of any weights in parts: each one's first row, and float32 [rows, width]."""
    if isinstance(weights, WeightsFile):
        yield from weights.parts(ITEM_TABLE)
        return
    table = weights[ITEM_TABLE]
    step = max(1, PART_BYTES // (4 * table.shape[1]))
    for start in range(0, len(table), step):
        yield start, table[start : start + step]
