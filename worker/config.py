"""The configuration: one tree of frozen structs. Each default carries its reason; `config_file.py` reads the tree."""

import re
from collections.abc import Iterable
from ipaddress import IPv6Address
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct, field

from pipeline.features.labels import LabelOptions
from pipeline.records import EventSchema
from pipeline.strategies.rerank import RerankWeights
from pipeline.strategies.strategy import FALLBACK_ORDER
from pipeline.types import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from worker.clock import date_ms
from worker.errors import ConfigError
from worker.secrets import masked

PREFIX = r"[^{}\s]{0,256}"  # braces would be a cluster's hash tag, and put all keys on one node
HOST_AND_PORT = r"(?P<host>[\w.-]+|\[(?P<ipv6>.*)\]):(?P<port>[0-9]{1,5})"
KAFKA_NAME = r"(?!\.{1,2}$)[a-zA-Z0-9._-]{1,249}"  # Kafka's rule for topics and group instance ids
TOPIC_KEYS = ("events_topic", "recommendations_topic", "dead_letter_topic", "items_topic")
TtlDays = Annotated[float, Meta(ge=1 / 86400)]  # Redis expires keys after whole seconds, at least one


class Section(Struct, frozen=True, forbid_unknown_fields=True):
    """A section of the tree. Its `repr`, as tracebacks and logs show it, masks secrets."""

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [(name, masked(name, value)) for name, value in msgspec.structs.asdict(self).items()]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.__rich_repr__())})"


class KafkaConfig(Section, frozen=True, forbid_unknown_fields=True):
    bootstrap_servers: str = "localhost:9092"  # HOST:PORT, or several separated by commas; [IPv6]:PORT
    group_id: str = "millrace"
    events_topic: str = "events"  # the four topics differ from each other
    recommendations_topic: str = "recommendations"
    dead_letter_topic: str = "events.dead"
    items_topic: str = "items"  # compacted, key = item id; without the topic, items are known from events only
    create_topics: bool = False  # a typo must not create a topic; the demo and the tests turn it on
    partitions: PositiveInt = 8  # for topics that millrace creates
    replication_factor: PositiveInt = 1  # for topics that millrace creates
    # ISO 8601 time from which to read partitions of which the group has committed nothing; unset: from their beginning
    start_at: str | None = None
    # where to continue when the next offset was deleted by retention or lies beyond the end: earliest loses the least
    on_offset_out_of_range: Literal["earliest", "latest", "halt"] = "earliest"
    group_instance_id: str | None = None  # the pod's ordinal: a restart within the session keeps its partitions
    max_poll_records: PositiveInt = 2000  # 8 k events/s need 4 polls per second; more delays a poll's first event
    start_timeout_s: PositiveFloat = 60.0  # aiokafka's start() can hang; dlq, rebuild and replay use 8 s unless set
    session_timeout_ms: PositiveInt = 30000
    rebalance_timeout_ms: PositiveInt = 60000  # time to drain on revoke; aiokafka's default is the session timeout
    request_timeout_ms: PositiveInt = 30000
    metadata_max_age_ms: PositiveInt = 30000  # how soon added partitions are read; aiokafka's default is 5 minutes
    linger_ms: NonNegativeInt = 0  # slates are batched before they are sent, so lingering gains nothing
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "GSSAPI"] = "PLAIN"
    sasl_username: str | None = None
    sasl_password: str | None = None
    ssl_cafile: str | None = None
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None

    def __post_init__(self) -> None:
        try:
            date_ms(self.start_at or "1970-01-01")
        except ValueError as error:
            raise ValueError(f"start_at {self.start_at!r}: want an ISO 8601 time, such as 2026-01-31T12:00Z") from error
        if not are_addresses(self.bootstrap_servers):
            raise ValueError(
                f"bootstrap_servers {self.bootstrap_servers!r}: want HOST:PORT, or several separated by commas, with "
                "ports from 1 to 65535 and IPv6 addresses in brackets"
            )
        if not self.group_id:
            raise ValueError("group_id is empty: want a name, the same for all workers that share the events")
        for key in (*TOPIC_KEYS, "group_instance_id"):
            name = getattr(self, key)
            if name is not None and not re.fullmatch(KAFKA_NAME, name):
                raise ValueError(f"{key} {name!r}: want 1 to 249 of a-z, A-Z, 0-9, '.', '_' and '-', not '.' or '..'")

    @property
    def worker_topics(self) -> tuple[str, str, str]:
        """The topics without which a worker does not start."""
        return self.events_topic, self.recommendations_topic, self.dead_letter_topic


