"""What pdlaunch knows of vLLM's flags, beside the parser of the installed vLLM."""

import os
import re
import subprocess
from collections.abc import Mapping

import pytest

from pdlaunch.config.vllm_arguments import ALIASES, KV_EVENTS, OURS, REFUSED, long_name
from pdlaunch.machine.host import find_engine_command


@pytest.fixture(scope="module")
def names(vllm_command: str) -> frozenset[str]:
    """All names of flags, which stand before two spaces, behind which a description begins."""
    command = [vllm_command, "serve", "--help=all"]
    lines = subprocess.check_output(command, text=True, timeout=180).splitlines()
    heads = [line[2:].partition("  ")[0] for line in lines if line.startswith("  -")]
    return frozenset(re.findall(r"(?<![\w-])--?[A-Za-z][\w.-]*", " ".join(heads)))


def test_the_version_is_known_without_running_it(vllm_command: str) -> None:
    found = find_engine_command(vllm_command, os.environ)
    assert not found.problem
    assert found.version is not None


@pytest.mark.parametrize("table", [OURS, REFUSED])
def test_every_flag_of_the_tables_exists(names: frozenset[str], table: Mapping[str, str]) -> None:
    assert not [name for name in table if f"--{name}" not in names]


def test_no_other_flag_is_taken_for_one_of_them(names: frozenset[str]) -> None:
    known = [name[2:] for name in names if name.startswith("--") and not name.startswith("--no-")]
    assert len(known) > 200
    assert KV_EVENTS in known
    assert not [name for name in known if long_name(name) != name]


def test_every_short_name_is_known(names: frozenset[str]) -> None:
    assert {name[1:] for name in names if not name.startswith("--")} - {"h"} == set(ALIASES)
