"""Modules that a worker on a CPU imports do not import Triton."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
MODULES = "pipeline.strategies.retrieval, pipeline.model.hstu, pipeline.backends.torch"


def test_modules_of_a_worker_on_a_cpu_do_not_import_triton() -> None:
    code = f"import sys, {MODULES}; print(sorted(name for name in sys.modules if name.split('.')[0] == 'triton'))"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True, timeout=120)
    assert process.stdout.split() == [b"[]"]
