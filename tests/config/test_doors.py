"""Settings of who may open what: keys, ports of engines, hosts, origins."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pdlaunch.cli.flags import to_command_line
from pdlaunch.machine.facts import Machine
from pdlaunch.planning.resolve import resolve
from tests.command_line import invoke
from tests.config.test_sources import load, only, problems

KEY = {"engine_api_key": "of-another-router"}


def test_lists_from_file_environment_and_flag(tmp_path: Path) -> None:
    path = tmp_path / "deploy.yaml"
    path.write_text(
        "allowed_hosts: [llm.example, '::1']\ncors_origins:\n  - https://chat.example\n  - http://localhost:3000\n"
    )
    config = load(path).config
    assert config.allowed_hosts == ("llm.example", "::1")
    assert config.cors_origins == ("https://chat.example", "http://localhost:3000")
    assert load(path, {"PDLAUNCH_ALLOWED_HOSTS": "a.example, b.example"}).config.allowed_hosts == (
        "a.example",
        "b.example",
    )
    assert load(path, allowed_hosts="*").config.allowed_hosts == ("*",)
    path.write_text("allowed_hosts: llm.example\n")
    assert load(path).config.allowed_hosts == ("llm.example",)
    assert load().config.allowed_hosts == load().config.cors_origins == ()


@pytest.mark.parametrize(
    "origin",
    [
        "chat.example",
        "https://chat.example/page",
        "ftp://a",
        "https://",
        "http://a:x",
        "http://u@a",
    ],
)
def test_an_origin_is_scheme_and_host(origin: str) -> None:
    problem = only(problems(cors_origins=origin))
    assert problem.field == "cors_origins"
    assert "scheme://host" in problem.message


@pytest.mark.parametrize("text", ["[[a]]", "[{a: b}]", "[null]", "{a: b}"])
def test_a_list_of_other_things_is_refused_at_its_place(text: str, tmp_path: Path) -> None:
    path = tmp_path / "deploy.yaml"
    path.write_text(f"allowed_hosts: {text}\n")
    problem = only(problems(path))
    assert problem.field == "allowed_hosts"
    assert f"{path}:1:" in str(problem)
    assert "should be a valid" in problem.message


def test_ports_of_engines_need_a_key_of_their_own() -> None:
    for role in ("prefill", "decode"):
        problem = only(problems(**{f"{role}__port": 9000}))
        assert problem.field == f"{role}.port"
        assert "set engine_api_key" in problem.message
    config = load(prefill__port=9000, prefill__replicas=2, **KEY).config
    assert list(config.prefill.ports()) == [9000, 9001]
    assert list(config.decode.ports()) == []
    assert [
        (item.name, item.port, item.where)
        for item in resolve(config, {"here": Machine()}, {}).engine_addresses
    ] == [
        ("server of prefill-0", 9000, "prefill.port"),
        ("server of prefill-1", 9001, "prefill.port"),
    ]


@pytest.mark.parametrize(
    ("values", "field", "words"),
    [
        ({"prefill__port": 8000}, "prefill.port", "that of port too"),
        ({"prefill__port": 7999, "prefill__replicas": 2}, "prefill.port", "port 8000"),
        (
            {"prefill__port": 9000, "prefill__replicas": 2, "decode__port": 9001},
            "decode.port",
            "that of prefill.port too",
        ),
        ({"decode__port": 65535, "decode__replicas": 2}, "decode.port", "up to 65536"),
    ],
)
def test_ports_must_not_meet(values: dict[str, object], field: str, words: str) -> None:
    problem = only(problems(**values, **KEY))
    assert problem.field == field
    assert words in problem.message


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("api_key", "admin_api_key"),
        ("api_key", "engine_api_key"),
        ("admin_api_key", "engine_api_key"),
    ],
)
def test_each_door_has_a_key_of_its_own(first: str, second: str) -> None:
    problem = only(problems(**{first: "hunter2", second: "hunter2"}))
    assert problem.field == second
    assert f"must differ from {first}" in problem.message
    assert "hunter2" not in str(problem)


def test_keys_are_shown_nowhere_and_given_on_through_the_environment() -> None:
    names = ("api_key", "admin_api_key", "engine_api_key")
    environ = {f"PDLAUNCH_{name.upper()}": f"hunter2-{name}" for name in names}
    arguments = ("config", "show", "--format", "json")
    result = invoke(arguments, env=environ)
    assert result.exit_code == 0
    assert "hunter2" not in result.output
    assert all(json.loads(result.output)[name]["origin"] == "environment" for name in names)
    flags = {name: f"hunter2-{name}" for name in names}
    assert to_command_line(flags | {"allowed_hosts": "a,b"}) == (
        ["--allowed-hosts", "a,b"],
        environ,
    )
