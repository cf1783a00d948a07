from __future__ import annotations

import re

import pytest
from typer.testing import CliRunner

from pdlaunch.cli.app import build_app
from pdlaunch.cli.flags import INSTEAD
from pdlaunch.config.models import ROUTER
from pdlaunch.config.settings import all_flags, all_settings
from tests.command_line import invoke

OWN = {f"--{flag.name}" for flag in all_flags().values() if flag.panel != ROUTER}


def run(*arguments: str, columns: int = 200) -> tuple[int, str]:
    result = invoke(arguments, env={"COLUMNS": str(columns), "NO_COLOR": "1", "TERM": "dumb"})
    assert "Traceback" not in result.output
    return result.exit_code, " ".join(re.sub("[│╭╮╰╯─]", " ", result.stderr).split())


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("--kv-cache-memory-bytes", "use --kv-cache-memory"),
        ("-tp", "use --tensor-parallel-size"),
        ("--data-parallel-size", "--prefill N and --decode N"),
        ("--quantization=fp8", "No such option: --quantization; weights are served unquantized"),
        ("--max_model_len", "did you mean --max-model-len?"),
        ("--num-threads", "set num_threads in the file, or the variable PDLAUNCH_NUM_THREADS"),
        ("--max-num-seq", "--max-num-seqs"),
    ],
)
@pytest.mark.parametrize(
    "command", [("serve",), ("check-config",), ("smoke",), ("config", "show"), ("bench", "serve")]
)
def test_a_flag_of_vllm_is_answered_with_the_way_to_the_same_end(
    command: tuple[str, ...], flag: str, expected: str
) -> None:
    code, text = run(*command, flag, "2")
    assert code == 2
    assert expected in text


def test_advice_is_readable_on_a_narrow_terminal() -> None:
    code, text = run("serve", "--kv-transfer-config", "{}", columns=60)
    assert code == 2
    assert "--kv-connector chooses the connector" in text


@pytest.mark.parametrize("columns", [40, 60, 80, 95, 96, 120])
def test_help_has_every_flag_whole_at_any_width(columns: int) -> None:
    result = CliRunner().invoke(
        build_app(["serve", "--help"]),
        ["serve", "--help"],
        env={"COLUMNS": str(columns), "NO_COLOR": "1", "TERM": "dumb"},
    )
    words = set(re.findall(r"--[a-z-]+", result.stdout))
    assert OWN | {"--dry-run", "--stop-on-stdin-eof"} <= words
    assert "Engines" in result.stdout
    assert "Deployment" in result.stdout


def test_an_option_that_nobody_knows_is_only_that() -> None:
    code, text = run("serve", "--frobnicate")
    assert code == 2
    assert "No such option: --frobnicate" in text
    assert "vLLM" not in text


def test_the_table_names_no_flag_that_exists_here_and_advises_none_that_does_not() -> None:
    assert not set(INSTEAD) & OWN
    for text in INSTEAD.values():
        assert set(re.findall(r"--[a-z-]+", text)) <= OWN
        assert set(re.findall(r"set ([a-z_.]+) in the file", text)) <= set(all_settings())
