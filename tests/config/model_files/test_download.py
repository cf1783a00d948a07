"""Downloads by the real library, from a small hub of our own."""

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdlaunch.config.model_files.download import _explain, fetch_part
from pdlaunch.config.model_files.find import cached_snapshot
from pdlaunch.config.model_files.shape import INDEX
from pdlaunch.config.model_files.weights import weight_files
from pdlaunch.config.models import LaunchConfig
from pdlaunch.errors import ConfigError
from pdlaunch.planning.models import read_models
from tests.checks.contexts import TINY
from tests.config.model_files.fake_hub import COMMIT, TOKEN, FakeHub, fake_hub
from tests.config.model_files.files import write_safetensors

pytestmark = pytest.mark.processes

NAME = "org/tiny"
DESCRIPTION = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
SHARDS = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
NOT_NEEDED = ("pytorch_model.bin", "README.md", "onnx/model.safetensors", "model.fp16.safetensors")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    folder = tmp_path / "published"
    (folder / "onnx").mkdir(parents=True)
    for name in DESCRIPTION:
        (folder / name).write_text("{}")
    for name in NOT_NEEDED:
        (folder / name).write_text("not needed")
    for name in SHARDS:
        write_safetensors(folder / name, num_bytes=300_000)
    first, second = sorted(SHARDS)
    (folder / INDEX).write_text(f'{{"weight_map": {{"a": "{first}", "b": "{second}"}}}}')
    with fake_hub(NAME, folder) as served:
        for name in [name for name in os.environ if name.startswith("HF_")]:
            monkeypatch.delenv(name)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_ENDPOINT", served.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        cache = str(tmp_path / "hf" / "hub")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", cache)
        yield served


def download() -> None:
    fetch_part(NAME, None, "description")
    fetch_part(NAME, None, "weights")


def files_in_cache() -> set[str]:
    return {path.name for path in cached_snapshot(NAME, None).rglob("*")}


def test_the_files_that_are_read_are_downloaded_and_no_others(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch_part(NAME, None, "description")
    assert files_in_cache() == DESCRIPTION | {INDEX}
    download()
    assert files_in_cache() == DESCRIPTION | {INDEX} | SHARDS
    assert len(weight_files(cached_snapshot(NAME, None))) == 2

    # What is there is not asked for again, and is served without the hub.
    before = len(hub.requests)
    download()
    asked = [each for each in hub.requests[before:] if "/org" in each]
    assert asked == [f"GET /api/models/{NAME}/revision/main"]
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    download()


def test_vllm_gets_all_files_but_weights_in_other_forms(hub: FakeHub) -> None:
    (hub.folder / "vocab.json").write_text("{}")
    fetch_part(NAME, None, "all")
    needed = SHARDS | {INDEX, "vocab.json", "README.md", "model.fp16.safetensors"}
    assert files_in_cache() == DESCRIPTION | needed


def test_the_hub_knows_the_size_of_weights_that_are_not_here(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (INDEX, "model.fp16.safetensors"):
        (hub.folder / name).unlink()
    (hub.folder / "config.json").write_text(json.dumps(TINY | {"num_local_experts": 4}))
    config = LaunchConfig(model=NAME, engine="vllm")

    def file_bytes() -> int | None:
        shape = read_models(config, fetch_part)["decode"].shape
        return shape.outline.file_bytes if shape and shape.outline else None

    assert file_bytes() == sum((hub.folder / name).stat().st_size for name in SHARDS)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert file_bytes() is None


def test_offline_asks_nobody(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    download()
    assert not hub.requests


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


@pytest.mark.parametrize("gone", ["config.json", INDEX])
def test_a_model_in_another_form_says_what_it_lacks(hub: FakeHub, gone: str) -> None:
    for name in (gone, *SHARDS, "model.fp16.safetensors"):
        (hub.folder / name).unlink()
    with pytest.raises(ConfigError, match=r"has no (config\.json|model\.safetensors)") as caught:
        download()
    assert "safetensors" in str(caught.value.fix)


def test_an_index_chooses_no_files_of_this_machine(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "secret.safetensors").write_text("x")
    (hub.folder / INDEX).write_text('{"weight_map": {"a": "../../secret.safetensors"}}')
    with pytest.raises(ConfigError, match="outside of its folder"):
        download()


def test_a_hub_that_is_gone_is_named(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"127\.0\.0\.1:9 cannot be reached") as caught:
        download()
    assert "HF_ENDPOINT" in str(caught.value.fix)


@pytest.mark.parametrize(
    ("number", "advice"),
    [(errno.EDQUOT, "Make room"), (errno.EROFS, "Set HF_HOME"), (errno.EIO, "Try again")],
)
def test_room_is_advised_where_there_is_none(number: int, advice: str) -> None:
    error = OSError(number, os.strerror(number))
    assert str(_explain(error, NAME, "main").fix).startswith(advice)
