"""Each child is given what it needs, and no more."""

from __future__ import annotations

from pathlib import Path

import pytest

from pdlaunch.config.models import LaunchConfig
from pdlaunch.engines.native import NativeEngine
from pdlaunch.engines.plan import plan_processes
from pdlaunch.protocol.sockets import new_launch_keys
from pdlaunch.resolve.resolve import resolve
from pdlaunch.supervisor.bootstraps import LaunchBootstraps
from pdlaunch.supervisor.ports import listening
from tests.resolve.test_resolve import CPU, write_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "tiny", dtype="bfloat16")


def test_children_are_given_what_is_theirs(model: Path, tmp_path: Path) -> None:
    config = LaunchConfig.model_validate({"model": str(model), "port": 0, "api_key": "secret"})
    with listening("127.0.0.1", 0) as listeners:
        resolved = resolve(config, {"here": CPU}, {})
        bootstraps = LaunchBootstraps(
            resolved,
            keys=new_launch_keys(),
            control="ipc:///c",
            run_dir=tmp_path,
            launch_id="l",
            listeners=listeners,
            kind=NativeEngine(),
        )
        bootstraps.prepare()
        rank, _, server, _, router = plan_processes(resolved).processes
        of_rank, of_server, of_router = (
            bootstraps.make(rank, 2),
            bootstraps.make(server, 1),
            bootstraps.make(router, 2),
        )
        assert of_rank.engine().name == "prefill-0"
        assert of_rank.rendezvous == f"file://{tmp_path}/prefill-0.tp.2"
        assert of_server.engine() == of_rank.engine()
        assert (of_rank.router, of_server.router, of_router.engine_json) == (None, None, None)
        assert of_router.router is not None
        assert of_router.router.port == listeners[0].getsockname()[1]
        assert of_router.router.listeners == (listeners[0].fileno(),)
        assert of_router.router.api_key == "secret"
