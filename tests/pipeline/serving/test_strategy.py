"""The ladder: the best healthy rung answers, a failed one rests and is probed once."""

from dataclasses import dataclass, field

import numpy as np

from pipeline.records import Histories
from pipeline.serving.strategy import COOLDOWN_S, FallbackChain, RankedItems


@dataclass
class FakeRung:
    name: str

    def rank(self, histories: Histories, k: int) -> RankedItems:
        return RankedItems(np.zeros((0, k), np.int32), np.zeros((0, k), np.float32), None, self.name)


@dataclass
class Clock:
    now_s: float = 0.0
    rungs: dict = field(default_factory=lambda: {name: FakeRung(name) for name in ("simple", "hstu", "tensorrt")})

    def __call__(self) -> float:
        return self.now_s

    def ladder(self) -> FallbackChain:
        return FallbackChain(self.rungs, self)


def names(ladder: FallbackChain, asked: str | None = None) -> list[str]:
    return [rung.name for rung in ladder.candidates(asked)]


def test_rungs_come_best_first_and_from_the_asked_one_downward():
    ladder = Clock().ladder()
    assert names(ladder) == ["tensorrt", "hstu", "simple"]
    assert names(ladder, "vllm") == ["hstu", "simple"]
    assert names(ladder, "simple") == ["simple"]


def test_a_failed_rung_rests_until_its_cooldown_is_over():
    clock = Clock()
    ladder = clock.ladder()
    ladder.record_failure(clock.rungs["tensorrt"])
    assert names(ladder) == ["hstu", "simple"]
    clock.now_s = COOLDOWN_S
    assert names(ladder) == ["tensorrt", "hstu", "simple"]


def test_the_last_rung_is_always_asked():
    clock = Clock()
    ladder = clock.ladder()
    for rung in clock.rungs.values():
        ladder.record_failure(rung)
    assert names(ladder) == ["simple"]
