"""Slates and dead letters of a replay, written as JSON lines."""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from pipeline.slates import Slate, encode_slates
from worker.errors import SinkError
from worker.interfaces import DeadLetter, SlateWriter

_encode = msgspec.json.Encoder().encode


class FileSink:
    """Implements Sink for replays: slates into `slates.jsonl`, dead letters into `slates.dead.jsonl` next to it.

    store: gets the slates as well; None: only the file does
    """

    def __init__(self, path: str | Path, store: SlateWriter | None = None) -> None:
        self._path = Path(path)
        self._store = store

    async def __aenter__(self) -> "FileSink":
        dead_path = self._path.with_suffix(f".dead{self._path.suffix}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._slates = self._path.open("wb")
            self._dead_letters = dead_path.open("wb")
        except OSError as error:
            raise SinkError(f"slates cannot be written to {self._path}: {error.strerror}; name another file") from error
        return self

    async def __aexit__(self, *_: object) -> None:
        self._slates.close()
        self._dead_letters.close()

    async def send(self, slates: Sequence[Slate]) -> None:
        values = encode_slates(slates)
        if self._store is not None:
            await self._store.put(slates, values)
        self._slates.write(b"".join(value + b"\n" for value in values))
        self._slates.flush()

    async def send_dead_letters(self, dead_letters: Sequence[DeadLetter]) -> None:
        self._dead_letters.write(b"".join(_encode(letter) + b"\n" for letter in dead_letters))
        self._dead_letters.flush()
