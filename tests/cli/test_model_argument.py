"""``pdlaunch serve MODEL``: the argument is a model or a file, and models come from a hub."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from pdlaunch import api
from pdlaunch.errors import StartupError
from tests import command_line
from tests.checks.contexts import TINY
from tests.config.model_files.fake_hub import COMMIT, fake_hub
from tests.config.model_files.files import cached_model, tiny_model, write_safetensors

NAME = "org/tiny"
WEIGHTS = "model.safetensors"
Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments: str, columns: int = 200) -> Result:
        environ = {"COLUMNS": str(columns), "NO_COLOR": "1", "TERM": "dumb"}
        result = command_line.invoke(arguments, env=environ)
        assert result.exception is None or isinstance(result.exception, SystemExit)
        return result

    return invoke


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    folder = cached_model(tmp_path / "hub", NAME)
    for place in (folder, tmp_path / "local", tmp_path / "smollm2"):
        tiny_model(place)
    return folder


@pytest.mark.parametrize(
    ("model", "name"),
    [(NAME, NAME), ("local", "local"), ("./smollm2", "smollm2"), ("{tmp}/local", "local")],
)
def test_a_model_is_named_by_the_argument(
    run: Run, snapshot: Path, tmp_path: Path, model: str, name: str
) -> None:
    result = run("serve", model.format(tmp=tmp_path), "--dry-run", "--format", "json")
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    decode = plan["engines"]["decode"]
    folder = snapshot if model == NAME else tmp_path / name
    assert (decode["served_model_name"], decode["model_dir"]) == (name, str(folder))


@pytest.mark.parametrize("file", ["deploy.yml", "DEPLOY.YAML", "deploy.json"])
def test_a_file_of_settings_is_told_by_its_ending(
    run: Run, snapshot: Path, tmp_path: Path, file: str
) -> None:
    (tmp_path / file).write_text('{"model": "local", "block_size": 32}')

    def read(*flags: str) -> dict[str, object]:
        result = run("check-config", file, *flags, "--format", "json")
        return json.loads(result.stdout)["resolved"]["config"]

    assert (read()["model"], read()["block_size"]) == ("local", 32)
    # A model beside the file is a flag, which wins.
    assert read("--model", NAME)["model"] == NAME


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (("serve", NAME, "--model", "local"), 2, "given twice: org/tiny and --model local"),
        (("serve", "no.yaml"), 2, "no.yaml: cannot be read: no such file"),
        (("serve", "notes.txt", "--dry-run"), 2, "settings ends in .yaml, .yml or .json"),
        (("check-config", "smolm2"), 1, "Did you mean smollm2?"),
        (("check-config", "org/other"), 1, "HF_HUB_OFFLINE forbids downloads"),
        (("serve", "org/other"), 2, "HF_HUB_OFFLINE forbids downloads"),
        (("check-config", "../../etc/passwd"), 1, "no such directory or file exists"),
        (("check-config", f"https://hub.example/{NAME}"), 1, "as ORG/NAME, without the address"),
        (("serve", NAME, "--revision", "../../x"), 2, "must be a branch, a tag or a commit"),
        (("check-config", "local", "--revision", "main"), 1, "is for models of a hub"),
    ],
)
def test_what_cannot_be_meant_is_explained(
    run: Run, snapshot: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, expected: str
) -> None:
    (tmp_path / "notes.txt").touch()
    (tmp_path / "deploy.yaml").touch()
    result = run(*arguments, columns=60)
    assert result.exit_code == code, result.output
    # A narrow terminal may break a line after any character.
    text = re.sub(r"[\s│╭╮╰╯─]", "", result.output)
    assert re.sub(r"\s", "", expected) in text


def test_a_deployment_of_a_command_gets_the_model(
    run: Run, snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []

    def refuse(arguments: list[str], **_: object) -> None:
        started.append(json.loads(Path(arguments[0]).read_text())["model"])
        raise StartupError("enough")

    monkeypatch.setattr(api, "running_deployment", refuse)
    assert run("bench", "serve", NAME).exit_code == 1
    assert started == [NAME]


@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_an_interrupted_download_leaves_what_is_complete_and_no_more(
    tmp_path: Path, number: signal.Signals
) -> None:
    published = tmp_path / "published"
    published.mkdir()
    (published / "config.json").write_text(json.dumps(TINY))
    write_safetensors(published / WEIGHTS, num_bytes=100_000)
    environ = {name: value for name, value in os.environ.items() if name[:3] not in ("HF_", "PDL")}
    with fake_hub(NAME, published) as hub:
        hub.hold = {WEIGHTS: threading.Event()}
        environ |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(
            [sys.executable, "-m", "pdlaunch", "serve", NAME, "--port", "0"],
            env=environ | {"PYTHONPATH": ":".join(sys.path), "COLUMNS": "60"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        with process:
            assert process.stdout is not None
            # Small files come first.
            while not any(each.startswith("GET") and WEIGHTS in each for each in hub.requests):
                assert process.poll() is None, process.stdout.read()
                threading.Event().wait(0.02)
            process.send_signal(number)
            output = process.stdout.read()
        assert process.returncode == 128 + number
        assert f"downloading {NAME}" in output
        assert "Traceback" not in output
    repository = tmp_path / "hub" / "models--org--tiny"
    assert [path.name for path in (repository / "snapshots" / COMMIT).iterdir()] == ["config.json"]
    assert not list(repository.rglob("*.incomplete"))
