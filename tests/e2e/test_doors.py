"""Access to the ports and sockets of a launch with keys: for clients, another router, the user who
started it, a web page, another user.
"""

import json
import os
import re
import socket
import stat
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest
from prometheus_client import CollectorRegistry

from pdlaunch import __version__
from pdlaunch.engine.server.engine_service import EngineService
from pdlaunch.engine.server.lifecycle import make_app
from pdlaunch.launch.client.deployment import held_port
from pdlaunch.protocol.process.run_dirs import RunningLaunch, running_launches
from tests.e2e.agreement import differences, engines_of
from tests.e2e.api import await_ready, total_now
from tests.e2e.client import Api, Deployment, admin_api
from tests.e2e.conftest import clean_environ, launched
from tests.e2e.lone_router import needs_vllm_router, running_router, running_vllm_router
from tests.e2e.test_scale import run
from tests.e2e.waiting import await_true
from tests.engine.server.conftest import engine_spec
from tests.other_user import as_nobody
from tests.protocol.process.test_engine_ports import listen_in_all_ways
from tests.router.test_admin import COMMANDS

CLIENT, OTHER_ROUTER = "of-the-clients", "of-another-router"
BODY = {"prompt": [5, 6, 7], "max_tokens": 2}


@dataclass(frozen=True)
class Doors:
    deployment: Deployment
    launch: RunningLaunch
    prefill_port: int

    @property
    def router(self) -> str:
        return self.deployment.url

    @property
    def engines(self) -> dict[str, str]:
        return {engine["name"]: engine["url"] for engine in engines_of(admin_api(self.router))}


@pytest.fixture(scope="module")
def doors(llama: Path) -> Iterator[Doors]:
    keys = {"PDLAUNCH_API_KEY": CLIENT, "PDLAUNCH_ENGINE_API_KEY": OTHER_ROUTER}
    with held_port() as port, held_port() as other:
        keys |= {"PDLAUNCH_PREFILL__PORT": str(port), "PDLAUNCH_DECODE__PORT": str(other)}
        with launched(llama, environ=clean_environ() | keys) as deployment:
            (launch,) = (each for each in running_launches() if each.card.url == deployment.url)
            yield Doors(deployment, launch, port)


def ask(method: str, url: str, body: object = None, **headers: str) -> tuple[int, str]:
    """Status and text of an answer; ``headers`` have _ instead of -."""
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {"Content-Type": "application/json"} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    request = urllib.request.Request(url, data=data, headers=named, method=method)
    try:
        with urllib.request.urlopen(request, timeout=300) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def bearer(key: str) -> str:
    return f"Bearer {key}"


def engine_routes(folder: Path) -> list[tuple[str, str]]:
    app = make_app(EngineService(engine_spec(folder), CollectorRegistry()), keys=[])
    return [
        (route.method, route.resource.canonical)
        for route in app.router.routes()
        if route.resource is not None and route.method != "*"
    ]


def test_no_route_of_an_engine_but_health_opens_without_a_key_or_with_the_clients(
    doors: Doors, tmp_path: Path
) -> None:
    routes = engine_routes(tmp_path)
    assert len(routes) > 12
    for url in doors.engines.values():
        for method, path in routes:
            body = BODY if method == "POST" else None
            expected = 200 if path in ("/health", "/ping") else 401
            for headers in ({}, {"Authorization": bearer(CLIENT)}):
                assert ask(method, url + path, body, **headers)[0] == expected, (path, headers)


def test_another_router_s_key_opens_the_engines_and_nothing_else(doors: Doors) -> None:
    key = bearer(OTHER_ROUTER)
    assert doors.engines["prefill-0"] == f"http://127.0.0.1:{doors.prefill_port}"
    for url in doors.engines.values():
        assert ask("POST", f"{url}/v1/completions", BODY, Authorization=key)[0] == 200
    assert ask("POST", f"{doors.router}/v1/completions", BODY, Authorization=key)[0] == 401


