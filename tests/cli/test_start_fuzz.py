"""Whatever the flags of the commands that start something: a clear refusal, or they go on to what
would start it.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st

import pdlaunch.cli.bench as bench_module
import pdlaunch.cli.bench_serve as bench_serve_module
import pdlaunch.cli.machines as assume_module
import pdlaunch.cli.own_deployment as own_deployment_module
import pdlaunch.cli.serve as serve_module
import pdlaunch.cli.smoke as smoke_module
from pdlaunch.cli.app import build_app
from pdlaunch.errors import StartupError
from pdlaunch.launch.launch import LaunchOutcome
from pdlaunch.planning.resolve import ResolvedLaunch
from tests import command_line
from tests.checks.contexts import CPU
from tests.cli.test_serve import MODEL
from tests.config.model_files.files import EMPTY_SAFETENSORS

COMMANDS = (
    ("serve",),
    ("smoke",),
    ("bench", "serve"),
    ("bench", "step"),
    ("bench", "offload"),
    ("bench", "transfer"),
)
NUMBERS = ("0", "1", "2", "16", "-1", "0.5", "nan", "inf", "1e400", "1_0", "99999999999999999999")
LISTS = ("4GiB", "4GB", "4G", "4KiB,1MiB", "1,4,16", "1,", "1x1", "1x3,3x1", "nixl,file")
NAMES = (
    "nixl",
    "mooncake",
    "file",
    "tcp",
    "auto",
    "cpu",
    "cuda",
    "p2p",
    "float32",
    "bfloat16",
    "json",
    "table",
    "dummy",
    "debug",
)
PLACES = (
    "127.0.0.1",
    "::1",
    "localhost",
    "http://127.0.0.1:1",
    "ftp://a",
    "smollm2",
    "kv",
    "[red]",
)
LIKELY = (*NUMBERS, *LISTS, *NAMES, *PLACES)
# Without slashes: what is written lies in the folder of the test.
ANYTHING = st.text(st.characters(exclude_characters="\0/", codec="utf-8"), max_size=20)
VALUES = st.one_of(
    st.sampled_from(LIKELY), st.sampled_from(LIKELY), ANYTHING, st.integers().map(str)
)


class Started:
    """What stands for a launch: counts, and starts nothing."""

    def __init__(self) -> None:
        self.num = 0

    def launch(self, planned: ResolvedLaunch, *rest: object, **named: object) -> LaunchOutcome:
        self.num += 1
        return LaunchOutcome(None, (), was_ready=True, stop_signal=None)

    @contextmanager
    def deployment(
        self, arguments: Sequence[str], *, environ: Mapping[str, str], log_dir: str | None
    ) -> Iterator[Any]:
        """As ``running_deployment``: ``serve`` must understand what it would be given."""
        num = self.num
        settings = {name: value for name, value in environ.items() if name.startswith("PDLAUNCH_")}
        result = invoke(
            [
                "serve",
                *arguments,
                "--host",
                "127.0.0.1",
                "--port",
                "0",
                "--log-dir",
                log_dir or "logs",
            ],
            settings,
        )
        assert self.num == num + 1 or result.exit_code in (1, 2), result.stderr
        assert "No such option" not in result.stderr
        assert "unexpected extra argument" not in result.stderr
        self.num = num + 1
        raise StartupError(result.stderr)
        yield

    async def benchmark(self, *options: object) -> AsyncIterator[Any]:
        self.num += 1
        raise StartupError("it was not really measured")
        yield

    async def chats(self, *options: object) -> Any:
        self.num += 1
        raise StartupError("it was not really measured")

    def run_module(self, module: str, *arguments: str, **named: object) -> bytes:
        self.num += 1
        if module != "pdlaunch.engine.models.convert":
            kind, values = arguments
            assert kind in ("step", "offload", "transfer")
            json.loads(values)
        raise typer.Exit(1)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "tiny").mkdir()
    (folder / "tiny" / "config.json").write_text(json.dumps(MODEL))
    (folder / "tiny" / "model.safetensors").write_bytes(EMPTY_SAFETENSORS)
    (folder / "kv").mkdir()
    (folder / "deploy.yaml").write_text("block_size: 32\n")
    started = Started()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in [
            name for name in os.environ if name.startswith(("PDLAUNCH_", "PYTORCH_", "UCX_"))
        ]:
            patch.delenv(name)
        patch.setenv("PDLAUNCH_MODEL", str(folder / "tiny"))
        patch.setenv("PDLAUNCH_CACHE", str(folder / "cache"))
        for module in (assume_module, smoke_module):
            patch.setattr(module, "probe_machine", lambda: CPU)
        patch.setattr(serve_module, "launch", started.launch)
        patch.setattr(own_deployment_module, "running_deployment", started.deployment)
        patch.setattr(bench_serve_module, "bench_serve", started.benchmark)
        patch.setattr(bench_serve_module, "bench_multi_turn", started.chats)
        patch.setattr(bench_module, "run_module", started.run_module)
        yield started


def invoke(arguments: Sequence[str], environ: Mapping[str, str] | None = None) -> Any:
    result = command_line.invoke(arguments, env=environ)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result


def options_of(command: Sequence[str]) -> list[Any]:
    """Of the command as it is declared, so that a new flag is tried too."""
    found: Any = typer.main.get_command(build_app(command))
    for name in command:
        found = found.commands[name]
    return [parameter for parameter in found.params if parameter.param_type_name == "option"]


def command_lines(command: Sequence[str]) -> st.SearchStrategy[list[str]]:
    def with_value(option: Any) -> st.SearchStrategy[list[str]]:
        names = st.sampled_from([*option.opts, *option.secondary_opts])
        return st.tuples(names).map(list) if option.is_flag else st.tuples(names, VALUES).map(list)

    options = st.lists(st.sampled_from(options_of(command)).flatmap(with_value), max_size=4)
    files = st.one_of(
        st.just([]),
        st.just([]),
        st.lists(st.one_of(ANYTHING, st.sampled_from(["tiny", "deploy.yaml"])), max_size=1),
    )
    return st.tuples(options, files).map(
        lambda given: [*command, *(word for words in [*given[0], given[1]] for word in words)]
    )


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_any_flags(started: Started, command: tuple[str, ...]) -> None:
    @settings(max_examples=50, deadline=None)
    @given(arguments=command_lines(command))
    def check(arguments: list[str]) -> None:
        num = started.num
        result = invoke(arguments)
        assert "Traceback" not in result.output
        if started.num > num:
            assert result.exit_code in (0, 1)
        elif "--dry-run" in arguments and result.exit_code == 0:
            assert result.stdout
        else:
            assert result.exit_code in (1, 2)
            assert result.stderr.strip()

    check()


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_without_flags_all_of_them_start(started: Started, command: tuple[str, ...]) -> None:
    num = started.num
    invoke([*command, *(("--port", "0") if command == ("serve",) else ())])
    assert started.num == num + 1
