"""What a catalogue of a million items costs: loading, new records, delistings, and a hot swap's step in the pipeline.

One process per width, on one thread, with an untrained model of one layer. Milliseconds are CPU time of the calls that
keep the pipeline's thread from ranking. A new record, or a withdrawal (a tombstone), costs its own call and what it
adds to the next batch of `hstu` and of `simple`, without users: the median of several. worst_new_item_ms is the
greatest of all new records, from the first one after loading; a small catalogue has run the same code before.
swap_catalogue_ms is the sum over all chunks of restoring a new model's metadata, which all differ. Memory is what
`Pipeline.load` adds to a process that has loaded a small model before: load_peak_ratio is its largest growth while it
runs over that afterwards, bytes_per_item_beyond_table the latter per item, less one table of vectors. bytes_per_record
is what the record of an item takes, with a title of eight words, a category, a brand and two tags.

usage: python -m tests.benchmarks.items [--out FOLDER] [--items 1000000]
"""

import argparse
import ctypes
import gc
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import msgspec
import numpy as np
import torch

from pipeline import artifact as artifacts
from pipeline.items.catalogue import Catalogue, ItemFacts
from pipeline.model.config import HstuConfig
from pipeline.records import EventSchema, Histories, Item, item_hash
from pipeline.serving.pipeline import Pipeline
from pipeline.strategies.options import PipelineOptions
from pipeline.training.multi_task_model import MultiTaskModel
from tests.benchmarks import results
from worker.inference.hot_swap import LOAD_CHUNK_ITEMS

WIDTHS = (64, 512)
REPETITIONS = 11
SMALL_ITEMS = 100
RECORDS = 1 << 17  # stored at most to measure their memory, after as many others
MIB = 1 << 20


def cpu_ms(call: Callable[[], object]) -> float:
    start_s = time.process_time()
    call()
    return 1e3 * (time.process_time() - start_s)


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / MIB


def reset_peak() -> None:
    """Let the kernel's record of the largest resident memory begin here."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> float:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def save_artifact(folder: Path, items: int, width: int) -> None:
    """Save an untrained model with a popularity and a value for each item."""
    torch.manual_seed(0)
    config = HstuConfig(
        items=items + 1, width=width, heads=1, d_qk=16, d_v=16, max_events=50, content_rows=2000, layers=1
    )
    ids = [f"item-{number}" for number in range(items)]
    rng = np.random.default_rng(0)
    counters = {
        "items": np.array([item_hash(item_id) for item_id in ids], np.uint64),
        "popularity": rng.random(items),
        "values": rng.random(items).astype(np.float32),
        "offsets": np.zeros(items + 1, np.int64),
        "neighbours": np.zeros(0, np.uint64),
        "weights": np.zeros(0, np.float32),
        "as_of_ms": np.array([1_700_000_000_000]),
    }
    artifacts.save(folder, artifacts.draft(config, EventSchema(), MultiTaskModel(config).state_dict(), ids, counters),
                   {}, "2026-01-01T00:00:00+00:00")  # fmt: skip


def small_model(folder: Path) -> Path:
    return folder.with_name("small")


def measure(folder: Path, width: int) -> dict[str, results.Cell]:
    """Return the row of one artifact, measured in this process."""
    torch.set_num_threads(1)
    small = Pipeline.load(small_model(folder), PipelineOptions(device="cpu", threads=1))
    changes_ms(small, new_record)
    changes_ms(small, delisting)
    items = artifacts.read_manifest(folder).config.items - 1
    options = PipelineOptions(device="cpu", threads=1, max_items=2 * items)
    trim()
    before_mib = resident_mib()
    reset_peak()
    start_s = time.perf_counter()
    pipeline = Pipeline.load(folder, options)
    load_s = time.perf_counter() - start_s
    peak = peak_mib()
    trim()
    after_mib = resident_mib()
    table_bytes = 4 * width
    row: dict[str, results.Cell] = {"items": items, "width": width, "load_s": round(load_s, 2)}
    row |= {"load_peak_ratio": round((peak - before_mib) / (after_mib - before_mib), 3)}
    row |= {"bytes_per_item_beyond_table": round((after_mib - before_mib) * MIB / items - table_bytes)}
    record_ms = changes_ms(pipeline, new_record)
    row |= {"new_record_ms": round(median(record_ms), 3), "worst_new_item_ms": round(max(record_ms), 3)}
    row |= {"withdrawal_ms": round(median(changes_ms(pipeline, delisting)), 3)}
    artifact = artifacts.load(folder)
    catalogue = pipeline.catalogue
    for field in fields(ItemFacts):  # every fact differs from the serving model's
        artifact.metadata.state[field.name] = artifact.metadata.state[field.name] + 1
    tokens = artifact.tokens(catalogue.vocabulary)
    chunks = [slice(start, start + LOAD_CHUNK_ITEMS) for start in range(0, items, LOAD_CHUNK_ITEMS)]
    chunk_ms = [cpu_ms(lambda part=part: artifact.exchange_facts(catalogue, tokens, part)) for part in chunks]
    row |= {"swap_catalogue_ms": round(sum(chunk_ms), 3), "longest_swap_chunk_ms": round(max(chunk_ms), 3)}
    return row | {"bytes_per_record": round(record_bytes(catalogue, min(items // 2, RECORDS)))}


def trim() -> None:
    """Give freed memory back to the system, so that resident memory is what is held."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def new_record(pipeline: Pipeline, number: int) -> None:
    pipeline.update_items([Item(f"new-{number}", title="a new thing", price=5.0)])


