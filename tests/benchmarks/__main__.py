"""Run all benchmarks that need no GPU, one after the other, then draw the pictures: `python -m tests.benchmarks`.

Takes hours on two cores, because `replay` trains a wide model; with a GPU that training takes five minutes.
"""

import subprocess
import sys

for module in ("stream", "replay", "swap", "heads", "training", "plots"):
    subprocess.run([sys.executable, "-m", f"tests.benchmarks.{module}"], check=True)
