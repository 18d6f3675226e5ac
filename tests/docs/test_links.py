"""Files, modules, link targets and headings that the documents name exist."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOP = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "tests/README.md")
PAGES = [*(ROOT / name for name in TOP), *sorted((ROOT / "docs").rglob("*.md"))]
SOURCE_FOLDERS = ("worker", "export", "pipeline", "kernels", "tests", "deploy", "docs")
FENCE = re.compile(r"(?ms)^ *```.*?^ *```")
CODE = re.compile(r"(?ms)(?:(`+)(.+?)\1)|^ {4}(.*?)$")  # in backticks, or an indented line
LINK = re.compile(r"\]\(([^()\s]+)\)")
FILE = re.compile(r"[\w.-]+(?:/[\w.-]+)*\.(?:py|lua|sh)")
PATH = re.compile(rf"(?:{'|'.join(SOURCE_FOLDERS)})/[\w./-]*")
MODULE = re.compile(r"-m\s(tests(?:\.[a-z0-9_]+)+)(?![.\w])")


def files() -> list[Path]:
    """Return the files of the project's folders."""
    return [path for folder in SOURCE_FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]


NAMES = {path.name for path in files()}


def named_paths(text: str) -> Iterator[str]:
    """Yield the words of code, in backticks or indented, that are a file's name or a path of the project."""
    for code in CODE.finditer(FENCE.sub("", text)):
        for word in (code[2] or code[3] or "").split():
            word = word.partition("::")[0].rstrip(".,;:")
            if FILE.fullmatch(word) or PATH.fullmatch(word):
                yield word


def exists(name: str, page: Path) -> bool:
    """Return whether a named path exists below the root or next to the page, or a bare file name anywhere."""
    return name in NAMES or (ROOT / name).exists() or (page.parent / name).exists()


def module_exists(module: str) -> bool:
    path = ROOT.joinpath(*module.split("."))
    return path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()


def anchors(page: Path) -> set[str]:
    """Return the fragments of a page's headings, as GitHub makes them."""
    headings = re.findall(r"(?m)^#+ +(.*)$", FENCE.sub("", page.read_text()))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken(page: Path, text: str) -> list[str]:
    """Return the names in a page's text of things that do not exist."""
    wrong = [name for name in named_paths(text) if not exists(name, page)]
    wrong += [module for module in MODULE.findall(text) if not module_exists(module)]
    for link in LINK.findall(FENCE.sub("", text)):
        path, _, fragment = link.partition("#")
        target = page.parent / path if path else page
        if re.match(r"https?://", link):
            continue
        if not target.exists() or (fragment and fragment not in anchors(target)):
            wrong.append(link)
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_everything_that_a_page_names_exists(page: Path) -> None:
    assert broken(page, page.read_text()) == []


@pytest.mark.parametrize(
    "text",
    [
        "see `worker/stream/nosuch.py`",
        "see `nosuch.py` there",
        "see `tests/worker/test_loop.py::test_x`",
        "see `pipeline/serving/nosuch/`",
        "as in\n\n    .venv/bin/pytest tests/test_nosuch.py",
        "run `python -m tests.benchmarks.nosuch --quick`",
        "a [page](nosuch.md)",
        "a [heading](../README.md#no-such-heading)",
        "a [heading](#no-such-heading)",
    ],
)
def test_missing_target_is_reported(text: str) -> None:
    assert len(broken(ROOT / "docs" / "model.md", text)) == 1


@pytest.mark.parametrize(
    "text",
    [
        "see `worker/stream/loop.py` and `loop.py`, `.venv/bin/pytest tests/worker/stream/test_loop.py::test_x`",
        "a [page](architecture.md#import-order), a [heading](#heads), the [site](https://github.com/)",
        "`python -m tests.benchmarks`, `python -m tests.benchmarks.stream --events 10`",
        "files of the reader: `/models/current`, `millrace.toml`, `log.jsonl.gz`",
    ],
)
def test_present_targets_are_accepted(text: str) -> None:
    assert broken(ROOT / "docs" / "model.md", text) == []
