"""Short chaos runs. A seed that fails is repeated with `python -m tests.faults.chaos SEED`."""

from pathlib import Path

import pytest

from tests.faults.chaos import ChaosRow, make_models, run
from tests.oracle import Oracle
from worker.replay.local_servers import missing_requirement

SECONDS = 10.0


@pytest.mark.skipif(missing_requirement() is not None, reason=f"no Kafka broker: {missing_requirement()}")
@pytest.mark.parametrize("seed", [2, 3, 5])
async def test_nothing_is_lost_or_changed_by_the_faults_of_a_seed(seed: int, tmp_path: Path) -> None:
    row = await run(seed, SECONDS, tmp_path, make_models(tmp_path))
    assert row.events > 500
    assert (row.lost, row.rings_wrong, row.out_of_order) == (0, 0, 0), row


def test_row_of_a_seed_names_what_is_counted() -> None:
    names = ("seed", "faults", "events", "lost", "rings_wrong", "out_of_order", "worst_recovery_s")
    assert ChaosRow.__struct_fields__ == names


def test_oracle_finds_a_slate_that_answers_a_later_event_first() -> None:
    oracle = Oracle("events", 4)
    for offset in range(2):
        oracle.feed(0, offset, {"user_id": "u", "item_id": "i", "action": "view", "ts_ms": offset})
    late, early = (
        {"user_id": "u", "covers": {"partition": 0, "first_offset": offset, "last_offset": offset}} for offset in (1, 0)
    )
    assert oracle.out_of_order([late, early]) == [late]
    assert oracle.out_of_order([early, late]) == []
    assert oracle.lost([late]) == [("u", 0, 0)]
