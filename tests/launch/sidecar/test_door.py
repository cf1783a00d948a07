"""Real HTTP over TLS to a door, and a stand-in for vLLM behind it that does what a test says."""

import asyncio
import io
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web
from msgspec.structs import replace

from pdlaunch.errors import StartupError
from pdlaunch.http.kv_feed import KV_EVENTS_PATH, KVFeed
from pdlaunch.launch.sidecar.door import Door
from pdlaunch.protocol.certificates import client_context, new_certificate
from pdlaunch.protocol.kv_events import KVBlocks
from pdlaunch.protocol.process.bootstrap import DoorSpec
from pdlaunch.protocol.sockets import new_launch_keys

KEYS = new_launch_keys(with_certificate=True)
SPEC = DoorSpec(
    bind_address="127.0.0.1",
    advertise_address="127.0.0.1",
    port=0,
    data_ports="21000-21999",
    max_model_len=16,
    max_body_bytes=1000,
    max_connections=100,
)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Scene:
    def __init__(self, folder: Path) -> None:
        self.path = folder / "prefill-0.sock"
        self.seen: list[web.Request] = []
        self.bodies: list[bytes] = []
        self.handler: Handler = self._plain
        self.url = ""
        app = web.Application(client_max_size=2**30)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self.engine = web.AppRunner(app, handler_cancellation=True)
        self.feed = KVFeed()
        self.door = Door("prefill-0", SPEC, KEYS, f"unix:{self.path}", "of-the-engine", self.feed)
        assert KEYS.certificate is not None
        self.tls = client_context(KEYS.certificate)
        self.client = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=self.tls),
            headers={"Authorization": f"Bearer {KEYS.http_token}"},
        )

    async def _handle(self, http: web.Request) -> web.StreamResponse:
        self.seen.append(http)
        self.bodies.append(await http.read())
        return await self.handler(http)

    @staticmethod
    async def _plain(_: web.Request) -> web.StreamResponse:
        return web.json_response({"choices": []}, headers={"Server": "uvicorn"})


@pytest_asyncio.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    scene = Scene(tmp_path)
    await scene.engine.setup()
    await web.UnixSite(scene.engine, str(scene.path)).start()
    scene.url = await scene.door.open()
    yield scene
    await scene.client.close()
    await scene.door.close()
    await scene.engine.cleanup()


async def test_requests_and_answers_pass_unchanged(scene: Scene) -> None:
    body = b'{"prompt": [1],  "unknown": {"x": null}}'
    headers = {"X-Request-Id": "id-7", "traceparent": "00-1", "Content-Type": "application/json"}
    async with scene.client.post(
        f"{scene.url}/v1/completions", data=body, headers=headers
    ) as response:
        assert (response.status, await response.read()) == (200, b'{"choices": []}')
        assert response.headers["X-Request-Id"] == "id-7"
    (seen,) = scene.seen
    assert scene.bodies == [body]
    assert (seen.headers["X-Request-Id"], seen.headers["traceparent"]) == ("id-7", "00-1")
    # vLLM has a key of its own, and must not be told the launch's.
    assert seen.headers["Authorization"] == "Bearer of-the-engine"
    assert KEYS.http_token not in str(seen.headers)
    async with scene.client.post(f"{scene.url}/wake_up?tags=weights&tags=kv_cache"):
        assert scene.seen[-1].path_qs == "/wake_up?tags=weights&tags=kv_cache"

    async def refuse(_: web.Request) -> web.StreamResponse:
        return web.json_response({"object": "error"}, status=404, headers={"Retry-After": "3"})

    scene.handler = refuse
    async with scene.client.get(f"{scene.url}/v1/models") as response:
        assert (response.status, await response.json()) == (404, {"object": "error"})
        assert response.headers["Retry-After"] == "3"


@pytest.mark.parametrize("key", [None, "another", "of-the-engine"])
async def test_a_token_opens_it_and_nothing_else(scene: Scene, key: str | None) -> None:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    async with aiohttp.ClientSession(headers=headers) as stranger:
        for path in ("/health", "/metrics", "/v1/models", "/pdlaunch/anything"):
            async with stranger.get(f"{scene.url}{path}", ssl=scene.tls) as response:
                assert (response.status == 401) is (key != "of-the-engine")
    assert bool(scene.seen) is (key == "of-the-engine")


