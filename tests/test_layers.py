"""Holds the table of docs/architecture.md: which room may import which, and that light processes
stay light.
"""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pdlaunch"
HEAVY = ("torch", "transformers")
ENTRY_FILES = {"__init__", "__main__"}
"""Of the package itself; they belong to no room."""

Table = dict[str, tuple[str, ...]]


def read_table() -> Table:
    """Room -> what it may import, in the order of docs/architecture.md."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    table: Table = {}
    for room, allowed in re.findall(
        r"^\| `(\w+)(?:/|\.py)` \| [^|]* \| ([^|]*) \|$", text, re.MULTILINE
    ):
        words = tuple(word.strip() for word in allowed.split(","))
        above = "all above but "
        table[room] = (
            (*(set(table) - {words[0].removeprefix(above)}), *HEAVY)
            if words[0].startswith(above)
            else words
        )
    return table


TABLE = read_table()


def sources() -> list[Path]:
    return sorted(
        path
        for path in PACKAGE.rglob("*.py")
        if not (path.parent == PACKAGE and path.stem in ENTRY_FILES)
    )


def room_of(source: Path) -> str:
    return source.relative_to(PACKAGE).parts[0].removesuffix(".py")


@functools.cache
def tree_of(source: Path) -> ast.Module:
    """All tests here read the same files."""
    return ast.parse(source.read_text())


def imports_of(source: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute name of every import, wherever it stands."""
    for node in ast.walk(tree_of(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}:{node.lineno}: relative import"
            names = (
                [f"{node.module}.{alias.name}" for alias in node.names]
                if node.module == "pdlaunch"
                else [str(node.module)]
            )
            yield from ((node.lineno, name) for name in names)


def forbidden(source: Path, name: str) -> bool:
    room, allowed = room_of(source), TABLE[room_of(source)]
    first, *rest = name.split(".")
    if first == "pdlaunch":
        target = rest[0] if rest else ""
        return target in TABLE and target != room and target not in allowed
    return first in HEAVY and "torch" not in allowed


def test_the_table_is_read() -> None:
    assert TABLE["errors"] == ("stdlib",)
    assert "checks" not in TABLE["engine"]
    assert {"kvcache", "transfer", "torch"} <= set(TABLE["engine"])
    assert "torch" not in TABLE["router"]


def test_every_room_is_in_the_table() -> None:
    assert {room_of(source) for source in sources()} <= set(TABLE)


def test_rooms_import_only_what_the_table_allows() -> None:
    found = [
        f"{source.relative_to(ROOT)}:{line}: {name}"
        for source in sources()
        for line, name in imports_of(source)
        if room_of(source) in TABLE and forbidden(source, name)
    ]
    assert not found


def test_rooms_import_all_that_the_table_allows() -> None:
    """All but ``engine/``, which may import whatever stands above it, and errors."""
    used = {room: {"errors"} for room in TABLE}
    for source in sources():
        for _, name in imports_of(source):
            first, *rest = name.split(".")
            used[room_of(source)].add("torch" if first in HEAVY else rest[0] if rest else first)
    known = {*TABLE, "torch"}
    unused = {
        room: spare
        for room, allowed in TABLE.items()
        if room != "engine" and (spare := known.intersection(allowed) - used[room])
    }
    assert not unused


def test_nothing_that_came_over_a_socket_is_unpickled() -> None:
    """Benchmarks talk through pipes to processes that they have started themselves."""
    files = [source for source in sources() if room_of(source) != "bench"]
    imported = {name.partition(".")[0] for source in files for _, name in imports_of(source)}
    called = {
        node.attr
        for source in files
        for node in ast.walk(tree_of(source))
        if isinstance(node, ast.Attribute)
    }
    assert not imported & {"pickle", "marshal", "shelve", "multiprocessing"}
    assert not called & {
        "recv_pyobj",
        "broadcast_object_list",
        "all_gather_object",
        "gather_object",
        "recv_object_list",
    }


def test_the_table_has_no_cycles() -> None:
    done: list[str] = []
    for room in TABLE:
        later = [name for name in TABLE[room] if name in TABLE and name not in done]
        assert not later, f"{room} may import {later}, which stand below it"
        done.append(room)


@pytest.mark.parametrize(
    "statement",
    [
        "import pdlaunch.cli.serve",
        "import pdlaunch.cli.check_config",
        "import pdlaunch.supervisor.launch",
        "import pdlaunch.router.__main__",
        "import pdlaunch.server.__main__",
        "import sys; sys.argv = ['pdlaunch', '--help']; from pdlaunch.cli import main; main()",
        (
            "import sys; sys.argv = ['pdlaunch', 'serve', '--dry-run', '--format', 'json']; from "
            "pdlaunch.cli import main; main()"
        ),
    ],
)
@pytest.mark.processes
def test_light_processes_import_neither_torch_nor_transformers(statement: str) -> None:
    report = (
        "import atexit, sys; atexit.register(lambda: print('LOADED', *sys.modules, "
        "file=sys.stderr)); "
    )
    result = subprocess.run(
        [sys.executable, "-c", report + statement],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    loaded = next(line for line in result.stderr.splitlines() if line.startswith("LOADED")).split()
    assert not set(HEAVY) & set(loaded)
