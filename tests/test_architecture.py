"""Import order, file list and class names are as docs/architecture.md states them."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
PACKAGES = ("worker", "export", "pipeline", "kernels")  # each imports only itself and those after it
INIT_FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("__init__.py"))
# They import the sub-command that the command line names, and the user's own classes.
IMPORTERS_BY_NAME = ("worker.commands.dispatch", "pipeline.strategies.own_strategies")
# Libraries that a folder must not know, lazily either; the package table and the docstrings of folders say so.
FORBIDDEN = {
    "kernels": ("aiokafka", "asyncio", "redis"),
    "pipeline": ("aiokafka", "asyncio", "redis"),
    "export": ("aiokafka", "redis"),
    "worker.stream": ("aiokafka", "redis", "torch"),
    "pipeline.data": ("torch",),
    "pipeline.features": ("torch",),
}
MAY_IMPORT = re.compile(r"May import: ([^.]*)\.")

# Rank in its package by "package/folder" or "package/file"; units of equal rank must not import each other.
Order = dict[str, int]


def read_order(page: str) -> Order:
    """Return the ranks of the `import-order` block: one line per package, `a b < c` puts a and b before c."""
    (block,) = re.findall(r"```import-order\n(.*?)```", page, re.DOTALL)
    order: Order = {}
    package = ""
    for line in block.splitlines():
        named = re.match(r"(\w+):", line)
        rank = 0 if named else max(order[node] for node in order if node.startswith(f"{package}/"))
        package = named[1] if named else package
        for group in line.removeprefix(f"{package}:").split("<"):
            order |= {f"{package}/{name}": rank for name in group.split()}
            rank += 1
    return order


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Return every module of the four packages by its dotted name."""
    paths = (path for package in PACKAGES for path in sorted((root / package).rglob("*.py")))
    return {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def imports(module: str, tree: ast.AST, known: dict[str, Path]) -> Iterator[str]:
    """Yield the project modules that a module imports anywhere: at the top, lazily, or for types alone."""
    for node in ast.walk(tree):
        by_name = {"import_module", "__import__"} & {getattr(node, field, None) for field in ("id", "attr", "name")}
        assert not by_name or module in IMPORTERS_BY_NAME, f"{module}: an import by name hides its target"
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import hides its target"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in known else node.module or "" for name in names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def node_of(module: str) -> str:
    """Return the unit that the order ranks: a package's folder or its loose file."""
    return "/".join(module.split(".")[:2])


@cache
def arrows(root: Path = ROOT) -> dict[tuple[str, str], list[str]]:
    """Return (importer, imported) between units of the order, with the modules that need it."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    known = modules(root)
    for module, path in known.items():
        for name in imports(module, ast.parse(path.read_text()), known):
            package = name.split(".")[0]
            assert name not in set(PACKAGES) - {module.split(".")[0]}, f"{module}: imports all of {name}"
            if package in PACKAGES and "." in name and node_of(name) != node_of(module):
                found[node_of(module), node_of(name)].append(f"{module} imports {name}")
    return found


def violations(found: dict[tuple[str, str], list[str]], order: Order) -> list[str]:
    """Return the imports against the order."""
    wrong: list[str] = []
    for (importer, imported), where in found.items():
        package, other = importer.split("/")[0], imported.split("/")[0]
        within_order = package == other and order[imported] < order[importer]
        allowed = within_order or PACKAGES.index(other) > PACKAGES.index(package)
        wrong += [] if allowed else where
    return wrong


def cycle(found: dict[tuple[str, str], list[str]]) -> list[str]:
    """Return the units of some import cycle; none when there is no cycle."""
    after: dict[str, set[str]] = defaultdict(set)
    for importer, imported in found:
        after[importer].add(imported)
    left = set(after) | {unit for units in after.values() for unit in units}
    while free := {unit for unit in left if not after[unit] & left}:
        left -= free
    return sorted(left)


@pytest.fixture(scope="module")
def order() -> Order:
    return read_order(PAGE.read_text())


def test_every_folder_and_loose_file_has_a_rank(order: Order) -> None:
    units = {node_of(module) for module in modules() if "." in module}
    assert units == set(order)


def test_imports_follow_the_documented_order(order: Order) -> None:
    assert violations(arrows(), order) == []


def test_folders_have_no_import_cycle() -> None:
    assert cycle(arrows()) == []


def test_reversed_arrow_is_reported(order: Order) -> None:
    """Reverse every arrow in turn: the check can fail."""
    for importer, imported in arrows():
        reversed_arrow = {(imported, importer): [f"{imported} imports {importer}"]}
        assert violations(reversed_arrow, order), f"{imported} -> {importer}"


def test_cycle_is_reported() -> None:
    assert cycle({("a", "b"): [], ("b", "c"): [], ("c", "a"): [], ("d", "a"): []}) == ["a", "b", "c", "d"]


def test_lazy_and_type_only_imports_count() -> None:
    code = "if TYPE_CHECKING:\n    from pipeline.records import Event\ndef f():\n    import worker.cli\n"
    known = {"pipeline.records": ROOT, "worker.cli": ROOT}
    assert set(imports("m", ast.parse(code), known)) == {"pipeline.records", "worker.cli"}


def test_import_by_name_is_reported() -> None:
    for code in ("import importlib\nimportlib.import_module('worker.cli')", "from importlib import import_module"):
        with pytest.raises(AssertionError, match="hides its target"):
            list(imports("pipeline.records", ast.parse(code), {}))


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_folder_does_not_know_other_layers_libraries(folder: str) -> None:
    known = modules()
    found = {
        f"{module} imports {name}"
        for module, path in known.items()
        if f"{module}.".startswith(f"{folder}.")
        for name in imports(module, ast.parse(path.read_text()), known)
        if name.split(".")[0] in FORBIDDEN[folder]
    }
    assert not found


def test_model_is_imported_by_commands_alone() -> None:
    users = {importer for importer, imported in arrows() if imported == "pipeline/model" and "worker/" in importer}
    assert users == {"worker/commands"}


@pytest.mark.parametrize("init", INIT_FILES, ids=str)
def test_each_folder_says_what_it_holds_and_imports_only_what_it_declares(init: Path) -> None:
    docstring = ast.get_docstring(ast.parse(init.read_text())) or ""
    assert docstring, "an __init__.py says in two lines what lives in its folder and what it may import"
    declared = MAY_IMPORT.search(docstring)
    assert declared, f"{init}: no line 'May import: …'"
    names = set(declared[1].replace(",", " ").split()) - {"nothing", "of", "ours"}
    folder = ".".join(init.parent.relative_to(ROOT).parts)
    if "." not in folder:
        assert names <= set(PACKAGES)
        return
    package = folder.split(".")[0]
    units = [
        imported.split("/")
        for (_, imported), where in arrows().items()
        if any(f"{each.split()[0]}.".startswith(f"{folder}.") for each in where)
    ]
    got = {unit if imported_package == package else imported_package for imported_package, unit in units}
    assert got <= names, f"{folder} imports {sorted(got - names)} beyond what it declares"
    assert names <= got, f"{folder} declares {sorted(names - got)} and imports none of it"


def test_every_file_is_listed_under_its_folder() -> None:
    listed: set[str] = set()
    folder = ""
    for line in PAGE.read_text().splitlines():
        if heading := re.match(r"#+ `([\w/]+)/`", line):
            folder = heading[1]
        elif row := re.match(r"\| `([\w.]+)` \|", line):
            listed.add(f"{folder}/{row[1]}")
    present = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.name not in ("__init__.py", "py.typed") and "__pycache__" not in path.parts
    }
    assert listed == present


def test_no_class_name_is_defined_twice() -> None:
    definitions: dict[str, list[str]] = defaultdict(list)
    for module, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                definitions[node.name].append(module)
    assert {name: where for name, where in definitions.items() if len(where) > 1} == {}
