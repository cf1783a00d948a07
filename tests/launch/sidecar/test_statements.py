"""What a prefill engine states gets to a decode engine on another host: both sidecars, in one
process.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import numpy as np
import pytest
import pytest_asyncio

from pdlaunch.launch.sidecar.door import (
    STATEMENTS_PATH,
    Door,
    StatementDesk,
    statement_route,
)
from pdlaunch.protocol.certificates import client_context
from pdlaunch.vllm.far_statements import Answer, FarStatements
from pdlaunch.vllm.statements import Statement, StatementBoard, statement_name
from tests.launch.sidecar.test_door import KEYS, SPEC

STATEMENT = Statement("tokens", (7, 9), 0, "blake3", np.array([[1], [2**64 - 1]], dtype=np.uint64))
HOST, PORT = "10.0.0.2", 21_000


def tls() -> ssl.SSLContext:
    assert KEYS.certificate is not None
    return client_context(KEYS.certificate)


class Scene:
    def __init__(self, folder: Path) -> None:
        self.there, self.here = folder / "there", folder / "here"
        for each in (self.there, self.here):
            each.mkdir()
        self.prefill = StatementBoard(self.there)
        self.decode = FarStatements(StatementBoard(self.here), str(folder / "asks"))
        self.door = Door(
            "prefill-0", SPEC, KEYS, "unix:/nobody", None, [statement_route(self.there)]
        )
        self.desk = StatementDesk(folder / "asks", KEYS)

    async def ask(self, request_id: str, ranks: tuple[int, ...] = (0,)) -> Answer:
        asked = self.decode.ask("prefill", ranks, request_id, HOST, PORT)
        return await asyncio.wrap_future(asked)


@pytest_asyncio.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    scene = Scene(tmp_path)
    scene.desk.doors[f"tcp://{HOST}:{PORT}"] = await scene.door.open()
    await scene.desk.open()
    yield scene
    scene.decode.close()
    await scene.desk.close()
    await scene.door.close()


def read(answer: Answer) -> dict[int, bytes | None]:
    assert not isinstance(answer, str)
    return {rank: each and each.encode() for rank, each in answer.items()}


async def test_what_is_stated_there_is_found_until_it_is_withdrawn(scene: Scene) -> None:
    scene.prefill.state("prefill", 0, "r", STATEMENT)
    assert read(await scene.ask("r")) == {0: STATEMENT.encode()}
    assert read(await scene.ask("r", (0, 1))) == {0: STATEMENT.encode(), 1: None}
    scene.prefill.withdraw("r")
    assert read(await scene.ask("r")) == {0: None}


async def test_sidecars_that_are_gone_or_say_nonsense_prove_nothing(scene: Scene) -> None:
    name = statement_name("prefill", 0, "r")
    (scene.there / name).write_bytes(b"{}\n")
    assert "not a statement" in str(await scene.ask("r"))
    await scene.door.close()
    assert "cannot connect: " in str(await scene.ask("r"))
    # Addresses come with requests.
    scene.desk.doors.clear()
    assert str(await scene.ask("r")).endswith(": no engine of the launch is there")
    await scene.desk.close()
    assert "cannot be asked what it states of them" in str(await scene.ask("r"))


@pytest.mark.parametrize("name", ["..%2f..%2fetc%2fpasswd", "join.json", "0" * 39, "0" * 40])
async def test_no_other_file_can_be_read(scene: Scene, name: str) -> None:
    (scene.there.parent / "join.json").write_text("secret")
    (scene.there / "join.json").write_text("secret")
    url = scene.desk.doors[f"tcp://{HOST}:{PORT}"]
    headers = {"Authorization": f"Bearer {KEYS.http_token}"}
    async with aiohttp.ClientSession() as client:
        for sent, status in ((headers, 404), ({}, 401)):
            async with client.get(
                f"{url}{STATEMENTS_PATH}/{name}", headers=sent, ssl=tls()
            ) as response:
                assert response.status == status