class RedisConfig(Section, frozen=True, forbid_unknown_fields=True):
    url: str = "redis://localhost:6379/0"  # rediss:// for TLS; user and password in the URL are masked when printed
    cluster: bool = False
    # of every key, so that deployments can share a Redis; unset: kafka.group_id and a colon; without braces
    prefix: str | None = None
    start_timeout_s: PositiveFloat = 60.0  # a Redis that comes up later than the worker is waited for, like Kafka
    timeout_s: PositiveFloat = 2.0  # per round trip; redis-py's own default is 5 s and 10 retries
    retry_backoff_s: PositiveFloat = 0.2  # first delay, doubled up to 5 s; no event is dropped, however long it takes

    def __post_init__(self) -> None:
        if self.prefix is not None and not re.fullmatch(PREFIX, self.prefix):
            raise ValueError(f"prefix {self.prefix!r}: want at most 256 characters, none a brace or white space")


class EventsConfig(Struct, frozen=True, forbid_unknown_fields=True):
    # append only, without duplicates: rings store an action's position in this list, in one byte
    actions: Annotated[tuple[str, ...], Meta(min_length=1, max_length=255)] = EventSchema().actions
    # append only, like actions
    devices: Annotated[tuple[str, ...], Meta(max_length=255)] = EventSchema().devices
    trigger_actions: tuple[str, ...] | None = None  # actions that request a fresh slate; unset: all of them
    action_aliases: dict[str, str] = field(default_factory=dict)  # foreign names of actions: {addtocart = "cart"}
    max_clock_skew_s: PositiveFloat = 86400.0  # a phone's clock may be a day off; an event beyond that is dead-lettered
    max_age_days: NonNegativeFloat = 3650.0  # 0: no limit (recorded logs of any age)

    def __post_init__(self) -> None:
        for key, names in (("actions", self.actions), ("devices", self.devices)):
            if repeated := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"{key} has {', '.join(repeated)} more than once; a name's position is its code")


class SequencesConfig(Struct, frozen=True, forbid_unknown_fields=True):
    max_events: Annotated[int, Meta(ge=1, le=65535)] = 512  # per user, 12 KiB; at least the model's receptive field
    ttl_days: TtlDays = 90.0  # since the user's last event
    topic_generation: str = "1"  # change it after re-creating the events topic: offsets start again from 0
    cache_mib: PositiveInt = 64  # rings of owned partitions kept in the process


class BatcherConfig(Struct, frozen=True, forbid_unknown_fields=True):
    max_users: PositiveInt = 256  # per batch
    max_tokens: PositiveInt = 32768  # events per batch
    # events per user
    length_buckets: Annotated[tuple[PositiveInt, ...], Meta(min_length=1)] = (32, 64, 128, 256, 512, 1024)
    slo_ms: PositiveInt = 100  # time from poll to slate to aim for: it sets the batches' deadlines
    max_pending_events: PositiveInt = 4096  # admitted and unanswered; above it partitions are paused
    max_pending_mib: PositiveInt = 256  # of polled values and of waiting users' rings, likewise; 4096 rings take 48 MiB
    coalesce: bool = True  # false: one slate per event, for evaluation
    max_in_flight_batches: PositiveInt = 4  # batches whose slates are not yet acknowledged


class PipelineConfig(Struct, frozen=True, forbid_unknown_fields=True):
    artifact: str | None = None  # folder written by `millrace train`; unset: the simple strategy alone
    strategy: str | None = None  # where the fallback order starts; unset: with the best healthy strategy
    # of one's own, "package.module:Class", best first; tried before the others; see docs/operations.md
    strategies: tuple[str, ...] = ()
    slate_size: Annotated[int, Meta(ge=1, le=512)] = 10  # items per slate, unless a record's header `k` says otherwise
    exclude_actions: tuple[str, ...] | None = None  # actions that keep an item off its user's slates; unset: any action
    exclude_window_days: NonNegativeFloat = 0.0  # 0: as far back as the ring reaches
    threads: NonNegativeInt = 0  # torch threads; 0: torch's default
    device: str = "auto"
    custom_kernels: bool = True  # on a GPU: this project's kernels in half precision; false: torch in float32
    cuda_graph_mib: NonNegativeInt = 4096  # GPU memory for CUDA graphs of batches; 0: no graphs
    artifact_poll_interval_s: NonNegativeFloat = 5.0  # a new artifact must look the same at two checks; 0: never check
    # mean, with the slates just served; another seed after one epoch has 0.13, a model with mixed-up ids 0.002
    min_overlap: Fraction = 0.02
    # relative to the serving model's validation hit rate; a failed training loses more
    max_hit_rate_drop: Fraction = 0.2
    # folder for the journal of items, for this worker alone; unset: each start reads the whole items topic
    state_dir: str | None = None

    def __post_init__(self) -> None:
        # With strategies of one's own, their names are known once they are imported.
        if self.strategy is not None and self.strategy not in FALLBACK_ORDER and not self.strategies:
            raise ValueError(f"strategy {self.strategy!r} is unknown; want one of {', '.join(FALLBACK_ORDER)}")


