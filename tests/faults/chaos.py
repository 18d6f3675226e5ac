"""A chaos run: faults drawn from a seed hit a deployment under traffic; an oracle then counts what they broke.

The seed decides the faults, their order, their parameters and the traffic. What it cannot decide is how the processes'
steps interleave, so a seed that has failed once may pass the next time.

usage: python -m tests.faults.chaos SEED [--seconds 60]      repeats one seed and prints its row
"""

import argparse
import asyncio
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
from aiokafka import AIOKafkaProducer

from tests import artifacts
from tests.faults.chaos_deployment import EVENTS, INVALID, Deployment, Member
from worker.errors import NotDrained

RECOVERY_TIMEOUT_S = 90.0
MAX_PARTITIONS = 6
MEMBERS = "has members"  # what `millrace rebuild` says about them
STALE = "commit skipped, generation is stale"  # what a worker says whose partitions are another's
Fault = Callable[[Deployment, random.Random], Awaitable[None]]


class ChaosRow(msgspec.Struct):
    """The result of one seed.

    faults: in their order; events: records produced, invalid ones among them
    lost: events without a slate, and invalid records without a dead letter; rings_wrong: users whose ring is not the
    oracle's; out_of_order: slates before one of an earlier event of their user
    worst_recovery_s: the longest time from a fault's end until all that was produced until then was committed
    """

    seed: int
    faults: str
    events: int
    lost: int
    rings_wrong: int
    out_of_order: int
    worst_recovery_s: float


async def kill_worker(deployment: Deployment, rng: random.Random) -> None:
    member = rng.choice(deployment.members)
    deployment.members.remove(member)
    member.process.kill()
    await asyncio.to_thread(member.process.wait)
    deployment.start_member()


async def freeze_worker(deployment: Deployment, rng: random.Random) -> None:
    """Stop a worker for less or more than its session: it may continue after its partitions are another's."""
    member = rng.choice(deployment.members)
    os.kill(member.process.pid, signal.SIGSTOP)
    await asyncio.sleep(rng.uniform(1, 12))
    os.kill(member.process.pid, signal.SIGCONT)


async def replace_worker(deployment: Deployment, rng: random.Random) -> None:
    """Let a new worker join and an old one leave: two rebalances."""
    member = rng.choice(deployment.members)
    await deployment.wait_assigned(deployment.start_member())
    check_ending(member, await deployment.stop_member(member))


async def restart_broker(deployment: Deployment, rng: random.Random) -> None:
    broker = rng.choice([deployment.kafka, deployment.broker])
    await asyncio.to_thread(rng.choice([broker.stop, broker.kill]))
    await asyncio.sleep(rng.uniform(0, 3))
    await asyncio.to_thread(broker.start)


async def replace_broker(deployment: Deployment, rng: random.Random) -> None:
    await deployment.replace_broker()


async def restart_redis(deployment: Deployment, rng: random.Random) -> None:
    await asyncio.to_thread(deployment.valkey.kill)
    await asyncio.sleep(rng.uniform(0, 3))
    await asyncio.to_thread(deployment.valkey.start)


async def slow_redis(deployment: Deployment, rng: random.Random) -> None:
    """Let Redis answer nothing for a while, most of it longer than a worker waits for a reply."""
    pause_s = rng.uniform(0.2, 4)
    async with deployment.redis() as redis:
        await redis.client_pause(int(1000 * pause_s))
    await asyncio.sleep(pause_s)


async def stall_partition(deployment: Deployment, rng: random.Random) -> None:
    """Leave a transaction open on one partition: nothing after it can be read until it ends."""
    async with AIOKafkaProducer(
        bootstrap_servers=deployment.kafka.bootstrap, transactional_id=f"stall-{rng.random()}"
    ) as producer:
        await producer.begin_transaction()
        await producer.send_and_wait(EVENTS, rng.choice(INVALID), partition=rng.randrange(deployment.partitions))
        await asyncio.sleep(rng.uniform(1, 6))
        await rng.choice([producer.commit_transaction, producer.abort_transaction])()


async def truncate_topic(deployment: Deployment, rng: random.Random) -> None:
    await deployment.truncate()


