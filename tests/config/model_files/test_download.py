"""Downloads by the real library, from a small hub of our own."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pdlaunch.config.model_files.download import fetch_part
from pdlaunch.config.model_files.find import cached_snapshot
from pdlaunch.config.model_files.weights import weight_files
from pdlaunch.errors import ConfigError
from tests.config.model_files.fake_hub import COMMIT, TOKEN, FakeHub, fake_hub
from tests.config.model_files.files import write_safetensors

pytestmark = pytest.mark.processes

NAME = "org/tiny"
DESCRIPTION = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
INDEX = "model.safetensors.index.json"
SHARDS = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
NOT_NEEDED = (
    "pytorch_model.bin",
    "consolidated.safetensors",
    "README.md",
    "onnx/model.safetensors",
    "onnx/config.json",
    "model.fp16.safetensors",
)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub with a model of two shards, and an empty cache for it."""
    folder = tmp_path / "published"
    folder.mkdir()
    for name in DESCRIPTION:
        (folder / name).write_text("{}")
    for name in NOT_NEEDED:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("not needed")
    for name in SHARDS:
        write_safetensors(folder / name, num_bytes=300_000)
    first, second = sorted(SHARDS)
    (folder / INDEX).write_text(f'{{"weight_map": {{"a": "{first}", "b": "{second}"}}}}')
    with fake_hub(NAME, folder) as served:
        use(monkeypatch, tmp_path, served.url)
        yield served


def use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, url: str) -> None:
    """Have this process and its children use the hub at ``url`` and a cache of the test."""
    for name in [name for name in os.environ if name.startswith("HF_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))


def download() -> None:
    fetch_part(NAME, None, "description")
    fetch_part(NAME, None, "weights")


def files_in_cache() -> set[str]:
    return {path.name for path in cached_snapshot(NAME, None).rglob("*")}


def test_the_files_that_are_read_are_downloaded_and_no_others(hub: FakeHub) -> None:
    fetch_part(NAME, None, "description")
    assert files_in_cache() == DESCRIPTION | {INDEX}
    download()
    assert files_in_cache() == DESCRIPTION | {INDEX} | SHARDS
    assert len(weight_files(cached_snapshot(NAME, None))) == 2

    # What is there is not asked for again.
    before = len(hub.requests)
    download()
    asked = [
        path for _, path, _ in hub.requests[before:] if path.startswith((f"/{NAME}", "/api/m"))
    ]
    assert asked == [f"/api/models/{NAME}/revision/main"]


def test_offline_asks_nobody(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    download()
    assert not hub.requests


def test_a_connection_that_breaks_off_is_taken_up_again(hub: FakeHub) -> None:
    shard = min(SHARDS)
    hub.break_after[shard] = 100_000
    download()
    assert hub.asked().count(shard) == 2
    assert (cached_snapshot(NAME, None) / shard).read_bytes() == (hub.folder / shard).read_bytes()


def test_two_launches_at_once_download_each_file_once(hub: FakeHub) -> None:
    hub.hold = {min(SHARDS): threading.Event()}
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(download) for _ in range(2)]
        # Both are under way before the first of them can be through.
        while sum("/revision/" in path for _, path, _ in hub.requests) < 2:
            assert not any(launch.done() for launch in both)
        hub.hold[min(SHARDS)].set()
        for launch in both:
            launch.result()
    shards = [name for name in hub.asked() if name in SHARDS]
    assert sorted(shards) == sorted(SHARDS)
    assert len(weight_files(cached_snapshot(NAME, None))) == 2


def test_a_token_opens_a_private_model(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.needs_token = True
    with pytest.raises(ConfigError, match="or it is private") as caught:
        download()
    assert "HF_TOKEN" in str(caught.value.fix)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    fetch_part(NAME, None, "description")
    assert files_in_cache() == DESCRIPTION | {INDEX}


def test_a_commit_is_served_though_main_has_moved_on(hub: FakeHub) -> None:
    hub.revisions = {"v1": COMMIT}
    with pytest.raises(ConfigError, match="has no revision main") as caught:
        download()
    assert (caught.value.field, caught.value.value) == ("revision", "main")
    fetch_part(NAME, "v1", "description")
    assert cached_snapshot(NAME, "v1").name == COMMIT


@pytest.mark.parametrize(
    ("has", "gone", "expected"),
    [
        ("model.Q4.gguf", "config.json", "hf download org/tiny FILE.gguf"),
        ("pytorch_model.bin", INDEX, "published as safetensors"),
    ],
)
def test_a_model_in_another_form_says_what_it_has(
    hub: FakeHub, has: str, gone: str, expected: str
) -> None:
    (hub.folder / has).write_text("x")
    for name in (gone, *SHARDS, "model.fp16.safetensors"):
        (hub.folder / name).unlink()
    with pytest.raises(ConfigError) as caught:
        download()
    assert has in str(caught.value)
    assert expected in str(caught.value.fix)


def test_an_index_chooses_no_files_of_this_machine(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "secret.safetensors").write_text("x")
    (hub.folder / INDEX).write_text('{"weight_map": {"a": "../../secret.safetensors"}}')
    with pytest.raises(ConfigError, match="outside of its folder"):
        download()


def test_a_hub_that_is_gone_is_named_and_what_is_in_the_cache_is_served(
    tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"127\.0\.0\.1:9 cannot be reached") as caught:
        download()
    assert "HF_ENDPOINT" in str(caught.value.fix)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    download()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    download()
    assert files_in_cache() == DESCRIPTION | {INDEX} | SHARDS


def test_the_command_line_imports_no_library_that_downloads() -> None:
    code = (
        "import sys, pdlaunch.cli.serve, pdlaunch.launch.supervisor;"
        "print([m for m in ('torch', 'huggingface_hub.file_download', 'tqdm') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
