"""Settings of who may open what: keys, ports of engines, hosts, origins."""

import hashlib
from pathlib import Path

import pytest

from pdlaunch.machine.facts import Machine
from pdlaunch.planning.resolve import resolve
from tests.config.test_sources import load, only, problems

KEY = {"engine_api_key": "of-another-router"}
SECRET = "my-own-key"
DIGEST = hashlib.sha256(SECRET.encode()).hexdigest()


def keys(*entries: dict[str, object]) -> dict[str, object]:
    return {"api_keys": [{"name": "a", "sha256": DIGEST} | entry for entry in entries]}


@pytest.mark.parametrize(
    ("values", "field", "words"),
    [
        (keys({"sha256": SECRET}), "api_keys", "64 hexadecimal digits"),
        (keys({"name": "a b"}), "api_keys", "pattern"),
        ({"api_keys": SECRET}, "api_keys", "into the file; PDLAUNCH_API_KEY"),
        (keys({}, {"name": "b"}), "api_keys", "two keys have the sha256 of a"),
        (keys({}, {"sha256": "0" * 64}), "api_keys", "two keys have the name of a"),
        (keys({}) | {"admin_api_key": SECRET}, "admin_api_key", "differ from the key a"),
        (keys({"weight": 0}), "api_keys", "greater than or equal to 0.01"),
        (
            {"api_key": SECRET, "admin_api_key": SECRET},
            "admin_api_key",
            "must differ from api_key",
        ),
        (
            {"admin_api_key": SECRET, "engine_api_key": SECRET},
            "engine_api_key",
            "must differ from admin_api_key",
        ),
        ({"ssl_keyfile": "key.pem"}, "ssl_keyfile", "set ssl_certfile"),
        (KEY | {"prefill__port": 7999, "prefill__replicas": 2}, "prefill.port", "8000 would also"),
        (
            KEY | {"prefill__port": 9000, "prefill__replicas": 2, "decode__port": 9001},
            "decode.port",
            "also be used for prefill.port",
        ),
        (KEY | {"decode__port": 65535, "decode__replicas": 2}, "decode.port", "up to 65536"),
    ],
)
def test_keys_and_ports_are_checked_and_no_key_is_shown(
    values: dict[str, object], field: str, words: str
) -> None:
    problem = only(problems(**values))
    assert (problem.field or "").startswith(field)
    assert words in problem.message
    assert SECRET not in str(problem)


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


@pytest.mark.parametrize("roles", ["[prefill, both]", "'prefill,both'"])
def test_roles_of_a_host_are_a_list_or_words(path: Path, roles: str) -> None:
    path.write_text(f"placement: hosts\nhosts:\n  - name: a\n    roles: {roles}\n  - b\n")
    found = [(host.name, host.roles) for host in load(path).config.hosts]
    assert found == [("a", ("prefill", "both")), ("b", None)]


@pytest.mark.parametrize("settings", ["hosts: [a]", "placement: hosts", "placement: ray\nhosts: a"])
def test_hosts_and_their_placement_go_together(path: Path, settings: str) -> None:
    path.write_text(settings)
    assert only(problems(path)).field == "hosts"
