"""The configuration: one tree of frozen structs, read from TOML, overridden by `MILLRACE__SECTION__FIELD`.

An unknown key is an error with its path. Each default carries its reason. `show` prints the tree with each value's
source, secrets masked.
"""

import os
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct, field

from pipeline.records import EventSchema
from pipeline.serving.rerank import Rerank
from pipeline.serving.strategy import LADDER
from worker.errors import ConfigError

Positive = Annotated[int, Meta(gt=0)]
Share = Annotated[float, Meta(ge=0, le=1)]
Seconds = Annotated[float, Meta(gt=0)]
SECRETS = ("password", "secret")


class Kafka(Struct, frozen=True, forbid_unknown_fields=True):
    bootstrap: str = "localhost:9092"
    group: str = "millrace"
    events_topic: str = "events"
    slates_topic: str = "recommendations"
    dead_letter_topic: str = "events.dead"
    items_topic: str = "items"  # compacted, key = item id; a cluster without it is served by ids alone
    create_topics: bool = False  # a typo must not make a topic; the demo and the tests turn it on
    partitions: Positive = 8  # of topics that millrace creates
    replication: Positive = 1
    group_instance_id: str | None = None  # the pod's ordinal: a restart within the session keeps its partitions
    max_poll_records: Positive = 2000  # 8 k events/s need 4 polls a second; larger ones delay the first event
    start_timeout_s: Seconds = 60.0  # aiokafka's start() can hang: always bounded; dlq, rebuild, replay: 8 s unless set
    session_timeout_ms: Positive = 30000
    rebalance_timeout_ms: Positive = 60000  # time to drain on revoke; aiokafka's default is the session timeout
    request_timeout_ms: Positive = 30000
    linger_ms: Annotated[int, Meta(ge=0)] = 0  # batches are built by us, so nothing is gained by waiting
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "GSSAPI"] = "PLAIN"
    sasl_username: str | None = None
    sasl_password: str | None = None
    ssl_cafile: str | None = None
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None


class Redis(Struct, frozen=True, forbid_unknown_fields=True):
    url: str = "redis://localhost:6379/0"  # rediss:// for TLS; user and password in the URL are masked when printed
    cluster: bool = False
    timeout_s: Seconds = 2.0  # redis-py's own default is 5 s and 10 retries: half a minute of silence
    retry_s: Seconds = 0.2  # first back-off, doubled up to 5 s, without end: nothing is dropped while Redis is away


class Events(Struct, frozen=True, forbid_unknown_fields=True):
    actions: tuple[str, ...] = EventSchema().actions  # may only grow at its end: rings keep the code
    devices: tuple[str, ...] = EventSchema().devices
    trigger_actions: tuple[str, ...] | None = None  # None: every action asks for a fresh slate
    max_ahead_s: Seconds = 86400.0  # a phone's clock may be a day off; beyond that it is broken
    max_age_days: Annotated[float, Meta(ge=0)] = 3650.0  # 0: no limit (recorded logs of any age)


class Sequences(Struct, frozen=True, forbid_unknown_fields=True):
    cap_events: Annotated[int, Meta(ge=1, le=65535)] = 512  # 12 KiB a user; wanted: what the model reads + 255
    ttl_days: Annotated[float, Meta(gt=0)] = 90.0
    epoch: str = "1"  # change it after re-creating the events topic: offsets begin anew
    cache_mib: Positive = 64  # rings of owned partitions kept in the process


class Batcher(Struct, frozen=True, forbid_unknown_fields=True):
    max_users: Positive = 256
    max_tokens: Positive = 32768
    buckets: tuple[Positive, ...] = (32, 64, 128, 256, 512, 1024)  # lengths
    slo_ms: Positive = 100
    max_pending: Positive = 4096  # events admitted and unanswered; beyond it partitions are paused
    coalesce: bool = True  # off: one slate per event, as evaluation wants it
    in_flight: Positive = 4  # batches whose slates are not yet acknowledged


class Pipeline(Struct, frozen=True, forbid_unknown_fields=True):
    artifact: str | None = None  # a folder made by `millrace train`; None: the simple rung alone
    strategy: str | None = None  # None: the best rung that is healthy
    slate_items: Annotated[int, Meta(ge=1, le=512)] = 10
    exclude_actions: tuple[str, ...] | None = None  # what the user did with an item excludes it; None: any action
    exclude_window_days: Annotated[float, Meta(ge=0)] = 0.0  # 0: as far as the ring reaches
    threads: Annotated[int, Meta(ge=0)] = 0  # of torch; 0: its default
    device: str = "auto"
    kernels: bool = True  # on a GPU this project's, in half precision; off: torch's own, in float32
    graphs_mib: Annotated[int, Meta(ge=0)] = 4096  # of a GPU's memory, for CUDA graphs of batches; 0: no graphs
    follow_s: Annotated[float, Meta(ge=0)] = 5.0  # a new artifact serves after two looks, a few stats each; 0: never
    min_overlap: Share = 0.02  # with the slates just served: another seed after one epoch 0.13, mixed-up ids 0.002
    max_hit_rate_drop: Share = 0.2  # of the serving model's, as training judged both: a failed training loses more
    state_dir: str | None = None  # of this worker alone: what it knows of items; None: a start reads their whole topic

    def __post_init__(self) -> None:
        if self.strategy is not None and self.strategy not in LADDER:
            raise ValueError(f"strategy {self.strategy!r} is no rung; wanted one of {', '.join(LADDER)}")


