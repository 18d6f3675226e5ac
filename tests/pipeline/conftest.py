"""The MovieLens log, read once per session; tests that need it are skipped where it is missing."""

import os
from pathlib import Path

import pytest

from pipeline.data.log_io import EventLog, read_event_log


@pytest.fixture(scope="session")
def movielens_path() -> Path:
    path = Path(os.environ.get("MILLRACE_DATA", "../shared/data")) / "ml-100k" / "ml-100k.inter"
    if not path.exists():
        pytest.skip(f"no log at {path}: set MILLRACE_DATA to the folder that holds ml-100k")
    return path


@pytest.fixture(scope="session")
def movielens_log(movielens_path: Path) -> EventLog:
    """Return the log as columns: 100,000 ratings. Do not modify it."""
    return read_event_log(movielens_path)
