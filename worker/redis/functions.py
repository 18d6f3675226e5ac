"""The functions that run inside Redis. Each has its version in its name: workers of two releases may share a server.

The version is a digest of the code: whoever changes the code changes the name. Old versions stay loaded, a few KiB
each.
"""

from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

PLACEHOLDER = "VERSION"


class Library(NamedTuple):
    """One library with one function: the name to call, and the code to load."""

    function: str
    code: str


def _load(file: str, function: str) -> Library:
    text = (Path(__file__).parent / file).read_text()
    version = blake2b(text.encode(), digest_size=4).hexdigest()
    return Library(f"{function}_{version}", text.replace(PLACEHOLDER, version))


PUSH = _load("rings/sequences.lua", "millrace_push")
PUT_SLATE = _load("slates.lua", "millrace_slate")
COUNT = _load("counters/counters.lua", "millrace_count")
LIBRARIES = (PUSH, PUT_SLATE, COUNT)
