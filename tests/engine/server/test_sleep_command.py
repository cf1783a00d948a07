"""``pdlaunch sleep`` and ``wake`` from the command to a scripted rank 0: launch folder, admin
socket, router, engine.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from click.testing import Result
from typer.testing import CliRunner

from pdlaunch.cli.app import build_app
from pdlaunch.protocol.control import Address, Entry, Registry, SleepState
from pdlaunch.protocol.engine import Sleep, SleepReply, WakeUp
from pdlaunch.protocol.process import run_dirs
from pdlaunch.protocol.process.run_dirs import ADMIN_SOCKET, LaunchCard, new_run_dir
from pdlaunch.router.admin import listen_at_admin_socket
from pdlaunch.router.app import RouterApp
from pdlaunch.router.engine_client import EngineClient, EngineTimeouts
from pdlaunch.router.metrics import RouterMetrics
from pdlaunch.router.pool import EnginePool
from pdlaunch.router.state import RecoverySettings, RouterState
from pdlaunch.router.supervisor_link import SupervisorLink
from tests.engine.server.conftest import TOKEN, Engine
from tests.engine.server.fake_rank import FakeRank
from tests.router.conftest import SPEC

TAGS = ["kv_cache", "weights"]


@pytest_asyncio.fixture
async def launch(
    make_engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Engine]:
    """An engine behind a router that listens at the admin socket of a launch; the registry says
    what the engine says.
    """
    engine: Engine = await make_engine(enable_sleep_mode=True, enable_cumem_allocator=True)
    state = RouterState(
        EnginePool(time.monotonic),
        EngineClient(TOKEN, EngineTimeouts()),
        RouterMetrics("tiny"),
        RecoverySettings(),
        doubt=lambda _: None,
    )

    def announce(said: SleepState) -> None:
        server = Entry(
            name="prefill-0", kind="server", incarnation=1, engine="prefill-0", role="prefill"
        )
        server.address = Address(http=engine.url)
        server.state = "ready" if said.state == "awake" else said.state
        state.update(Registry(version=1, entries=[server]))

    engine.service.sleep.announce = announce
    announce(SleepState(state="awake"))
    monkeypatch.setattr(run_dirs, "base_dir", lambda: tmp_path)
    with new_run_dir(tmp_path) as run_dir:
        router = RouterApp(SPEC, state, SupervisorLink(lambda _: None))
        runner = await listen_at_admin_socket(router.app, run_dir / ADMIN_SOCKET)
        LaunchCard(launch_id="id", url="http://127.0.0.1:8000").write(run_dir)
        yield engine
        await runner.cleanup()
    await state.close()


def run(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(build_app(arguments), arguments)


async def test_command(launch: Engine, rank: FakeRank) -> None:
    running = asyncio.create_task(asyncio.to_thread(run, "sleep", "--level", "2"))
    (asleep,) = await rank.wait_for(Sleep)
    assert asleep.level == 2
    await rank.send(SleepReply(call_id=asleep.call_id, sleeping_tags=TAGS, num_bytes=3 * 2**30))
    result = await running
    assert result.exit_code == 0, result.output
    assert "sleeping" in result.output
    assert "3.00 GiB" in result.output
    assert launch.service.sleep.status().is_sleeping

    running = asyncio.create_task(
        asyncio.to_thread(
            run, "wake", "--tag", "weights", "--tag", "kv_cache", "--engine", "prefill-0"
        )
    )
    (awake,) = await rank.wait_for(WakeUp)
    assert awake.tags == ["weights", "kv_cache"]
    await rank.send(SleepReply(call_id=awake.call_id, sleeping_tags=[], num_bytes=2**30))
    result = await running
    assert result.exit_code == 0, result.output
    assert "awake" in result.output
    assert (await launch.complete())["choices"]
