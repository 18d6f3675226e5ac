"""Pairs of a user's events that co-occur, found among the events that are new."""

import numpy as np


def follows_new(is_new: np.ndarray, starts: np.ndarray, window: int) -> np.ndarray:
    """Return which events are new or have a new one, which came late, in the window before them: bool [total].

    is_new: bool [total]; starts: int64 [total], where each event's history begins
    """
    new_before = np.concatenate([[0], np.cumsum(is_new)])  # each position
    window_starts = np.maximum(np.arange(len(is_new)) - window, starts)
    return new_before[1:] > new_before[window_starts]


def new_pairs(
    tokens: np.ndarray, is_new: np.ndarray, events: np.ndarray, starts: np.ndarray, window: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the new pairs of the events at these positions with those before them: others int32 [n, window], bool.

    The bools say which are pairs of different items of the vocabulary, of which at least one event is new; column d is
    the event d + 1 before. tokens: int32 [total]; events: int64 [n]; starts: int64 [n], as in `follows_new`
    """
    before = events[:, None] - np.arange(1, window + 1)  # [n, window] positions
    inside = before >= starts[:, None]
    before = np.maximum(before, 0)
    inside &= is_new[events][:, None] | is_new[before]
    one = tokens[events][:, None]
    others = np.where(inside, tokens[before], 0)
    return others, (one > 0) & (others > 0) & (others != one)
