"""The layout holds: imports go one way, files stay readable, public names are pinned."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import dualblade

SOURCE = Path(dualblade.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
LINES_MAX = 500
FUNCTION_LINES_MAX = 70

# Who may import whom. A tensor's way from top to bottom; residency and store never meet.
BASE = {"units", "errors", "config", "geometry", "metrics"}
MAY_IMPORT: dict[str, set[str]] = {
    "units": {"errors"},
    "errors": set(),
    "config": {"units", "errors"},
    "geometry": {"units"},
    "metrics": {"units"},
    "io": BASE,
    "host": BASE,
    "residency": BASE,
    "attention": BASE,
    "store": BASE | {"io", "host"},
    "pipeline": BASE | {"io", "store", "residency", "host", "attention"},
    "hf": BASE | {"io", "store", "residency", "host", "attention", "pipeline"},
    # testing: doubles of the drive and of the copy stage.
    "testing": BASE | {"io", "pipeline"},
    # bench times parts of the way, too: attention and the copies.
    "bench": BASE | {"io", "host", "store", "attention", "pipeline", "hf", "__init__"},
    "cli": BASE | {"io", "host", "store", "residency", "hf", "bench", "__init__"},
    "__init__": BASE | {"hf", "host"},
    "__main__": {"cli"},
}
# bench: its yardstick is transformers' own cache.
ONLY_IMPORTER = {"transformers": {"hf", "bench"}, "typer": {"cli"}, "rich": {"cli"}}
TORCH_FREE = (
    "units",
    "errors",
    "config",
    "geometry",
    "metrics",
    "io",
    "host",
    "residency",
    "store",
)


def room_of(path: Path) -> str:
    relative = path.relative_to(SOURCE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_go_one_way(path: Path) -> None:
    room = room_of(path)
    for module in imports_of(path):
        top, *rest = module.split(".")
        if top == "dualblade":
            target = rest[0] if rest and rest[0] not in dualblade.__all__ else "__init__"
            allowed = MAY_IMPORT[room] | {room}
            assert target in allowed, f"{room} may not import {module}"
        for library, rooms in ONLY_IMPORTER.items():
            assert top != library or room in rooms, f"{room} may not import {library}"
        assert top != "torch" or room not in TORCH_FREE, f"{room} is to stay free of torch"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_files_and_functions_stay_readable(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) <= LINES_MAX
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= FUNCTION_LINES_MAX, f"{node.name}: {length} lines"


def test_public_names_are_pinned() -> None:
    assert dualblade.__all__ == [
        "BudgetError",
        "CacheStats",
        "Closed",
        "ConfigError",
        "CorruptExtent",
        "DeviceError",
        "DualBladeCache",
        "DualBladeError",
        "EngineConfig",
        "NoSpace",
        "NotAStore",
        "StorageError",
        "Unsupported",
        "__version__",
        "use_long_rope",
        "wait_briefly",
        "widen_linears",
    ]
    assert set(dualblade.__all__) <= set(dir(dualblade))
    for name in dualblade.__all__:
        assert hasattr(dualblade, name)


def test_no_file_is_dead() -> None:
    """Every module is imported by another, or is an entry point."""
    entries = {"dualblade.__main__", "dualblade.cli.app", "dualblade.bench.child"}
    imported = {module for path in FILES for module in imports_of(path)}
    for path in FILES:
        parts = path.relative_to(SOURCE).with_suffix("").parts
        name = ".".join(("dualblade", *parts))
        if path.name == "__init__.py" or parts[0] == "testing" or name in entries:
            continue
        assert name in imported, f"{name} is imported by nobody"


def test_native_core_stays_small() -> None:
    root = SOURCE.parents[1] / "native"
    if not root.is_dir():
        pytest.skip("installed without the sources")
    sources = [
        p for p in root.rglob("*") if p.suffix in (".cpp", ".hpp") and "tests" not in p.parts
    ]
    # 1,500 for the two engines; 300 for NVMe passthrough: the encoder, its registration, and what
    # the ring needs to carry commands; 250 for a queue per door, polling and commands by ioctl;
    # 1,000 for attention, written once for all vector lengths; 400 for its products of bfloat16
    # on matrix units, without which they bound grouped heads, and for sums that stay in their
    # registers; 30 for rows on cache lines of their own and threads that keep to their part; 20
    # for writes that leave folios of 2 MiB, which reading in place is for; 15 for threads that are
    # not to be had, and for closing beside a registration; 15 for kernels that take no command
    # from registered memory, and for a pool whose own part fails; 10 for writes that find no memory
    # at once, and for the direct door's own busy time; 60 for a failed writeback that is told to
    # all whom it may be of, and for workers that the kernel cannot make.
    assert sum(len(p.read_text().splitlines()) for p in sources) <= 3610
