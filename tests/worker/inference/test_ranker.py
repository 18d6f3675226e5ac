"""PipelineRanker: metrics of a ranked batch, pinned items, options of the pipeline."""

import asyncio
import time

import pytest
from prometheus_client import REGISTRY

from pipeline.backends.encoder import GraphOptions
from pipeline.evaluation.business_metrics import BUSINESS_METRICS
from pipeline.records import Event, EventPacker, EventSchema, Histories, Item, item_hash
from pipeline.serving.batch_result import BatchResult
from pipeline.serving.pipeline import Pipeline
from pipeline.strategies.hstu_batch import PreparedBatch
from pipeline.strategies.hstu_strategy import HstuStrategy
from pipeline.strategies.options import PipelineOptions
from pipeline.strategies.strategy import Request
from worker.clock import WallClock
from worker.config import BatcherConfig, Config, PipelineConfig
from worker.errors import ConfigError
from worker.inference.load import load_pipeline
from worker.inference.ranker import PipelineRanker
from worker.interfaces import Batch, ConsumedEvent, Entry, Partition, RecordOffset

OPTIONS = PipelineOptions(device="cpu", threads=1)


def entry(number: int) -> Entry:
    event = Event(f"u{number}", f"item-{number}", "view", 1_700_000_000_000)
    packed = EventPacker(EventSchema()).pack(event)
    consumed = ConsumedEvent(
        event=event,
        packed=packed,
        record_offset=RecordOffset(Partition("events", 0), 1, number),
        end_offset=number + 1,
        polled_ms=0,
        polled_s=0.0,
        ring=packed,
    )
    return Entry(event.user_id, [consumed], deadline_ms=0, order=number)


