"""The probes and metrics of a fleet: those of its members, together."""

import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from worker.fleet.member import Member

TIMEOUT_S = 2.0  # a member's page takes milliseconds


def read_page(member: Member, page: str) -> tuple[int, str]:
    """Return the status and text of a page of a member's health server; status 0 when it does not answer."""
    if not member.port:
        return 0, "starting"
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{member.port}{page}", timeout=TIMEOUT_S) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError as error:
        return 0, f"does not answer: {error}"


def is_ready(member: Member) -> bool:
    return read_page(member, "/readyz")[0] == 200


@dataclass
class FleetProbes:
    """Implements Probes. A fleet serves when all of its members do; size: their number."""

    members: Mapping[int, Member]
    size: int

    def alive(self) -> tuple[bool, str]:
        """The supervisor answers, so it lives: it watches its members' heartbeats itself."""
        return True, f"{len(self.members)} of {self.size} workers started"

    def serving(self) -> tuple[bool, str]:
        missing = [f"worker {number}: not started" for number in range(self.size) if number not in self.members]
        pages = {number: read_page(member, "/readyz") for number, member in sorted(self.members.items())}
        missing += [f"worker {number}: {text.strip()}" for number, (status, text) in pages.items() if status != 200]
        return not missing, "; ".join(missing) or f"serving, workers: {self.size}"


class FleetCollector(Collector):
    """The members' metrics, each with one more label, `worker`."""

    def __init__(self, members: Mapping[int, Member]) -> None:
        self._members = members

    def describe(self) -> Iterator[Metric]:
        """Name nothing: what the members export is known when they are asked."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        merged: dict[str, Metric] = {}
        for number, member in sorted(self._members.items()):
            status, text = read_page(member, "/metrics")
            if status != 200:
                continue
            for family in text_string_to_metric_families(text):
                metric = merged.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    labels = {**sample.labels, "worker": str(number)}
                    metric.add_sample(sample.name, labels, sample.value)
        yield from merged.values()
