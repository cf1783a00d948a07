"""Who may speak to an engine: routers with a key, under a name of this machine, with JSON, and no
web page.
"""

from __future__ import annotations

from pdlaunch.engine.server.app import OPEN_PATHS, make_app
from tests.engine.server.conftest import TOKEN, Engine
from tests.engine.server.fake_rank import FakeRank

WRONG = (
    {},
    {"Authorization": "Bearer wrong"},
    {"Authorization": f"Basic {TOKEN}"},
    {"Authorization": "Bearer "},
    {"Authorization": TOKEN},
)


def routes(engine: Engine) -> list[tuple[str, str]]:
    found = make_app(engine.service, keys=[]).router.routes()
    return [
        (route.method, route.resource.canonical.replace("{name}", "tiny"))
        for route in found
        if route.resource is not None and route.method != "*"
    ]


async def test_every_route_but_health_asks_for_a_key(engine: Engine, rank: FakeRank):
    found = routes(engine)
    assert {path for _, path in found} > {
        "/health",
        "/metrics",
        "/sleep",
        "/wake_up",
        "/pdlaunch/release",
        "/v1/completions",
        "/tokenize",
    }
    for method, path in [*found, ("GET", "/nothing")]:
        for headers in WRONG:
            # The session's own key stays out.
            async with engine.session.request(
                method, engine.url + path, headers={"Authorization": ""} | headers
            ) as response:
                assert response.status == (200 if path in OPEN_PATHS else 401), (
                    method,
                    path,
                    headers,
                )
    assert rank.added() == []


async def test_every_body_must_be_json(engine: Engine, rank: FakeRank):
    posts = [path for method, path in routes(engine) if method == "POST"]
    assert len(posts) >= 7
    for path in posts:
        for kind in (
            "text/plain",
            "application/x-www-form-urlencoded",
            "multipart/form-data; boundary=x",
        ):
            async with engine.session.post(
                engine.url + path, data=b'{"prompt": "x"}', headers={"Content-Type": kind}
            ) as response:
                assert response.status == 415, path
        async with engine.session.post(
            engine.url + path, data=b"{}", skip_auto_headers=["Content-Type"]
        ) as response:
            assert response.status == 415, path
    assert rank.added() == []
    async with engine.session.post(
        engine.url + "/v1/completions",
        data=b'{"prompt": "x"}',
        headers={"Content-Type": "Application/JSON; Charset=utf-8"},
    ) as response:
        assert response.status == 200