def delisting(pipeline: Pipeline, number: int) -> None:
    pipeline.update_items([], [f"item-{number}"])


def record_bytes(catalogue: Catalogue, records: int) -> float:
    """Return the resident memory that an item's record takes. Those of other items fill logs and caches before."""

    def store(first: int) -> float:
        for number in range(first, first + records):
            names = [f"tag-{number % 1000}", f"tag-{number % 7}"]
            title = f"a thing of seven quite ordinary words {number}"
            catalogue.upsert([Item(f"item-{number}", title, None, names[:1], names[1], 5.0, 0, names)])
        trim()
        return resident_mib() * MIB

    before = store(0)
    return (store(records) - before) / records


def changes_ms(pipeline: Pipeline, change: Callable[[Pipeline, int], None]) -> list[float]:
    """Return the costs of several changes: a call, and what it adds to the next batch of each strategy.

    The batch has no users: what is left is what the change costs.
    """
    no_users = Histories.from_events([], EventSchema())

    def rank(strategy: str) -> float:
        return cpu_ms(lambda: pipeline.rank(no_users, 10, strategy))

    costs: list[float] = []
    for number in range(REPETITIONS):
        usual = {strategy: min(rank(strategy) for _ in range(5)) for strategy in ("simple", "hstu")}
        call_ms = cpu_ms(lambda number=number: change(pipeline, number))
        costs.append(call_ms + sum(max(0.0, rank(strategy) - ms) for strategy, ms in usual.items()))
    return costs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=results.FOLDER, help="folder of the result")
    parser.add_argument("--items", type=int, default=1_000_000, help="number of items (default 1000000)")
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "WIDTH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(msgspec.json.encode(measure(Path(args.measure[0]), int(args.measure[1]))).decode())
        return
    rows: list[dict[str, results.Cell]] = []
    for width in WIDTHS:
        with TemporaryDirectory(prefix="millrace-items-") as folder:
            save_artifact(Path(folder) / "model", args.items, width)
            save_artifact(small_model(Path(folder) / "model"), SMALL_ITEMS, width)
            command = [sys.executable, "-m", "tests.benchmarks.items", "--measure", f"{folder}/model", str(width)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
        rows.append(msgspec.json.decode(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    names = [name for name in rows[0] if name not in ("items", "width")]
    metrics = {f"{name}_{row['width']}": float(row[name] or 0) for row in rows for name in names}
    print(f"written: {results.write('items', metrics, rows, args.out)}")


if __name__ == "__main__":
    main()
