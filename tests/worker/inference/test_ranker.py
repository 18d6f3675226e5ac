"""What a ranked batch leaves in the metrics, and who may use tokens outside of the pipeline's thread."""

import asyncio

import pytest
from prometheus_client import REGISTRY

from pipeline.backends import GraphOptions
from pipeline.evaluation.business_metrics import BUSINESS_METRICS
from pipeline.records import Event, EventPacker, EventSchema, Item
from pipeline.serving.pipeline import Pipeline, PipelineOptions
from worker import config
from worker.clock import WallClock
from worker.inference.load import load_pipeline
from worker.inference.ranker import PipelineRanker
from worker.interfaces import Batch, ConsumedEvent, Entry, RecordOffset


def entry(number: int) -> Entry:
    event = Event(f"u{number}", f"item-{number}", "view", 1_700_000_000_000)
    packed = EventPacker(EventSchema()).pack(event)
    consumed = ConsumedEvent(event, packed, RecordOffset(("events", 0), 1, number), number + 1, 0, 0.0, ring=packed)
    return Entry(event.user_id, [consumed], 0, number)


def worth() -> dict[str, float]:
    names = {"slates": ("millrace_slates_with_expected_value_total", {})}
    names |= {metric: ("millrace_expected_value_total", {"metric": metric}) for metric in BUSINESS_METRICS}
    return {key: REGISTRY.get_sample_value(*name) or 0.0 for key, name in names.items()}


async def counted(pipeline: Pipeline, users: int) -> dict[str, float]:
    before, ranker = worth(), PipelineRanker(pipeline, 10, WallClock())
    await ranker.rank(Batch([entry(number) for number in range(users)], 32))
    ranker.close()
    return {key: value - before[key] for key, value in worth().items()}


def test_what_a_batchs_slates_are_worth_is_counted_and_a_rung_without_heads_counts_nothing(shop) -> None:

    options = PipelineOptions(device="cpu", threads=1)
    model = asyncio.run(counted(Pipeline.load(shop.artifact, options), 4))
    assert model["slates"] == 4
    assert all(0 < model[head] < 4 for head in BUSINESS_METRICS[:3])
    assert model["value"] > model["monetization"], "the shop's items cost more than 1"
    assert asyncio.run(counted(Pipeline.load(None, options), 4)) == pytest.approx(dict.fromkeys(model, 0.0))


def seen(name: str) -> float:
    return REGISTRY.get_sample_value(name) or 0.0


def test_room_is_made_before_tokens_are_held_and_not_while_they_are() -> None:
    async def scenario() -> None:
        pipeline = Pipeline.load(None, PipelineOptions(max_items=3))
        ranker = PipelineRanker(pipeline, 10, WallClock())
        vocabulary, before = pipeline.vocabulary, seen("millrace_items_rejected_total")
        await ranker.update_items([Item("a"), Item("b"), Item("c")], [], live=True)
        async with ranker.pin_items(["x", "y"]):
            assert vocabulary.admit(["x", "y"]).all()
            await ranker.update_items([Item("z")], [], live=True)
            assert not vocabulary.token("z")
        assert seen("millrace_items_rejected_total") == before + 1
        await ranker.update_items([Item("z")], [], live=True)
        assert vocabulary.token("z")
        assert seen("millrace_vocabulary_items") == 3
        ranker.close()

    asyncio.run(scenario())


def test_one_holds_tokens_at_a_time() -> None:
    async def scenario() -> list[str]:
        ranker, story = PipelineRanker(Pipeline.load(None), 10, WallClock()), []

        async def hold(name: str) -> None:
            async with ranker.pin_items():
                story.append(f"{name} in")
                await asyncio.sleep(0)
                await ranker.run_in_thread(lambda: None)
                assert ranker.pipeline.vocabulary.pinned
                story.append(f"{name} out")

        await asyncio.gather(hold("merge"), hold("swap"))
        assert not ranker.pipeline.vocabulary.pinned
        ranker.close()
        return story

    assert asyncio.run(scenario()) == ["merge in", "merge out", "swap in", "swap out"]


def test_a_workers_batches_have_graphs_unless_kernels_are_off() -> None:
    batcher, served = (
        config.BatcherConfig(max_users=64, max_tokens=4096),
        config.PipelineConfig(cuda_graph_mib=7, slate_size=5),
    )
    options = load_pipeline(config.Config(batcher=batcher, pipeline=served)).options
    assert options.graphs == GraphOptions(64, 4096, 7, 5)
    assert load_pipeline(config.Config(pipeline=config.PipelineConfig(custom_kernels=False))).options.graphs is None
