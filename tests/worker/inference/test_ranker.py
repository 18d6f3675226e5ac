"""What a ranked batch leaves in the metrics, and who may use tokens outside of the pipeline's thread."""

import asyncio

import pytest
from prometheus_client import REGISTRY

from pipeline.backends import GraphOptions
from pipeline.evaluation.business_metrics import MEASURES
from pipeline.records import Event, EventPacker, EventSchema, Item
from pipeline.serving.pipeline import Pipeline, PipelineOptions
from worker import config
from worker.clock import WallClock
from worker.inference.ranker import Ranker, load_pipeline
from worker.interfaces import Arrival, Batch, Entry, Ticket


def entry(number: int) -> Entry:
    event = Event(f"u{number}", f"item-{number}", "view", 1_700_000_000_000)
    packed = EventPacker(EventSchema()).pack(event)
    arrival = Arrival(event, packed, Ticket(("events", 0), 1, number), number + 1, 0, 0.0, ring=packed)
    return Entry(event.user_id, [arrival], 0, number)


def worth() -> dict[str, float]:
    names = {"slates": ("millrace_valued_slates_total", {})}
    names |= {measure: ("millrace_slate_worth_total", {"measure": measure}) for measure in MEASURES}
    return {key: REGISTRY.get_sample_value(*name) or 0.0 for key, name in names.items()}


async def counted(pipeline: Pipeline, users: int) -> dict[str, float]:
    before, ranker = worth(), Ranker(pipeline, 10, WallClock())
    await ranker.rank(Batch([entry(number) for number in range(users)], 32))
    ranker.close()
    return {key: value - before[key] for key, value in worth().items()}


def test_what_a_batchs_slates_are_worth_is_counted_and_a_rung_without_heads_counts_nothing(shop) -> None:

    options = PipelineOptions(device="cpu", threads=1)
    model = asyncio.run(counted(Pipeline.load(shop.artifact, options), 4))
    assert model["slates"] == 4
    assert all(0 < model[head] < 4 for head in MEASURES[:3])
    assert model["value"] > model["monetization"], "the shop's items cost more than 1"
    assert asyncio.run(counted(Pipeline.load(None, options), 4)) == pytest.approx(dict.fromkeys(model, 0.0))


def seen(name: str) -> float:
    return REGISTRY.get_sample_value(name) or 0.0


def test_room_is_made_before_tokens_are_held_and_not_while_they_are() -> None:
    async def scenario() -> None:
        pipeline = Pipeline.load(None, PipelineOptions(max_items=3))
        ranker = Ranker(pipeline, 10, WallClock())
        vocabulary, before = pipeline.vocabulary, seen("millrace_items_refused_total")
        await ranker.learn([Item("a"), Item("b"), Item("c")], [], news=True)
        async with ranker.holding(["x", "y"]):
            assert vocabulary.admit(["x", "y"]).all()
            await ranker.learn([Item("z")], [], news=True)
            assert not vocabulary.token("z")
        assert seen("millrace_items_refused_total") == before + 1
        await ranker.learn([Item("z")], [], news=True)
        assert vocabulary.token("z")
        assert seen("millrace_vocabulary_items") == 3
        ranker.close()

    asyncio.run(scenario())


def test_one_holds_tokens_at_a_time() -> None:
    async def scenario() -> list[str]:
        ranker, story = Ranker(Pipeline.load(None), 10, WallClock()), []

        async def hold(name: str) -> None:
            async with ranker.holding():
                story.append(f"{name} in")
                await asyncio.sleep(0)
                await ranker.within(lambda: None)
                assert ranker.pipeline.vocabulary.held
                story.append(f"{name} out")

        await asyncio.gather(hold("merge"), hold("swap"))
        assert not ranker.pipeline.vocabulary.held
        ranker.close()
        return story

    assert asyncio.run(scenario()) == ["merge in", "merge out", "swap in", "swap out"]


def test_a_workers_batches_have_graphs_unless_kernels_are_off() -> None:
    batcher, served = config.Batcher(max_users=64, max_tokens=4096), config.Pipeline(graphs_mib=7, slate_items=5)
    options = load_pipeline(config.Config(batcher=batcher, pipeline=served)).options
    assert options.graphs == GraphOptions(64, 4096, 7, 5)
    assert load_pipeline(config.Config(pipeline=config.Pipeline(kernels=False))).options.graphs is None
