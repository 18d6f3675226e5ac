"""Slates and dead dead_letters of a replay, written as JSON lines."""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from pipeline.records import Slate
from worker.errors import SinkError
from worker.interfaces import DeadLetter, SlateWriter

_encode = msgspec.json.Encoder().encode


class FileSink:
    """Implements Sink for replays: JSON lines, `slates.jsonl` and beside it `slates.dead.jsonl`."""

    def __init__(self, path: str | Path, store: SlateWriter | None = None) -> None:
        self._path, self._store = Path(path), store
        self._dead_path = self._path.with_suffix(f".dead{self._path.suffix}")

    async def __aenter__(self) -> "FileSink":
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._slates, self._dead = self._path.open("wb"), self._dead_path.open("wb")
        except OSError as error:
            raise SinkError(f"slates cannot be written to {self._path}: {error.strerror}; name another file") from error
        return self

    async def __aexit__(self, *_: object) -> None:
        self._slates.close()
        self._dead.close()

    async def send(self, slates: Sequence[Slate]) -> None:
        if self._store is not None:
            await self._store.put(slates)
        self._slates.write(b"".join(_encode(slate) + b"\n" for slate in slates))
        self._slates.flush()

    async def send_dead_letters(self, dead_letters: Sequence[DeadLetter]) -> None:
        self._dead.write(b"".join(_encode(letter) + b"\n" for letter in dead_letters))
        self._dead.flush()
