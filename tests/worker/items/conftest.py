"""A full disk, for tests of what is saved on one."""

import resource
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest


@pytest.fixture
def limit_file_size() -> Callable[[int], AbstractContextManager[None]]:
    """Return a context manager: while it lasts, a write past that many bytes of a file fails."""

    @contextmanager
    def limited(max_bytes: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited
