"""All benchmarks, one after the other, then the pictures: `python -m tests.benchmarks` (about an hour on two cores)."""

import subprocess
import sys

for module in ("stream", "replay", "swap", "plots"):
    subprocess.run([sys.executable, "-m", f"tests.benchmarks.{module}"], check=True)