class CountersConfig(Struct, frozen=True, forbid_unknown_fields=True):
    half_life_days: PositiveFloat = 30.0  # a count loses half of its weight in this time
    neighbours: PositiveInt = 64  # co-occurring items kept per item
    window_events: PositiveInt = 10  # an event is paired with this many preceding events of its user
    merge_interval_s: PositiveFloat = 15.0  # between merges through Redis, which also rewrite rec:popular
    max_items: PositiveInt = 1_000_000  # items with a token; when full, the least recently seen items are evicted


class SlatesConfig(Struct, frozen=True, forbid_unknown_fields=True):
    ttl_days: TtlDays = 30.0  # in Redis, since the slate was written


class DeadLettersConfig(Struct, frozen=True, forbid_unknown_fields=True):
    max_ratio: Fraction = 0.05  # of the last `window_records`; above it the worker halts: something upstream is broken
    max_consecutive: PositiveInt = 1000  # bad records in a row; above it the worker halts
    window_records: PositiveInt = 10000


class HealthConfig(Struct, frozen=True, forbid_unknown_fields=True):
    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] = 9108  # /livez /readyz /metrics; 0: a free port
    # lag without progress: dump the tasks and exit; a server that is known to be away is waited for
    stall_timeout_s: PositiveFloat = 300.0
    partition_stall_s: PositiveFloat = 60.0  # one partition stands still while records wait: /readyz and the log say so
    commit_interval_s: PositiveFloat = 1.0  # records after the last commit are read again after a kill
    # for the whole way out after SIGTERM or an error, plus 2 s; for answering on revoke: keep it below
    # rebalance_timeout_ms
    drain_timeout_s: PositiveFloat = 20.0


class LogConfig(Struct, frozen=True, forbid_unknown_fields=True):
    format: Literal["json", "console"] = "json"
    level: Literal["debug", "info", "warning", "error"] = "info"


class ServeConfig(Struct, frozen=True, forbid_unknown_fields=True):
    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] = 8080  # 0: a free port
    max_concurrent_lookups: PositiveInt = 4096  # queued; one more is answered with 503, so that memory stays bounded


class Config(Struct, frozen=True, forbid_unknown_fields=True):
    kafka: KafkaConfig = field(default_factory=KafkaConfig)
    redis: RedisConfig = field(default_factory=RedisConfig)
    events: EventsConfig = field(default_factory=EventsConfig)
    sequences: SequencesConfig = field(default_factory=SequencesConfig)
    batcher: BatcherConfig = field(default_factory=BatcherConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    counters: CountersConfig = field(default_factory=CountersConfig)
    slates: SlatesConfig = field(default_factory=SlatesConfig)
    dead_letters: DeadLettersConfig = field(default_factory=DeadLettersConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    log: LogConfig = field(default_factory=LogConfig)
    rerank: RerankWeights = field(default_factory=RerankWeights)
    labels: LabelOptions = field(default_factory=LabelOptions)
    serve: ServeConfig = field(default_factory=ServeConfig)

    @property
    def key_prefix(self) -> str:
        """The prefix of all keys in Redis. Braces would be a cluster's hash tag: those of a group id are left out."""
        if self.redis.prefix is not None:
            return self.redis.prefix
        return "".join(char for char in self.kafka.group_id if char not in "{}" and not char.isspace()) + ":"

    @property
    def schema(self) -> EventSchema:
        return EventSchema(self.events.actions, self.events.devices)


def are_addresses(servers: str) -> bool:
    """Whether the text is HOST:PORT, or several separated by commas."""
    return all(_is_address(each.strip()) for each in servers.split(","))


def _is_address(text: str) -> bool:
    """Whether the text is HOST:PORT with a port that exists."""
    match = re.fullmatch(HOST_AND_PORT, text)
    if match is None:
        return False
    try:
        IPv6Address(match["ipv6"] or "::")
    except ValueError:
        return False
    return match["host"] != "[]" and 1 <= int(match["port"]) <= 65535


def check_topics(kafka: KafkaConfig, where: str) -> None:
    """Raise ConfigError if two of the topics are one: each would be read as something that it does not hold."""
    keys: dict[str, str] = {}
    for key in TOPIC_KEYS:
        name = getattr(kafka, key)
        if name in keys:
            raise ConfigError(f"{where}: kafka.{keys[name]} and kafka.{key} are both {name!r}; name two topics")
        keys[name] = key


def check_actions(events: EventsConfig, actions: Iterable[str], where: str) -> None:
    """Raise ConfigError if one of these actions is not in events.actions."""
    if unknown := set(actions) - set(events.actions):
        known = ", ".join(events.actions)
        raise ConfigError(f"{where}: {', '.join(sorted(unknown))} not in events.actions ({known})")
