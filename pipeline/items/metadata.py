"""An artifact's item metadata: facts, content hashes, training counts and the price scale."""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np

from pipeline.items.catalogue import EMPTY_CATALOGUE, Catalogue, ItemFacts
from pipeline.items.content import ItemContent, PriceScale


@dataclass(slots=True)
class ItemMetadata:
    """Metadata of the items in the artifact's order.

    state: arrays of Catalogue.state; events: int64 [n], each item's number of training events; scale: of their prices
    """

    state: dict[str, np.ndarray]
    events: np.ndarray
    scale: PriceScale

    @classmethod
    def from_catalogue(cls, catalogue: Catalogue, tokens: np.ndarray, events: np.ndarray) -> "ItemMetadata":
        """Read the metadata of tokens, int [n], and fit their price scale."""
        return cls(catalogue.state(tokens), events, PriceScale.fit(catalogue.facts(tokens).price_codes))

    @classmethod
    def unknown(cls, items: int) -> "ItemMetadata":
        return cls.from_catalogue(EMPTY_CATALOGUE, np.zeros(items, np.int64), np.zeros(items, np.int64))

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "ItemMetadata":
        """Read the output of `arrays`. KeyError for a missing array."""
        scale = PriceScale(*arrays["price_scale"].tolist())
        names = ("hashes", "offsets", *(field.name for field in fields(ItemFacts)))
        return cls({name: arrays[name] for name in names}, arrays["events"], scale)

    @property
    def facts(self) -> dict[str, np.ndarray]:
        return {field.name: self.state[field.name] for field in fields(ItemFacts)}

    def arrays(self) -> dict[str, np.ndarray]:
        """Return everything as arrays for a file."""
        return {**self.state, "events": self.events, "price_scale": np.array([self.scale.mean, self.scale.deviation])}

    def content(self) -> ItemContent:
        """Return the content of a model's rows: row 0 for the unknown item, then the items."""
        row_0 = ItemMetadata.unknown(1)
        state = {name: np.concatenate([row_0.state[name], column]) for name, column in self.state.items()}
        state["offsets"] = np.concatenate([row_0.state["offsets"][:-1], self.state["offsets"]])
        return ItemContent.from_state(state, np.concatenate([row_0.events, self.events]), self.scale)


def new_item_content(catalogue: Catalogue, tokens: np.ndarray, scale: PriceScale) -> ItemContent:
    """Return the content of items that came after training, as a model's content encoder reads it.

    scale: of the prices of its training items
    """
    return ItemContent.from_state(catalogue.state(tokens), np.zeros(len(tokens), np.int64), scale)
