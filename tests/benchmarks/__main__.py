"""Run all benchmarks that need no GPU, one after the other, then draw the pictures.

Takes hours on two cores, because `replay` trains a wide model; with a GPU that training takes five minutes.

usage: python -m tests.benchmarks
"""

import argparse
import subprocess
import sys

MODULES = ("stream", "items", "lookup", "replay", "swap", "heads", "training", "plots")


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for module in MODULES:
        subprocess.run([sys.executable, "-m", f"tests.benchmarks.{module}"], check=True)


if __name__ == "__main__":
    main()
