"""The floors of the house: imports point down, and each outside package has its rooms."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "ahi_ml"

# Rooms by floor, and the packages each room may import besides the standard library and numpy.
FLOORS: list[dict[str, set[str]]] = [
    {"errors": set(), "types": set(), "_version": set()},
    {
        "config": {"platformdirs"},
        "remote": {"fsspec"},
        "perprocess": set(),
        "geometry": set(),
        "pixels": set(),
        "codec": {"imagecodecs", "openjpeg"},
        "privacy": set(),
    },
    {
        "metadata": set(),
        "index": {"pyarrow", "pandas"},
        "cache": {"fsspec"},
        "client": {"boto3", "botocore", "pycurl"},
    },
    {"search": {"pandas", "tqdm"}, "imports": {"pandas", "tqdm"}, "reader": {"tqdm"}},
    {"store": set()},
    {"volume": {"xarray"}, "filesystem": {"fsspec"}},
    {"datasets": {"torch"}, "features": {"joblib", "pandas", "tqdm"}},
    {
        "display": {"matplotlib", "xarray"},
        "cli": {"typer", "tqdm", "pandas", "torch", "pydicom", "highdicom", "nibabel", "scipy"},
    },
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
ALLOWED = {room: packages for rooms in FLOORS for room, packages in rooms.items()}

# The embedded store stands beside: it uses floors 0 and 1 and its own packages.
LOCAL_PACKAGES = {"pydicom", "botocore", "uvicorn", "filelock"}
LOCAL_ORDER = ["protocol", "injector", "catalog", "blobs", "ingest", "operations", "server", "serve"]
MAY_USE_LOCAL = {("store", "lazily"), ("cli", "lazily")}


def _modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem != "__init__")


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def _imports(path: Path) -> Iterator[tuple[str, bool, int]]:
    """Name of each imported module, whether at import time, and the line."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside: set[int] = set()
    for node in ast.walk(tree):
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        lazy |= isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if lazy:
            inside |= {id(child) for child in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) not in inside, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            for name in {_module_of(node.module or "", alias.name) for alias in node.names}:
                yield name, id(node) not in inside, node.lineno


def _module_of(module: str, name: str) -> str:
    """Which module ``from module import name`` is about: that of the name, if it is one of ours."""
    place = PACKAGE.parent.joinpath(*module.split("."), name)
    ours = module == "ahi_ml" or place.with_suffix(".py").exists() or (place / "__init__.py").exists()
    return f"{module}.{name}" if ours else module


@pytest.mark.parametrize("path", _modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    room = _room(path)
    wrong = []
    for name, eager, line in _imports(path):
        top, *rest = name.split(".")
        if top == "ahi_ml":
            other = rest[0] if rest else "__init__"
            if other == room:
                continue
            if room == "local":
                allowed = FLOOR_OF.get(other, 99) <= 1
            elif other == "local":
                allowed = (room, "lazily") in MAY_USE_LOCAL and not eager
            else:
                allowed = FLOOR_OF.get(other, 99) < FLOOR_OF[room] or _beside(room, other)
        elif top in sys.stdlib_module_names or top == "numpy":
            allowed = True
        else:
            allowed = top in (LOCAL_PACKAGES if room == "local" else ALLOWED[room])
        if not allowed:
            wrong.append(f"{path.name}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def _beside(room: str, other: str) -> bool:
    """Rooms of one floor may use each other in one direction only: to the left in the table."""
    if FLOOR_OF.get(other) != FLOOR_OF[room]:
        return False
    rooms = list(FLOORS[FLOOR_OF[room]])
    return rooms.index(other) < rooms.index(room)


@pytest.mark.parametrize("path", [p for p in _modules() if _room(p) == "local"], ids=lambda path: path.name)
def test_the_embedded_store_is_built_in_order(path: Path) -> None:
    inner = path.relative_to(PACKAGE / "local").with_suffix("").parts[0]
    if inner not in LOCAL_ORDER:
        return
    for name, eager, line in _imports(path):
        parts = name.split(".")
        if eager and parts[:2] == ["ahi_ml", "local"] and len(parts) > 2 and parts[2] in LOCAL_ORDER:
            assert LOCAL_ORDER.index(parts[2]) <= LOCAL_ORDER.index(inner), f"{path.name}:{line} imports {name}"


def test_every_room_stands_in_the_table() -> None:
    assert {_room(path) for path in _modules()} - {"local"} == set(FLOOR_OF)


def test_modules_stay_small() -> None:
    # Half of a module of numerics is documentation; 450 lines is where a second idea usually hides.
    large = {str(p.relative_to(PACKAGE)): n for p in _modules() if (n := len(p.read_text().splitlines())) > 450}
    assert not large, large


def test_no_import_cycles() -> None:
    def module_name(path: Path) -> str:
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    names = {module_name(path): path for path in _modules()}
    graph = {
        name: {other for other, eager, _ in _imports(path) if eager and other in names} for name, path in names.items()
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail, name])
        if name not in done:
            for other in sorted(graph[name]):
                if other != name:
                    visit(other, (*trail, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())
