"""Files of docker compose fit the specification, and their parts each other."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_pydantic import ComposeSpecification

from pdlaunch.config.models import LaunchConfig
from tests.launch.client.conftest import serving
from tests.launch.render.manifests import EXAMPLES, render, run

DEMO = str(EXAMPLES[0])


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_files_of_all_examples_fit(path: Path) -> None:
    (file,) = render("compose", str(path), "--name", "mine")
    check_specification(file)
    text = file["configs"]["deployment"]["content"]
    config = LaunchConfig.model_validate(yaml.safe_load(text))
    assert {host.name for host in config.hosts} == file["services"].keys() - {"router"}


def check_specification(file: dict[str, Any]) -> None:
    """Judge types and unknown fields."""
    # The models are older than `content`, which came with Compose 2.23.1.
    configs = {name: {"file": config["content"]} for name, config in file["configs"].items()}
    ComposeSpecification.model_validate({**file, "configs": configs})


def test_gpus_are_reserved() -> None:
    (file,) = render("compose", DEMO, "--assume", "h100x8", "--tensor-parallel-size", "3")
    check_specification(file)
    (device,) = file["services"]["decode-0"]["deploy"]["resources"]["reservations"]["devices"]
    assert (device["count"], device["capabilities"]) == (3, ["gpu"])


def test_only_the_router_is_reached_from_this_machine() -> None:
    (file,) = render("compose", DEMO)
    published = {name: s["ports"] for name, s in file["services"].items() if "ports" in s}
    assert published == {"router": ["127.0.0.1:8000:8000"]}


def test_a_folder_may_have_any_characters() -> None:
    (file,) = render("compose", DEMO, "--volume", "/é😀'$A:/models")
    assert "/é😀'$A:/models:ro" in file["services"]["router"]["volumes"]


def test_the_router_asks_itself_past_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as (proxy, proxied), serving() as (url, asked):
        monkeypatch.setenv("http_proxy", proxy)
        (file,) = render("compose", DEMO, "--port", url.rpartition(":")[2])
        exec(file["services"]["router"]["healthcheck"]["test"][3])
    assert (len(asked), proxied) == (1, [])


def test_secrets_are_files_of_their_owner_and_variables(tmp_path: Path) -> None:
    deployment = tmp_path / "deploy.yaml"
    deployment.write_text("api_key: of-the-clients\nenv: {HF_TOKEN: of-the-hub, A: 'a$b'}\n")
    result = run("compose", str(deployment), "--assume", "cpu")
    assert result.exit_code == 0, result.output
    assert "of-the-" not in result.output
    file = yaml.safe_load(result.stdout)
    assert file["services"]["router"]["environment"]["PDLAUNCH_API_KEY"] == "${PDLAUNCH_API_KEY:?}"
    assert file["services"]["decode-0"]["environment"]["HF_TOKEN"] == "${HF_TOKEN:?}"
    # Compose reads a dollar as the beginning of a variable.
    assert "a$$b" in file["configs"]["deployment"]["content"]
    folder = tmp_path / "secrets"
    result = run("compose", str(deployment), "--assume", "cpu", "--secrets", str(folder))
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    names = {name: folder / name for name in file["secrets"]}
    assert set(folder.iterdir()) == set(names.values())
    assert {stat.S_IMODE(path.stat().st_mode) for path in names.values()} == {0o600}
