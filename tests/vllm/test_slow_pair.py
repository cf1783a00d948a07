"""A pair of real engines whose READs are told to take a second longer than they do."""

import re
from pathlib import Path

import pytest

from pdlaunch.errors import StartupError
from pdlaunch.launch.client.api import Api
from tests.command_line import invoke
from tests.vllm.conftest import running_engines

pytestmark = pytest.mark.vllm_long

HOOK = """
import importlib.machinery as machinery
load = machinery.SourceFileLoader.exec_module
def exec_module(loader, module):
    load(loader, module)
    if module.__name__ == "pdlaunch.transfer.connectors.nixl":
        told = module._NixlRead.seconds
        module._NixlRead.seconds = lambda read: told(read) + 1
machinery.SourceFileLoader.exec_module = exec_module
"""


def test_a_slow_pair_of_vllm_is_told_and_refused_by_strict(
    vllm_command: str, tmp_path: Path
) -> None:
    """UCX can be slowed down by its variables, but not by the same amount at each load."""
    (tmp_path / "sitecustomize.py").write_text(HOOK)
    (tmp_path / "strict").mkdir()
    settings = {"env": {"PYTHONPATH": str(tmp_path)}}
    slow = r"PD504 nixl/UCX( \(\w+\))? moves 0\.0"
    with running_engines(tmp_path, vllm_command, settings) as pair:
        (told,) = Api(pair.url).get_object("/pdlaunch/status")[1]["pairs"]
        assert re.match(slow, told["slow"])
        assert f"warning: prefill-0 -> decode-0 is slow: {told['slow']}" in pair.output()
        assert told["slow"] in invoke(["status", "--url", pair.url]).stdout
        _, page = Api(pair.url).get("/metrics")
        (speed,) = re.findall(r"^pdlaunch_pair_bytes_per_second{.*} (.*)$", page, re.MULTILINE)
        assert 0 < float(speed) < 1e8
    with (
        pytest.raises(StartupError, match=rf"{slow}.*refused by --strict"),
        running_engines(tmp_path / "strict", vllm_command, settings, "--strict"),
    ):
        pass