def sample(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


def expected_value() -> dict[str, float]:
    totals = {metric: sample("millrace_expected_value_total", metric=metric) for metric in BUSINESS_METRICS}
    return {"slates": sample("millrace_slates_with_expected_value_total")} | totals


async def rank_and_count(pipeline: Pipeline, users: int) -> dict[str, float]:
    """Return by how much ranking a batch raises the expected-value metrics."""
    before = expected_value()
    ranker = PipelineRanker(pipeline, 10, WallClock())
    await ranker.rank(Batch([entry(number) for number in range(users)], 32))
    ranker.close()
    return {key: value - before[key] for key, value in expected_value().items()}


async def test_expected_value_is_counted_only_for_slates_with_head_predictions(shop) -> None:
    model = await rank_and_count(Pipeline.load(shop.artifact, OPTIONS), users=4)
    assert model["slates"] == 4
    assert all(0 < model[head] < 4 for head in BUSINESS_METRICS[:3])
    assert model["value"] > model["monetization"], "the shop's items cost more than 1"
    simple = await rank_and_count(Pipeline.load(None, OPTIONS), users=4)
    assert simple == pytest.approx(dict.fromkeys(model, 0.0))


@pytest.mark.parametrize(
    ("configured", "header", "expected"),
    [
        (None, None, ("hstu", "torch", "best")),
        ("simple", None, ("simple", "numpy", "requested")),
        ("simple", "hstu", ("hstu", "torch", "requested")),
        (None, "vllm", ("hstu", "torch", "missing")),
    ],
)
async def test_slates_name_strategy_backend_and_who_chose_it(
    shop, configured: str | None, header: str | None, expected: tuple[str, str, str]
) -> None:
    ranker = PipelineRanker(Pipeline.load(shop.artifact, OPTIONS), 10, WallClock(), configured)
    slates = await ranker.rank(Batch([entry(1), entry(2)], 32, header))
    ranker.close()
    assert [(slate.strategy, slate.backend, slate.why) for slate in slates] == [expected] * 2


async def test_eviction_makes_room_before_items_are_pinned_and_not_while_they_are() -> None:
    pipeline = Pipeline.load(None, PipelineOptions(max_items=3))
    ranker = PipelineRanker(pipeline, 10, WallClock())
    vocabulary = pipeline.vocabulary
    rejected = sample("millrace_items_rejected_total")
    await ranker.update_items([Item("a"), Item("b"), Item("c")], [], live=True)
    async with ranker.pin_items(["x", "y"]):
        assert vocabulary.admit(["x", "y"]).all()
        await ranker.update_items([Item("z")], [], live=True)
        assert not vocabulary.token("z")
    assert sample("millrace_items_rejected_total") == rejected + 1
    await ranker.update_items([Item("z")], [], live=True)
    assert vocabulary.token("z")
    assert sample("millrace_vocabulary_items") == 3
    ranker.close()


async def test_items_are_pinned_by_one_caller_at_a_time() -> None:
    ranker = PipelineRanker(Pipeline.load(None), 10, WallClock())
    order: list[str] = []

    async def pin(caller: str) -> None:
        async with ranker.pin_items():
            order.append(f"{caller} in")
            await asyncio.sleep(0)
            await ranker.run_in_thread(lambda: None)
            assert ranker.pipeline.vocabulary.pinned
            order.append(f"{caller} out")

    await asyncio.gather(pin("merge"), pin("swap"))
    assert not ranker.pipeline.vocabulary.pinned
    ranker.close()
    assert order == ["merge in", "merge out", "swap in", "swap out"]


def test_pipeline_has_graph_options_unless_custom_kernels_are_off() -> None:
    batcher = BatcherConfig(max_users=64, max_tokens=4096)
    config = Config(batcher=batcher, pipeline=PipelineConfig(cuda_graph_mib=7, slate_size=5))
    assert load_pipeline(config).options.graphs == GraphOptions(64, 4096, 7, 5)
    assert load_pipeline(Config(pipeline=PipelineConfig(custom_kernels=False))).options.graphs is None


async def test_deadline_of_a_batchs_first_slate_reaches_the_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = Pipeline.load(None, OPTIONS)
    deadlines_s: list[float] = []
    rank = pipeline.rank

    def spy(histories: Histories, k: int, strategy: str | None, deadline_s: float) -> BatchResult:
        deadlines_s.append(deadline_s)
        return rank(histories, k, strategy, deadline_s)

    monkeypatch.setattr(pipeline, "rank", spy)
    clock = WallClock()
    ranker = PipelineRanker(pipeline, 10, clock)
    entries = [entry(1), entry(2)]
    entries[0].deadline_ms = clock.now_ms() + 90_000
    entries[1].deadline_ms = clock.now_ms() + 30_000
    await ranker.rank(Batch(entries, 32))
    ranker.close()
    assert deadlines_s[0] - time.monotonic() == pytest.approx(30, abs=5)


def test_configured_strategy_that_nobody_has_is_one_sentence() -> None:
    own = ("tests.pipeline.strategies.test_own_strategies:Alphabetical",)
    load_pipeline(Config(pipeline=PipelineConfig(strategies=own, strategy="alphabetical")))
    with pytest.raises(
        ConfigError, match=r"pipeline\.strategy: no strategy 'oracle', want one of alphabetical, unified"
    ):
        load_pipeline(Config(pipeline=PipelineConfig(strategies=own, strategy="oracle")))


async def test_slate_of_a_user_set_aside_names_its_own_strategy_and_is_counted(
    shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison = item_hash("item-2")
    prepare = HstuStrategy.prepare

    def prepare_unless_poisoned(strategy: HstuStrategy, request: Request) -> PreparedBatch:
        if (request.histories.items == poison).any():
            raise RuntimeError("this ring cannot be ranked")
        return prepare(strategy, request)

    monkeypatch.setattr(HstuStrategy, "prepare", prepare_unless_poisoned)
    config = Config(pipeline=PipelineConfig(str(shop.artifact), device="cpu", threads=1))
    ranker = PipelineRanker(load_pipeline(config), 10, WallClock())
    batch = Batch([entry(number) for number in range(5)], 32)
    for each in batch.entries:
        each.deadline_ms = WallClock().now_ms() + 60_000
    labels = {"strategy": "hstu", "error": "RuntimeError"}
    before = sample("millrace_users_set_aside_total", **labels)
    slates = await ranker.rank(batch)
    served = await ranker.served_samples()
    ranker.close()
    expected = dict.fromkeys(range(5), ("hstu", "best")) | {2: ("simple", "failed")}
    assert [(slate.strategy, slate.why) for slate in slates] == list(expected.values())
    assert len(served) == 4, "by the model"
    assert sample("millrace_users_set_aside_total", **labels) == before + 1
