"""Names of models on a hub, and what is read of the cache without asking any network."""

from __future__ import annotations

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

COMMIT = "a" * 40


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # The library reads the variables when it is imported.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("PDLAUNCH_CACHE", str(tmp_path / "pdlaunch"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def put(cache: Path, name: str, commit: str = COMMIT, revision: str = "main") -> Path:
    """A model in the cache, as huggingface_hub lays it out."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    ref = repository / "refs" / revision
    ref.parent.mkdir(parents=True, exist_ok=True)
    ref.write_text(commit)
    return snapshot


@pytest.mark.parametrize(
    "name",
    [
        "smollm2",
        "a/b/c",
        "/etc/passwd",
        "./a",
        "../a",
        "a/..",
        "a/b..c",
        "a--b/c",
        "~/a",
        "a/model.gguf",
        "a/b.YAML",
        "a/b\n",
        "a/",
        "/b",
        "a b/c",
        "ä/b",
        "a/b\0",
        "-a/b",
    ],
)
def test_paths_and_other_texts_are_no_names_of_a_hub(name: str) -> None:
    assert not is_hub_name(name)


@given(st.text(st.sampled_from("aZ0.-_/~\\\0\n "), max_size=20))
def test_no_name_leads_out_of_the_cache(name: str) -> None:
    if is_hub_name(name):
        folder = f"models--{name.replace('/', '--')}"
        assert Path(folder).name == folder
        assert ".." not in folder


@given(st.text(st.sampled_from("aZ0.-_/~\\\0\n "), max_size=20))
def test_no_revision_leads_out_of_the_cache(revision: str) -> None:
    try:
        TypeAdapter(Revision).validate_python(revision)
    except ValidationError:
        return
    assert not Path(revision).is_absolute()
    assert ".." not in Path(revision).parts


def test_a_model_in_the_cache_is_found_by_branch_and_commit(cache: Path) -> None:
    main = put(cache, "org/tiny")
    other = put(cache, "org/tiny", "b" * 40, "refs/pr/1")
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
