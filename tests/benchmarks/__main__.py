"""All benchmarks, one after the other, then the pictures: `python -m tests.benchmarks`.

Hours on two cores, for `replay` trains a wide model; with a GPU that is five minutes.
"""

import subprocess
import sys

for module in ("stream", "replay", "swap", "heads", "training", "plots"):
    subprocess.run([sys.executable, "-m", f"tests.benchmarks.{module}"], check=True)
