"""The commands in the table, their help, and flags that are not there."""

import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from pdlaunch import __version__
from pdlaunch.cli.app import Command, build_app
from pdlaunch.config.models import ROUTER
from pdlaunch.config.settings import all_flags
from tests.command_line import invoke

OWN = {f"--{flag.name}" for flag in all_flags().values() if flag.panel != ROUTER}


def test_help_lists_every_command_and_imports_none() -> None:
    ghosts = (
        Command("ghost", "no_such_module:ghost", "Is not there."),
        Command("group", "no_such:app", "A group."),
    )
    result = CliRunner().invoke(build_app(["--help"], ghosts), ["--help"])
    assert result.exit_code == 0
    assert "Is not there." in result.stdout
    assert "A group." in result.stdout


def test_version() -> None:
    result = CliRunner().invoke(build_app(["--version"]), ["--version"])
    assert result.stdout == f"pdlaunch {__version__}\n"


@pytest.mark.parametrize("module", ["typer", "pdlaunch.machine.probe"])
@pytest.mark.processes
def test_interrupted_while_it_imports_or_works_it_ends_with_130_and_no_traceback(
    module: str,
) -> None:
    code = f"""
import os, signal, sys

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Interrupt())
sys.argv = ["pdlaunch", "check-config", "--model", "nowhere"]
from pdlaunch.cli import main
main()
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "")


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("--max_model_len", "No such option: --max_model_len; did you mean --max-model-len?"),
        ("--num-threads", "set num_threads in the file, or the variable PDLAUNCH_NUM_THREADS"),
        ("--max-num-seq", "--max-num-seqs"),
        ("--frobnicate", "No such option: --frobnicate"),
        ("--tool-call-parser", "write flags of vLLM into engine_args of the file"),
        ("--enable-log-requests", "router.log has a line for each request"),
        ("--kv-cache-memory-bytes", "a flag of vLLM: set kv_cache_memory"),
    ],
)
@pytest.mark.parametrize("command", [("serve",), ("bench", "serve")])
def test_an_unknown_flag_is_answered_with_the_way_to_the_same_end(
    command: tuple[str, ...], flag: str, expected: str
) -> None:
    result = invoke([*command, flag, "2"], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})
    assert result.exit_code == 2
    assert expected in " ".join(re.sub("[│╭╮╰╯─]", " ", result.stderr).split())


@pytest.mark.parametrize("columns", [40, 60, 80, 95, 96, 120])
def test_help_has_every_flag_whole_at_any_width(columns: int) -> None:
    environ = {"COLUMNS": str(columns), "NO_COLOR": "1", "TERM": "dumb"}
    result = invoke(["serve", "--help-all"], env=environ)
    words = set(re.findall(r"--[a-z-]+", result.stdout))
    assert OWN | {"--dry-run", "--stop-on-stdin-eof"} <= words
    assert "Engines" in result.stdout
    assert "Deployment" in result.stdout


def test_the_help_of_serve_is_short_and_has_examples() -> None:
    told = invoke(["serve", "--help"], env={"COLUMNS": "80"}).stdout
    assert len(told.splitlines()) < 70
    assert len(set(re.findall(r"--[a-z-]+", told)) & OWN) == 13
    assert f"--help-all shows {len(OWN) - 13} more flags" in told
    assert "\n  pdlaunch serve deployment.yaml --dry-run\n" in told
