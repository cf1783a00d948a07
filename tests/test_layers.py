"""Imports go one way: a room imports only rooms that stand before it in ``ROOMS``.

Light processes (commands, router, engine servers, supervisor) never import torch.
"""

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pdlaunch"
HEAVY = ("torch", "transformers")
DOWNLOADERS = {"huggingface_hub.file_download", "tqdm"}
ENTRY_FILES = {"__init__", "__main__"}
"""Of the package itself; they belong to no room."""

ROOMS = (
    "errors",
    "observe",
    "engine/kvcache",
    "config",
    "machine",
    "engine/memory",
    "engine/models",
    "protocol",
    "transfer/regions",
    "transfer/integrity",
    "engine/offload",
    "planning",
    "protocol/process",
    "transfer",
    "vllm",
    "checks",
    "engine",
    "http",
    "launch/client",
    "launch/hosts",
    "launch/render",
    "engine/server",
    "launch/sidecar",
    "launch",
    "router",
    "api",
    "bench",
    "cli",
)
MAY_IMPORT_TORCH = {
    "transfer/regions",
    "transfer/integrity",
    "engine/memory",
    "engine/models",
    "engine/offload",
    "transfer",
    "vllm",
    "engine",
    "bench",
}


def sources() -> list[Path]:
    return sorted(
        path
        for path in PACKAGE.rglob("*.py")
        if not (path.parent == PACKAGE and path.stem in ENTRY_FILES)
    )


def room_of(parts: tuple[str, ...]) -> str:
    """Return the room of a path or module below the package: the longest one that is listed."""
    nested = "/".join(parts[:2])
    return nested if nested in ROOMS else parts[0]


def room_of_file(source: Path) -> str:
    return room_of(source.relative_to(PACKAGE).with_suffix("").parts)


@functools.cache
def tree_of(source: Path) -> ast.Module:
    return ast.parse(source.read_text())


def imports_of(source: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute name of every import, wherever it stands."""
    for node in ast.walk(tree_of(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}:{node.lineno}: relative import"
            yield from (
                (
                    node.lineno,
                    f"{node.module}.{alias.name}"
                    if "." not in str(node.module)
                    else str(node.module),
                )
                for alias in node.names
            )


def forbidden(source: Path, name: str) -> bool:
    room = room_of_file(source)
    first, *rest = name.split(".")
    if first == "pdlaunch":
        target = room_of(tuple(rest)) if rest else ""
        return target in ROOMS and ROOMS.index(target) > ROOMS.index(room)
    return first in HEAVY and room not in MAY_IMPORT_TORCH


def test_every_file_lies_in_a_room() -> None:
    assert {room_of_file(source) for source in sources()} == set(ROOMS)


def test_a_forbidden_import_is_found() -> None:
    assert forbidden(PACKAGE / "router" / "app.py", "torch")
    assert forbidden(PACKAGE / "engine" / "rank.py", "pdlaunch.engine.server.lifecycle")
    assert not forbidden(PACKAGE / "engine" / "server" / "app.py", "pdlaunch.http.app")


def test_imports_go_one_way() -> None:
    found = [
        f"{source.relative_to(ROOT)}:{line}: {name}"
        for source in sources()
        for line, name in imports_of(source)
        if forbidden(source, name)
    ]
    assert not found


def test_nothing_that_came_over_a_socket_is_unpickled() -> None:
    """Benchmarks talk through pipes to processes that they have started themselves."""
    files = [source for source in sources() if room_of_file(source) != "bench"]
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


COMMAND = "import sys; sys.argv = ['pdlaunch', {}]; from pdlaunch.cli import main; main()"


@pytest.mark.parametrize(
    ("statement", "others"),
    [
        ("import pdlaunch", {"pydantic", "msgspec", "typer"}),
        ("import pdlaunch; pdlaunch.Launch", {"typer"}),
        ("import pdlaunch.cli.serve, pdlaunch.launch.launch", DOWNLOADERS),
        ("import pdlaunch.cli.check_config", DOWNLOADERS),
        ("import pdlaunch.router.__main__", DOWNLOADERS),
        ("import pdlaunch.engine.server.__main__", set()),
        (COMMAND.format("'--help'"), DOWNLOADERS),
        (COMMAND.format("'serve', '--dry-run', '--format', 'json'"), DOWNLOADERS),
    ],
)
@pytest.mark.processes
def test_light_processes_import_no_heavy_library(statement: str, others: set[str]) -> None:
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
    assert not {*HEAVY, *others} & {*loaded}
