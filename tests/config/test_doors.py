"""Settings of who may open what: keys, ports of engines, hosts, origins."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from pdlaunch.machine.facts import Machine
from pdlaunch.planning.resolve import resolve
from tests.config.test_sources import load, only, problems

KEY = {"engine_api_key": "of-another-router"}


DIGEST = hashlib.sha256(b"secret").hexdigest()


@pytest.mark.parametrize(
    ("keys", "others", "words"),
    [
        ([{"name": "a", "sha256": "my-own-key"}], {}, "64 hexadecimal digits"),
        ([{"name": "a b", "sha256": DIGEST}], {}, "pattern"),
        ("my-own-key", {}, "into the file; PDLAUNCH_API_KEY"),
        ([{"name": n, "sha256": DIGEST} for n in "ab"], {}, "two keys have the sha256 of a"),
        ([{"name": "a", "sha256": c * 64} for c in "01"], {}, "two keys have the name of a"),
        ([{"name": "a", "sha256": DIGEST}], {"admin_api_key": "secret"}, "differ from the key a"),
        ([{"name": "a", "sha256": DIGEST, "weight": 0}], {}, "greater than or equal to 0.01"),
    ],
)
def test_keys_of_clients_are_checked_and_not_shown(
    keys: object, others: dict[str, str], words: str
) -> None:
    problem = only(problems(api_keys=keys, **others))
    assert words in problem.message
    assert "my-own-key" not in str(problem)


def test_a_private_key_needs_a_certificate() -> None:
    assert "set ssl_certfile" in only(problems(ssl_keyfile="key.pem")).message


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deploy.yaml"


def test_lists_from_file_environment_and_flag(path: Path) -> None:
    path.write_text("allowed_hosts: [a.example, '::1']\n")
    config = load(path).config
    assert config.allowed_hosts == ("a.example", "::1")
    environ = {"PDLAUNCH_ALLOWED_HOSTS": "a.example, b.example"}
    assert load(path, environ).config.allowed_hosts == ("a.example", "b.example")
    assert load(path, allowed_hosts="*").config.allowed_hosts == ("*",)


def test_ports_of_engines_need_a_key_of_their_own() -> None:
    problem = only(problems(decode__port=9000))
    assert problem.field == "decode.port"
    assert "set engine_api_key" in problem.message
    config = load(prefill__port=9000, prefill__replicas=2, **KEY).config
    _, *addresses = resolve(config, {"here": Machine()}, {}).listeners
    assert [(item.name, item.port, item.where) for item in addresses] == [
        ("server of prefill-0", 9000, "prefill.port"),
        ("server of prefill-1", 9001, "prefill.port"),
    ]


@pytest.mark.parametrize(
    ("values", "field", "words"),
    [
        ({"prefill__port": 7999, "prefill__replicas": 2}, "prefill.port", "8000 would also be"),
        (
            {"prefill__port": 9000, "prefill__replicas": 2, "decode__port": 9001},
            "decode.port",
            "also be used for prefill.port",
        ),
        ({"decode__port": 65535, "decode__replicas": 2}, "decode.port", "up to 65536"),
    ],
)
def test_ports_must_not_meet(values: dict[str, object], field: str, words: str) -> None:
    problem = only(problems(**values, **KEY))
    assert problem.field == field
    assert words in problem.message


@pytest.mark.parametrize(
    ("first", "second"), [("api_key", "admin_api_key"), ("admin_api_key", "engine_api_key")]
)
def test_each_door_has_a_key_of_its_own(first: str, second: str) -> None:
    problem = only(problems(**{first: "hunter2", second: "hunter2"}))
    assert problem.field == second
    assert f"must differ from {first}" in problem.message
    assert "hunter2" not in str(problem)


@pytest.mark.parametrize("roles", ["[prefill, both]", "'prefill,both'"])
def test_roles_of_a_host_are_a_list_or_words(path: Path, roles: str) -> None:
    path.write_text(f"placement: hosts\nhosts:\n  - name: a\n    roles: {roles}\n  - b\n")
    found = [(host.name, host.roles) for host in load(path).config.hosts]
    assert found == [("a", ("prefill", "both")), ("b", None)]


@pytest.mark.parametrize("settings", ["hosts: [a]", "placement: hosts", "placement: ray\nhosts: a"])
def test_hosts_and_their_placement_go_together(path: Path, settings: str) -> None:
    path.write_text(settings)
    assert only(problems(path)).field == "hosts"
