"""A verdict on real launches of a tiny model: Ctrl-C, resume, and the file of the winner."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pdlaunch.config.sources import load_config
from tests.e2e.conftest import clean_environ
from tests.e2e.waiting import await_true

TIMEOUT_S = 600.0


def start(model: Path, folder: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pdlaunch", "verdict", "--model", str(model)]
    engine = ["--dtype", "float32", "--kv-cache-memory", "16MiB", "--gpus", "2"]
    # With few streams and short answers, measuring a single engine takes seconds. A probe lasts
    # until its last requests have missed the goals.
    engine += ["--max-num-seqs", "4"]
    load = ["--slo", "ttft=1000,e2e=2000", "--input-tokens", "100", "--output-tokens", "20"]
    files = ["--minutes", "0.1", "--output", str(folder)]
    return subprocess.Popen(
        [*command, *engine, *load, *files, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=clean_environ(),
    )


@pytest.mark.e2e_long
def test_ctrl_c_gives_the_verdict_so_far_and_resume_goes_on(llama: Path, tmp_path: Path) -> None:
    state = tmp_path / "verdict.json"
    process = start(llama, tmp_path)

    def has_measured() -> bool:
        assert process.poll() is None, process.communicate()[0]
        return state.exists() and bool(json.loads(state.read_text())["findings"]["probes"])

    await_true(has_measured, "a first measurement", TIMEOUT_S)
    process.send_signal(signal.SIGINT)
    told, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 130, told
    assert "No verdict: both kinds must be measured" in told
    assert "--resume continues" in told
    before = json.loads(state.read_text())["findings"]

    process = start(llama, tmp_path, "--resume")
    told, _ = process.communicate(timeout=TIMEOUT_S)
    # On busy cores, perhaps no rate meets the goals.
    has_verdict = "No verdict" not in told
    assert process.returncode == int(not has_verdict), told
    after = json.loads(state.read_text())["findings"]
    num_before = len(before["probes"])
    assert after["probes"][:num_before] == before["probes"]
    assert after["figures"] == before["figures"], "single engines are not measured again"
    assert {probe["arm"] for probe in after["probes"]} == {"2 x TP1", "1P1D"}
    assert not after["broken"]
    assert all(probe["row"]["num_errors"] == 0 for probe in after["probes"])
    assert "<polyline" in (tmp_path / "verdict.html").read_text()
    if has_verdict:
        winner = load_config(tmp_path / "winner.yaml", {}, {}).config
        assert winner.model == str(llama)
        assert winner.both.replicas + winner.prefill.replicas + winner.decode.replicas == 2
