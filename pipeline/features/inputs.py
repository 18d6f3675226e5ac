"""All features of histories by one call: training, evaluation and serving read what `encode` returns, and nothing else.

A history is described by its own events alone, so a prefix has the same features as when it was all there was.
"""

from dataclasses import dataclass

import numpy as np

from pipeline.features.affinity import AffinityEvents
from pipeline.features.event_features import EncoderInputs, encoder_inputs
from pipeline.features.labels import LabelRules, engaged
from pipeline.features.visit_frequency import latest_visit_frequency, visit_frequency
from pipeline.items.catalogue import ItemFacts
from pipeline.records import Histories


@dataclass(slots=True)
class Inputs:
    """Features of n users with `total` events.

    events:   what the encoder reads, of all events; trim it with `tail`
    visits:   float32 [n, N_VISIT_FEATURES], as of each user's newest event; in training [total, ...], as of every event
    affinity: what the affinity of an item is counted over
    """

    events: EncoderInputs
    visits: np.ndarray
    affinity: AffinityEvents


def encode(
    histories: Histories, item_rows: np.ndarray, facts: ItemFacts, rules: LabelRules, ring_events: int | None = None
) -> Inputs:
    """Return the features of rings or, for training, of full histories.

    item_rows: int32 [total], each event's row of the model's item table, 0 = none; facts: of each event's item
    ring_events: of full histories, the size of the rings that serving reads; None: they are rings
    """
    if ring_events is None:
        visits = latest_visit_frequency(histories)
    else:
        visits = visit_frequency(histories, np.arange(len(histories.events)), ring_events)
    return Inputs(
        events=encoder_inputs(histories, item_rows, facts),
        visits=visits,
        affinity=AffinityEvents(
            item_rows, facts.categories, facts.price_codes, engaged(histories, rules), histories.offsets
        ),
    )