class Counters(Struct, frozen=True, forbid_unknown_fields=True):
    half_life_days: Annotated[float, Meta(gt=0)] = 30.0
    neighbours: Positive = 64  # co-occurring items kept per item
    window_events: Positive = 10  # an event counts with this many of its user's events before it
    merge_s: Seconds = 15.0  # deltas go to Redis and rec:popular is rewritten this often
    max_items: Positive = 1_000_000  # with a token; when they are all given the deadest items give theirs to new ones


class Slates(Struct, frozen=True, forbid_unknown_fields=True):
    ttl_days: Annotated[float, Meta(gt=0)] = 30.0


class DeadLetters(Struct, frozen=True, forbid_unknown_fields=True):
    max_ratio: Share = 0.05  # of the last `window` records; above it something upstream is broken: halt
    max_consecutive: Positive = 1000
    window: Positive = 10000


class Health(Struct, frozen=True, forbid_unknown_fields=True):
    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] = 9108  # /livez /readyz /metrics; 0: a free port
    stall_s: Seconds = 300.0  # lag without progress for so long: dump tasks and exit
    commit_s: Seconds = 1.0
    drain_s: Seconds = 20.0  # on SIGTERM and on revoke; below rebalance_timeout_ms


class Log(Struct, frozen=True, forbid_unknown_fields=True):
    format: Literal["json", "console"] = "json"
    level: Literal["debug", "info", "warning", "error"] = "info"


class Serve(Struct, frozen=True, forbid_unknown_fields=True):
    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] = 8080


class Config(Struct, frozen=True, forbid_unknown_fields=True):
    kafka: Kafka = field(default_factory=Kafka)
    redis: Redis = field(default_factory=Redis)
    events: Events = field(default_factory=Events)
    sequences: Sequences = field(default_factory=Sequences)
    batcher: Batcher = field(default_factory=Batcher)
    pipeline: Pipeline = field(default_factory=Pipeline)
    counters: Counters = field(default_factory=Counters)
    slates: Slates = field(default_factory=Slates)
    dead_letters: DeadLetters = field(default_factory=DeadLetters)
    health: Health = field(default_factory=Health)
    log: Log = field(default_factory=Log)
    rerank: Rerank = field(default_factory=Rerank)
    serve: Serve = field(default_factory=Serve)

    @property
    def schema(self) -> EventSchema:
        return EventSchema(self.events.actions, self.events.devices)


def load(path: str | Path | None = None, env: dict[str, str] | None = None) -> Config:
    """The tree from a TOML file (or none) and the environment. ConfigError names the key's path and source."""
    tree = _read(path)
    config = _convert(tree, f"config {path}")
    for name, text in sorted((os.environ if env is None else env).items()):
        if name.startswith("MILLRACE__"):
            _put(tree, name, text)
            config = _convert(tree, f"environment {name}")  # it was good before this variable
    if unknown := set(config.events.trigger_actions or ()) - set(config.events.actions):
        actions = ", ".join(config.events.actions)
        where = "environment" if path is None else f"config {path}"
        raise ConfigError(
            f"{where}: events.trigger_actions: {', '.join(sorted(unknown))} not in events.actions ({actions})"
        )
    return config


def show(config: Config, path: str | Path | None, env: dict[str, str] | None = None) -> list[tuple[str, str, str]]:
    """Rows (key, value, source) of the whole tree; source is 'default', the file or the variable; secrets masked."""
    env = dict(os.environ) if env is None else env
    in_file = _read(path)
    rows = []
    for section, values in msgspec.to_builtins(config).items():
        for key, value in values.items():
            variable = f"MILLRACE__{section}__{key}".upper()
            source = variable if variable in env else str(path) if key in in_file.get(section, {}) else "default"
            rows.append((f"{section}.{key}", _masked(key, value), source))
    return rows


def _read(path: str | Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        return tomllib.loads(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"config {path}: {error.strerror}; give another file with --config") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {path}: not TOML: {error}") from error


def _put(tree: dict[str, Any], name: str, text: str) -> None:
    parts = name.lower().split("__")[1:]
    if len(parts) != 2 or not isinstance(tree.setdefault(parts[0], {}), dict):
        raise ConfigError(f"environment {name}: want MILLRACE__SECTION__FIELD, for example MILLRACE__REDIS__URL")
    tree[parts[0]][parts[1]] = text if _is_text(*parts) else _value(text)


def _is_text(section: str, key: str) -> bool:
    """Is the field a string, whatever its text looks like: an ordinal, a password of digits?"""
    sections = {each.name: each.type for each in msgspec.structs.fields(Config)}
    fields = msgspec.structs.fields(sections[section]) if section in sections else ()
    return any(each.name == key and each.type in (str, str | None) for each in fields)


def _value(text: str) -> Any:
    """TOML's reading of the text where it has one (numbers, booleans, lists), else the text itself."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _convert(tree: dict[str, Any], source: str) -> Config:
    try:
        return msgspec.convert(tree, Config)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{source}: {error}; `millrace config show` lists every key") from error


def _masked(key: str, value: Any) -> str:
    if value and any(secret in key for secret in SECRETS):
        return "***"
    if isinstance(value, str) and "://" in value and "@" in value:
        scheme, rest = value.split("://", 1)
        return f"{scheme}://***@{rest.rsplit('@', 1)[1]}"
    return "" if value is None else str(value)