@pytest.fixture(scope="module")
def vllm_router(doors: Doors, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_vllm_router(
        prefill=[doors.engines["prefill-0"]],
        decode=doors.engines["decode-0"],
        api_key=OTHER_ROUTER,
        log_file=tmp_path_factory.mktemp("vllm-router") / "log",
    ) as url:
        yield url


def answered(url: str, kind: str, fields: dict[str, Any]) -> tuple[list[int], str, str]:
    """Token ids, text and finish reason of the only choice, from an answer or a whole stream."""
    status, text = ask("POST", f"{url}/v1/{kind}", fields, Authorization=bearer(CLIENT))
    assert status == 200, text
    if fields.get("stream"):
        lines = [line.removeprefix("data: ") for line in text.splitlines() if line]
        assert lines.pop() == "[DONE]"
        events = [json.loads(line) for line in lines]
    else:
        events = [json.loads(text)]
    choices = [choice for event in events for choice in event["choices"]]
    parts = [choice.get("delta") or choice.get("message") or choice for choice in choices]
    return (
        [token_id for choice in choices for token_id in choice.get("token_ids") or ()],
        "".join(part.get("text") or part.get("content") or "" for part in parts),
        choices[-1]["finish_reason"],
    )


@needs_vllm_router
@pytest.mark.parametrize(
    ("stream", "sampling"),
    [(False, {"temperature": 0}), (True, {"temperature": 0.5, "seed": 7})],
    ids=["whole", "stream"],
)
@pytest.mark.parametrize("kind", ["completions", "chat/completions"])
def test_the_real_vllm_router_answers_with_the_same_tokens(
    doors: Doors, vllm_router: str, kind: str, stream: bool, sampling: dict[str, Any]
) -> None:
    """That router adds unknown fields, and gets engine_api_key as OPENAI_API_KEY."""
    prompt = f"{kind} {stream}: what comes next after this text?"
    fields: dict[str, Any] = {"max_tokens": 12, "ignore_eos": True, "return_token_ids": True}
    fields |= sampling | {"stream": stream, "model": "llama"}
    fields |= (
        {"prompt": prompt}
        if kind == "completions"
        else {"messages": [{"role": "user", "content": prompt}]}
    )
    assert_same_tokens(doors, vllm_router, kind, fields)


def assert_same_tokens(doors: Doors, url: str, kind: str, fields: dict[str, Any]) -> None:
    """Another router's answer of 12 tokens is the launch's own, and its blocks were pulled."""
    num_pulls = total_now(doors.router, "kv_transfers")
    theirs = answered(url, kind, fields)
    assert total_now(doors.router, "kv_transfers") == num_pulls + 1
    assert theirs == answered(doors.router, kind, fields)
    assert len(theirs[0]) == 12


@pytest.fixture(scope="module")
def lone_router(doors: Doors, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """``pdlaunch router`` for the launch's engines; it knows only their URLs."""
    urls = ("--prefill", doors.engines["prefill-0"], "--decode", doors.engines["decode-0"])
    with running_router(
        (*urls, "--engine-key-env", "KEY_OF_ENGINES", "--dtype", "float32"),
        clean_environ() | {"KEY_OF_ENGINES": OTHER_ROUTER},
        tmp_path_factory.mktemp("router") / "log",
    ) as url:
        yield url


def test_a_router_alone_answers_with_the_same_tokens(doors: Doors, lone_router: str) -> None:
    for stream in (False, True):
        fields = {"prompt": f"What comes next {stream}?", "max_tokens": 12, "ignore_eos": True}
        fields |= {"return_token_ids": True, "temperature": 0, "stream": stream}
        assert_same_tokens(doors, lone_router, "completions", fields)


def test_a_router_alone_has_proven_the_pair_and_shows_its_metrics(
    doors: Doors, lone_router: str
) -> None:
    lines = ask("GET", f"{lone_router}/metrics")[1].splitlines()
    proven = re.compile(r'pdlaunch_router_canaries_total\{outcome="proven"\} [1-9]')
    assert any(map(proven.match, lines))
    assert any(
        line.startswith("pdlaunch_kv_transfer_bytes_total") and 'engine="decode-0"' in line
        for line in lines
    )
    engines = json.loads(ask("GET", f"{lone_router}/pdlaunch/status")[1])["engines"]
    assert {engine["name"]: engine["url"] for engine in engines} == doors.engines
    assert {engine["state"] for engine in engines} == {"ready"}


def test_commands_of_a_router_alone_leave_the_engines_as_they_are(
    doors: Doors, lone_router: str
) -> None:
    admin = admin_api(lone_router)
    before = {name: process.pid for name, process in doors.deployment.processes().items()}
    for path, body in (
        ("/pdlaunch/restart?engine=decode-0", {}),
        ("/pdlaunch/scale", {"replicas": {"decode": 2}}),
        ("/pdlaunch/drain?engine=decode-0", {}),
    ):
        status, answer = admin.post(path, body)
        assert status == 409
        assert "this router did not start its engines" in answer["error"]["message"]
    # Without admin_api_key, the router accepts no commands over TCP.
    assert ask("POST", f"{lone_router}/pdlaunch/drain?engine=decode-0")[0] == 403
    assert before == {name: process.pid for name, process in doors.deployment.processes().items()}


def test_doctor_examines_native_engines_and_proves_their_pair(
    doors: Doors, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["doctor", "--exact", "--format", "json", "--engine-key-env", "KEY_OF_ENGINES"]
    arguments += [f"--{role}={doors.engines[f'{role}-0']}" for role in ("prefill", "decode")]
    monkeypatch.setenv("KEY_OF_ENGINES", OTHER_ROUTER)
    found = json.loads(run(*arguments))["resolved"]["deployment"]
    assert [(each["kind"], each["version"]) for each in found["engines"]] == [
        ("native", __version__)
    ] * 2
    assert found["pairs"][0]["num_bytes"] > 0
    monkeypatch.setenv("KEY_OF_ENGINES", CLIENT)
    assert "other clients need engine_api_key" in run(*arguments, exit_code=1)


def test_the_clients_key_opens_no_command(doors: Doors) -> None:
    for method, path in COMMANDS:
        for key in (CLIENT, OTHER_ROUTER, ""):
            body = BODY if method == "POST" else None
            status, text = ask(method, doors.router + path, body, Authorization=bearer(key))
            assert status == 403
            assert "admin_api_key" in text


def test_the_admin_socket_is_of_its_user_alone_also_that_of_the_next_router(doors: Doors) -> None:
    def mode_and_user(path: Path) -> tuple[int, int]:
        return stat.S_IMODE(path.stat().st_mode), path.stat().st_uid

    assert mode_and_user(doors.launch.run_dir) == (0o700, os.getuid())
    assert mode_and_user(doors.launch.admin_socket) == (0o600, os.getuid())
    old = doors.deployment.processes()["router"]
    old.kill()
    old.wait(180)
    # The supervisor owns the listening socket, so this request waits for the next router.
    assert ask("GET", f"{doors.router}/health")[0] == 200
    status, answer = admin_api(doors.router).get_object("/pdlaunch/integrity")
    assert (status, answer["ok"]) == (200, True)
    assert mode_and_user(doors.launch.admin_socket) == (0o600, os.getuid())
    await_ready(doors.router)


def connect(path: str) -> dict[str, str]:
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(path)
        except OSError as error:
            return {"error": type(error).__name__}
    return {}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_cannot_command_it(doors: Doors) -> None:
    path = str(doors.launch.admin_socket)
    assert connect(path) == {}
    assert as_nobody(partial(connect, path)) == {"error": "PermissionError"}
    doors.launch.run_dir.chmod(0o755)
    try:
        assert as_nobody(partial(connect, path)) == {"error": "PermissionError"}
    finally:
        doors.launch.run_dir.chmod(0o700)


@pytest.mark.parametrize("command", ["sleep", "wake"])
def test_commands_of_its_user_reach_every_engine_without_a_key(doors: Doors, command: str) -> None:
    """Engines on a CPU answer that they cannot sleep; test_sleep.py has engines on a GPU."""
    said = run(command, "--url", doors.router, exit_code=1)
    for name in ("prefill-0", "decode-0"):
        assert re.search(rf"{name}.*enable_sleep_mode is off", said), said


def test_no_process_shows_a_key(doors: Doors) -> None:
    """No key is in arguments, in the environment (except that of the command itself), in the logs
    or in the status.
    """
    processes = doors.deployment.processes().items()
    shown = {name: f"{process.cmdline()} {process.environ()}" for name, process in processes}
    shown |= {path.name: path.read_text() for path in doors.deployment.log_dir.iterdir()}
    shown["terminal"] = doors.deployment.output()
    status = f"{doors.router}/pdlaunch/status"
    code, shown["status"] = ask("GET", status, Authorization=bearer(CLIENT))
    assert (code, ask("GET", status)[0]) == (200, 401)
    keys = (CLIENT, OTHER_ROUTER)
    assert [name for name, text in shown.items() if any(key in text for key in keys)] == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_nobody_takes_the_place_of_a_killed_server(doors: Doors) -> None:
    """Otherwise an attacker would get prompts and keys until the router knows of the death."""
    place = partial(listen_in_all_ways, "127.0.0.1", doors.prefill_port)
    old = doors.deployment.processes()["prefill-0"]
    old.kill()
    old.wait(180)
    assert set(as_nobody(place).values()) == {"EADDRINUSE"}
    url = f"http://127.0.0.1:{doors.prefill_port}"
    await_true(lambda: ask("GET", f"{url}/health")[0] == 200, "the next server listens there")
    assert set(as_nobody(place).values()) == {"EADDRINUSE"}
    await_ready(doors.router)


def test_web_pages_and_foreign_names_are_refused_at_every_server(doors: Doors) -> None:
    servers = dict.fromkeys(doors.engines.values(), OTHER_ROUTER) | {doors.router: CLIENT}
    for url, key in servers.items():
        answer = partial(ask, "POST", f"{url}/v1/completions", Authorization=bearer(key))
        assert answer(BODY)[0] == 200
        as_others_write = {"Content_Type": "Application/JSON; charset=utf-8", "Host": "localhost:1"}
        assert answer(BODY, **as_others_write)[0] == 200
        status, text = answer(BODY, Origin="http://evil.example")
        assert (status, "use a proxy" in text) == (403, True)
        status, text = answer(BODY, Host="evil.example")
        assert (status, "allowed_hosts" in text) == (421, True)
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
            assert answer(BODY, Content_Type=kind)[0] == 415
        of_a_page = {"Authorization": bearer(key), "Origin": "http://evil.example"}
        assert ask("POST", f"{url}/sleep", **of_a_page)[0] == 403
        assert ask("GET", f"{url}/health", Host="probe.example")[0] == 200


def test_the_official_client_works(doors: Doors) -> None:
    with openai.OpenAI(base_url=f"{doors.router}/v1", api_key=CLIENT, max_retries=0) as client:
        fields: dict[str, Any] = {"model": "llama", **BODY}
        assert client.completions.create(**fields).usage.completion_tokens == 2
    assert Api(doors.router, CLIENT).metrics()["pdlaunch_router_engines_ready"] == 2


def test_a_pair_behind_keys_answers_as_one_engine_alone(doors: Doors) -> None:
    assert differences(doors.router, api_key=CLIENT) == []