async def test_other_routes_are_not_there(scene: Scene) -> None:
    for path in ("/collective_rpc", "/server_info", "/v1/load_lora_adapter", "/docs"):
        async with scene.client.post(f"{scene.url}{path}", json={}) as response:
            assert response.status in (404, 405)
    assert not scene.seen


async def test_who_does_not_hold_the_certificate_is_told_nothing(scene: Scene) -> None:
    other = client_context(new_certificate())
    async with aiohttp.ClientSession() as client:
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await client.get(f"{scene.url}/health", ssl=other)
        with pytest.raises(aiohttp.ClientError):
            await client.get(scene.url.replace("https", "http") + "/health")
    assert not scene.seen


async def begun(http: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(http)
    await response.write(b"data: 1\n\n")
    return response


async def test_pieces_of_a_stream_come_when_they_are_sent(scene: Scene) -> None:
    go = asyncio.Event()

    async def stream(http: web.Request) -> web.StreamResponse:
        response = await begun(http)
        await go.wait()
        await response.write(b"data: [DONE]\n\n")
        return response

    scene.handler = stream
    async with scene.client.post(f"{scene.url}/v1/completions", json={}) as response:
        assert response.content_type == "text/event-stream"
        assert await response.content.readany() == b"data: 1\n\n"
        go.set()
        assert await response.content.read() == b"data: [DONE]\n\n"


@pytest.mark.parametrize("has_begun", [False, True])
async def test_a_client_that_leaves_ends_its_request_at_the_engine(
    scene: Scene, has_begun: bool
) -> None:
    came, left = asyncio.Event(), asyncio.Event()

    async def answer(http: web.Request) -> web.StreamResponse:
        if has_begun:
            await begun(http)
        came.set()
        try:
            await asyncio.Event().wait()
        finally:
            left.set()
        return web.Response()

    scene.handler = answer
    asking = asyncio.create_task(scene.client.post(f"{scene.url}/v1/completions", json={}))
    await came.wait()
    if has_begun:
        (await asking).close()
    else:
        asking.cancel()
    await left.wait()


@pytest.mark.parametrize("has_begun", [False, True])
async def test_an_engine_that_dies_breaks_its_answers_off(scene: Scene, has_begun: bool) -> None:
    """A router must not take what there is for the whole."""

    async def die(http: web.Request) -> web.StreamResponse:
        if has_begun:
            await begun(http)
        assert http.transport is not None
        http.transport.abort()
        return web.Response()

    scene.handler = die
    with pytest.raises(aiohttp.ClientError):
        async with scene.client.post(f"{scene.url}/v1/completions", json={}) as response:
            await response.read()
    # The door is there for the next one.
    scene.handler = scene._plain
    async with scene.client.get(f"{scene.url}/health") as response:
        assert response.status == 200


async def test_an_engine_that_is_not_there_has_not_begun(scene: Scene) -> None:
    await scene.engine.cleanup()
    async with scene.client.post(f"{scene.url}/v1/completions", json={}) as response:
        assert response.status == 503
        assert (await response.json())["error"]["code"] == "engine_not_there"


async def test_bodies_are_bounded(scene: Scene) -> None:
    most = scene.door._bodies.max_body_bytes
    for length, status in ((most, 200), (most + 1, 413)):
        async with scene.client.post(
            f"{scene.url}/v1/completions",
            data=io.BytesIO(b"x" * length),
            headers={"Content-Type": "application/json"},
        ) as response:
            assert response.status == status
    assert [len(body) for body in scene.bodies] == [most]


async def test_routers_on_other_hosts_follow_what_the_engine_holds(scene: Scene) -> None:
    scene.feed.publish(KVBlocks(block_size=4))
    async with scene.client.get(scene.url + KV_EVENTS_PATH) as answer:
        assert answer.status == 200
        assert await answer.content.readany()
    async with scene.client.get(
        scene.url + KV_EVENTS_PATH, headers={"Authorization": ""}
    ) as answer:
        assert answer.status == 401
    assert not scene.seen
    assert "of-the-engine" not in repr(scene.door)


async def test_a_port_that_is_busy_is_told(scene: Scene) -> None:
    busy = replace(SPEC, port=int(scene.url.rpartition(":")[2]))
    other = Door("decode-0", busy, KEYS, f"unix:{scene.path}", None, KVFeed())
    with pytest.raises(StartupError, match=f"decode-0 cannot listen on 127.0.0.1:{busy.port}"):
        await other.open()
    await other.close()
