"""Check `redis.url` before redis-py reads it.

redis-py passes unknown options on to its connections, takes any text for true, and reads a path that is no number as
database 0. Messages show no part of a URL whose parts cannot be told apart: it may be part of the password.
"""

from urllib.parse import parse_qsl, urlsplit

from worker.errors import ConfigError

SCHEMES = ("redis", "rediss", "unix")
WANT = "want redis://USER:PASSWORD@HOST:PORT/DB, rediss://... for TLS, or unix://PATH"
ENCODE = "percent-encode it: / as %2F, ? as %3F, # as %23, @ as %40"
BOOLEANS = ("true", "false")
# Options of redis-py that leave the worker's own deadlines and protocol as they are, each with its values.
TEXT = ("username", "password", "client_name")
WHOLE_NUMBERS = ("db", "health_check_interval", "max_connections")
FLAGS = ("socket_keepalive",)
TLS_TEXT = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
TLS_FLAGS = ("ssl_check_hostname",)
CERT_REQS = ("none", "optional", "required")


def check_url(url: str) -> None:
    """Raise ConfigError, in one sentence and without a secret, unless redis-py reads the URL as it is meant."""
    if "@" in _after_authority(url):
        raise ConfigError(f"redis.url: user or password has a reserved character; {ENCODE}")
    parts = urlsplit(url)
    if parts.scheme not in SCHEMES:
        raise ConfigError(f"redis.url: its scheme is {parts.scheme!r}; {WANT}")
    try:
        _ = parts.port
    except ValueError:
        raise ConfigError(
            "redis.url: its port is not a number from 0 to 65535, or user or password has a reserved character; "
            f"{ENCODE}; {WANT}"
        ) from None
    if parts.fragment:
        raise ConfigError(f"redis.url: it has a '#'; in a password that is %23; {WANT}")
    if parts.scheme != "unix" and not _is_database(parts.path):
        raise ConfigError(f"redis.url: its path {parts.path!r} is not the number of a database; {WANT}")
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        _check_option(parts.scheme, name, value)


def _after_authority(url: str) -> str:
    """Return what follows user, password, host and port, as a parser splits the URL."""
    rest = url.partition("://")[2]
    ends = [index for index in (rest.find(character) for character in "/?#") if index >= 0]
    return "" if url.startswith("unix:") or not ends else rest[min(ends) :]


def _is_database(path: str) -> bool:
    return path in ("", "/") or (path[1:].isascii() and path[1:].isdigit())


def _check_option(scheme: str, name: str, value: str) -> None:
    """Raise ConfigError for an option that is unknown or has a wrong value; a value is shown unless it is text."""
    tls = scheme == "rediss"
    if name == "ssl_cert_reqs" or name in (*TLS_TEXT, *TLS_FLAGS):
        if not tls:
            raise ConfigError(f"redis.url: option {name} needs TLS; write rediss:// instead of {scheme}://")
    elif name not in (*TEXT, *WHOLE_NUMBERS, *FLAGS):
        known = ", ".join((*TEXT, *WHOLE_NUMBERS, *FLAGS, "and with rediss:// ssl_cert_reqs", *TLS_TEXT, *TLS_FLAGS))
        raise ConfigError(f"redis.url: unknown option {name!r}; known are {known}")
    if name in WHOLE_NUMBERS and not (value.isascii() and value.isdigit()):
        raise ConfigError(f"redis.url: option {name} is {value!r}; want a whole number")
    if name in (*FLAGS, *TLS_FLAGS) and value.lower() not in BOOLEANS:
        raise ConfigError(f"redis.url: option {name} is {value!r}; want {' or '.join(BOOLEANS)}")
    if name == "ssl_cert_reqs" and value not in CERT_REQS:
        raise ConfigError(f"redis.url: option {name} is {value!r}; want {', '.join(CERT_REQS)}")
