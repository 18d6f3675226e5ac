"""What an artifact knows of its items besides their ids."""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np

from pipeline.items.catalogue import EMPTY, Catalogue, ItemFacts
from pipeline.items.content import ItemContent, PriceScale


@dataclass(slots=True)
class ItemMetadata:
    """state: Catalogue.state's arrays of the items, in the artifact's order; events: int64 [n], each one's events in
    training; scale: of their prices."""

    state: dict[str, np.ndarray]
    events: np.ndarray
    scale: PriceScale

    @classmethod
    def from_catalogue(cls, catalogue: Catalogue, tokens: np.ndarray, events: np.ndarray) -> "ItemMetadata":
        """tokens: int [n] of the catalogue's vocabulary."""
        return cls(catalogue.state(tokens), events, PriceScale.fit(catalogue.facts(tokens).price_codes))

    @classmethod
    def unknown(cls, items: int) -> "ItemMetadata":
        return cls.from_catalogue(EMPTY, np.zeros(items, np.int64), np.zeros(items, np.int64))

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "ItemMetadata":
        """From `arrays`. KeyError when one is not there."""
        scale = PriceScale(*arrays["price_scale"].tolist())
        names = ("hashes", "offsets", *(field.name for field in fields(ItemFacts)))
        return cls({name: arrays[name] for name in names}, arrays["events"], scale)

    @property
    def facts(self) -> dict[str, np.ndarray]:
        return {field.name: self.state[field.name] for field in fields(ItemFacts)}

    def arrays(self) -> dict[str, np.ndarray]:
        """As a file keeps them."""
        return {**self.state, "events": self.events, "price_scale": np.array([self.scale.mean, self.scale.deviation])}

    def content(self) -> ItemContent:
        """Of a model's rows: row 0, the unknown item's, and the items'."""
        one = ItemMetadata.unknown(1)
        state = {name: np.concatenate([one.state[name], column]) for name, column in self.state.items()}
        state["offsets"] = np.concatenate([one.state["offsets"][:-1], self.state["offsets"]])
        return ItemContent.from_state(state, np.concatenate([one.events, self.events]), self.scale)

    def new_item_content(self, catalogue: Catalogue, tokens: np.ndarray) -> ItemContent:
        """Of items that came after training, as the model's encoder reads them."""
        return ItemContent.from_state(catalogue.state(tokens), np.zeros(len(tokens), np.int64), self.scale)
