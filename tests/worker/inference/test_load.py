"""Loading of a configured pipeline."""

import subprocess
import sys

LOAD = """
import sys
import worker.process, worker.replay.replay
from worker.config import Config
from worker.inference.load import load_pipeline
load_pipeline(Config())
print("torch" in sys.modules)
"""


def test_worker_without_an_artifact_does_not_import_torch() -> None:
    """It costs seconds and 400 MiB."""
    done = subprocess.run([sys.executable, "-c", LOAD], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