async def add_partition(deployment: Deployment, rng: random.Random) -> None:
    if deployment.partitions < MAX_PARTITIONS:
        await deployment.add_partition()


async def swap_model(deployment: Deployment, rng: random.Random) -> None:
    serving = deployment.link.resolve()
    [other] = [each for each in deployment.artifacts if each.resolve() != serving]
    artifacts.point(deployment.link, other)


async def rebuild_beside_workers(deployment: Deployment, rng: random.Random) -> None:
    """Rebuild while workers serve: it must refuse."""
    done = await deployment.run_command("rebuild")
    assert done.returncode != 0, done.stdout
    assert MEMBERS in done.stderr, done.stderr


async def lose_redis(deployment: Deployment, rng: random.Random) -> None:
    """Empty Redis and restore it from the topic, which can bring back only what has not been truncated."""
    if deployment.is_truncated:
        return
    for member in list(deployment.members):
        await deployment.stop_member(member)
    async with deployment.redis() as redis:
        await redis.flushall()
    done = await deployment.run_command("rebuild")
    assert done.returncode == 0, done.stderr
    for _ in range(2):
        deployment.start_member()


FAULTS: tuple[Fault, ...] = (
    kill_worker,
    freeze_worker,
    replace_worker,
    restart_broker,
    replace_broker,
    restart_redis,
    slow_redis,
    stall_partition,
    truncate_topic,
    add_partition,
    swap_model,
    rebuild_beside_workers,
    lose_redis,
)


async def run(seed: int, seconds: float, folder: Path, models: tuple[Path, Path]) -> ChaosRow:
    """Let faults happen for so long, then let the workers finish, and check. AssertionError, TimeoutError."""
    rng = random.Random(seed)
    names: list[str] = []
    worst_s = 0.0
    async with Deployment(folder, seed, models) as deployment:
        try:
            end_s = time.monotonic() + seconds
            while time.monotonic() < end_s:
                fault = rng.choice(FAULTS)
                names.append(fault.__name__)
                await asyncio.sleep(rng.uniform(0, 2))
                await fault(deployment, rng)
                worst_s = max(worst_s, await recovery_s(deployment))
            await deployment.stop_traffic()
            worst_s = max(worst_s, await recovery_s(deployment))
            for member in list(deployment.members):
                check_ending(member, await deployment.stop_member(member))
            events, found = await deployment.check()
        except BaseException:
            print(f"seed {seed}: {' '.join(names)}\n{deployment.logs()}")
            raise
    return ChaosRow(seed, " ".join(names), events, **found, worst_recovery_s=round(worst_s, 2))


def check_ending(member: Member, status: int) -> None:
    """A worker that was asked to drain has done so, or says that a rebalance has just taken partitions from it."""
    was_overtaken = STALE in member.log.read_text()
    assert status == 0 or (status == NotDrained.exit_code and was_overtaken), f"{member.log.name}: exit code {status}"


async def recovery_s(deployment: Deployment) -> float:
    """Return how long it takes until all that has been produced so far is committed. TimeoutError."""
    start_s = time.monotonic()
    await deployment.wait_committed(await deployment.ends(), RECOVERY_TIMEOUT_S)
    return time.monotonic() - start_s


def make_models(folder: Path) -> tuple[Path, Path]:
    """Write two models, which differ by a little noise."""
    original = artifacts.untrained([f"item-{number}" for number in range(100)])
    for name, artifact in (("one", original), ("two", artifacts.nudged(original, 1))):
        artifacts.save(folder / name, artifact)
    return folder / "one", folder / "two"


def run_seed(seed: int, seconds: float) -> ChaosRow:
    """Run one seed in a temporary folder."""
    with TemporaryDirectory(prefix="millrace-chaos-") as name:
        folder = Path(name)
        return asyncio.run(run(seed, seconds, folder, make_models(folder)))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seed", type=int, help="seed of the faults and the traffic")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long faults are drawn (default 60)")
    args = parser.parse_args(argv)
    print(msgspec.json.encode(run_seed(args.seed, args.seconds)).decode())


if __name__ == "__main__":
    main()
