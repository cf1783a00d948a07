"""What happens around a launch: its supervisor stands still."""

from __future__ import annotations

from pathlib import Path

import psutil

from pdlaunch.launch.client.deployment import running_deployment
from tests.e2e.conftest import default_environ
from tests.e2e.faults import TINY, paused
from tests.e2e.test_scale import run
from tests.e2e.tiny_models import make_tiny_model
from tests.e2e.waiting import await_true


def test_a_supervisor_that_wakes_up_late_restarts_nothing(tmp_path: Path) -> None:
    model = make_tiny_model("llama", tmp_path)
    with running_deployment(("--model", str(model), *TINY), environ=default_environ()) as launch:
        before = {name: process.pid for name, process in launch.processes().items()}
        with paused(psutil.Process(launch.process.pid)):
            said = run("restart", "decode-0", "--url", launch.url, exit_code=1)
        assert "the supervisor has not answered within 10 s" in said
        await_true(lambda: "a command is dropped" in launch.output(), "the supervisor says so")
        # Carried out behind the dropped one, so that a restart would show by now.
        assert "nothing runs there" in run("drain", "prefill-0", "--url", launch.url)
        assert {name: process.pid for name, process in launch.processes().items()} == before
