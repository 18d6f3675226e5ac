"""Reads the configuration from TOML, overridden by `MILLRACE__SECTION__KEY`; shows each value with its source.

An unknown key is an error that names its path. Secrets are masked when they are shown.
"""

import json
import os
import tomllib
from pathlib import Path
from typing import Any

import msgspec

from pipeline.features.labels import LabelOptions
from worker.config import Config, check_actions, check_topics
from worker.errors import ConfigError
from worker.secrets import masked


def load(path: str | Path | None = None, env: dict[str, str] | None = None) -> Config:
    """Read the tree from a TOML file (or none) and the environment. ConfigError names the key's path and source."""
    tree = _read(path)
    config = _convert(tree, f"config {path}")
    for name, text in sorted((os.environ if env is None else env).items()):
        if name.startswith("MILLRACE__"):
            _put(tree, name, text)
            config = _convert(tree, f"environment {name}")  # valid before this variable, so an error is the variable's
    where = "environment" if path is None else f"config {path}"
    _check_actions(config, where)
    check_topics(config.kafka, where)
    return config


def show(config: Config, path: str | Path | None, env: dict[str, str] | None = None) -> list[tuple[str, str, str]]:
    """Return (key, value, source) for every key; the source is 'default', the file or the variable."""
    env = dict(os.environ) if env is None else env
    in_file = _read(path)
    rows = []
    for section, values in msgspec.to_builtins(config).items():
        for key, value in values.items():
            variable = f"MILLRACE__{section}__{key}".upper()
            source = variable if variable in env else str(path) if key in in_file.get(section, {}) else "default"
            rows.append((f"{section}.{key}", _printed(key, value), source))
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


def _check_actions(config: Config, where: str) -> None:
    """Raise ConfigError for an action that is not in `events.actions`; default names of labels need not be there."""
    defaults = msgspec.structs.asdict(LabelOptions())
    chosen = {
        "events.trigger_actions": set(config.events.trigger_actions or ()),
        "events.action_aliases": set(config.events.action_aliases.values()),
    }
    for name in ("engaged_actions", "valued_actions", "paid_actions"):
        chosen[f"labels.{name}"] = set(getattr(config.labels, name)) - set(defaults[name])
    for key, actions in chosen.items():
        check_actions(config.events, actions, f"{where}: {key}")


def _put(tree: dict[str, Any], name: str, text: str) -> None:
    parts = name.lower().split("__")[1:]
    if len(parts) != 2 or not isinstance(tree.setdefault(parts[0], {}), dict):
        raise ConfigError(f"environment {name}: want MILLRACE__SECTION__KEY, for example MILLRACE__REDIS__URL")
    tree[parts[0]][parts[1]] = text if _is_text(*parts) else _value(text)


def _is_text(section: str, key: str) -> bool:
    """Whether the field is a string, whatever its text looks like: an ordinal, a password of digits."""
    sections = {each.name: each.type for each in msgspec.structs.fields(Config)}
    fields = msgspec.structs.fields(sections[section]) if section in sections else ()
    return any(each.name == key and each.type in (str, str | None) for each in fields)


def _value(text: str) -> Any:
    """Parse the text as a TOML value (number, boolean, list, table) or a JSON object, else return the text itself."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        pass
    try:
        return json.loads(text) if text.lstrip().startswith("{") else text
    except json.JSONDecodeError:
        return text


def _convert(tree: dict[str, Any], source: str) -> Config:
    try:
        return msgspec.convert(tree, Config)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{source}: {error}; `millrace config show` lists every key") from error


def _printed(key: str, value: Any) -> str:
    value = masked(key, value)
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False)  # booleans, numbers and lists as TOML writes them; a table as JSON
