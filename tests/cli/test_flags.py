from __future__ import annotations

import re

import pytest

from pdlaunch.config.models import ROUTER
from pdlaunch.config.settings import all_flags
from tests.command_line import invoke

OWN = {f"--{flag.name}" for flag in all_flags().values() if flag.panel != ROUTER}


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("--max_model_len", "No such option: --max_model_len; did you mean --max-model-len?"),
        ("--num-threads", "set num_threads in the file, or the variable PDLAUNCH_NUM_THREADS"),
        ("--max-num-seq", "--max-num-seqs"),
        ("--frobnicate", "No such option: --frobnicate"),
    ],
)
@pytest.mark.parametrize("command", [("serve",), ("config", "show"), ("bench", "serve")])
def test_an_unknown_flag_is_answered_with_the_way_to_the_same_end(
    command: tuple[str, ...], flag: str, expected: str
) -> None:
    result = invoke([*command, flag, "2"], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})
    assert result.exit_code == 2
    assert expected in " ".join(re.sub("[│╭╮╰╯─]", " ", result.stderr).split())


@pytest.mark.parametrize("columns", [40, 60, 80, 95, 96, 120])
def test_help_has_every_flag_whole_at_any_width(columns: int) -> None:
    environ = {"COLUMNS": str(columns), "NO_COLOR": "1", "TERM": "dumb"}
    result = invoke(["serve", "--help"], env=environ)
    words = set(re.findall(r"--[a-z-]+", result.stdout))
    assert OWN | {"--dry-run", "--stop-on-stdin-eof"} <= words
    assert "Engines" in result.stdout
    assert "Deployment" in result.stdout
