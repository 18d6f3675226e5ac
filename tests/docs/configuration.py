"""The tables of docs/configuration.md, made from the structs of worker/config.py and their comments.

usage: python -m tests.docs.configuration      rewrites the tables; the text around them stays
"""

import ast
import inspect
import io
import json
import re
import textwrap
import tokenize
from pathlib import Path

import msgspec

from worker.config import Config

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"
HEAD = "| key | default | meaning, or reason for the default |\n|---|---|---|\n"


def reasons(struct: type) -> dict[str, str]:
    """Return each field's comment: at the end of its lines, or on the lines directly above it; '' without one."""
    source = textwrap.dedent(inspect.getsource(struct))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    [definition] = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    found: dict[str, str] = {}
    last_line = definition.lineno
    for statement in definition.body:
        end_line = statement.end_lineno or statement.lineno
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            lines = range(last_line + 1, end_line + 1)
            found[statement.target.id] = " ".join(comments[line] for line in lines if line in comments)
        last_line = end_line
    return found


def toml_literal(value: object) -> str:
    """Return the value as TOML writes it: numbers, booleans and lists as JSON does, strings in double quotes."""
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def default_of(key: msgspec.structs.FieldInfo) -> object:
    """Return the key's default value."""
    return key.default if key.default_factory is msgspec.NODEFAULT else key.default_factory()


def table(section: str, struct: type) -> str:
    """Return a section's table; a key without a default value reads 'unset'."""
    comments = reasons(struct)
    rows = HEAD
    for key in msgspec.structs.fields(struct):
        default = "unset" if default_of(key) is None else f"`{toml_literal(default_of(key))}`"
        rows += f"| `{section}.{key.name}` | {default} | {comments[key.name]} |\n"
    return rows


def rewritten(page: str) -> str:
    """Return the page with new tables below its `## section` headings. KeyError for a section without a heading."""
    for section in msgspec.structs.fields(Config):
        below = re.compile(rf"(?m)(^## {section.name}\n(?:[^|#\n].*\n|\n)*)(?:\|.*\n)*")
        page, count = below.subn(lambda match, each=section: match[1] + table(each.name, each.type), page)
        if count != 1:
            raise KeyError(f"docs/configuration.md has {count} headings '## {section.name}', want 1")
    return page


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text()))
