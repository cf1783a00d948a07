"""Conversion into the cache: once, whole or not at all."""

import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pdlaunch.config.model_files.find import resolve_model
from pdlaunch.config.model_files.weights import DOWNLOAD_AGAIN
from pdlaunch.engine.models.attention import ReportProgress
from pdlaunch.engine.models.convert import ensure_converted, main
from pdlaunch.errors import ConfigError
from tests.config.model_files.files import tiny_gguf


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

    def __call__(self, source: Path, target: Path, progress: ReportProgress) -> None:
        self.calls += 1
        (target / "config.json").write_text("{}")
        self.half_done.set()
        assert self.go_on.wait(180)
        (target / "model.safetensors").write_text(source.name)


def quiet(text: str, fraction: float | None) -> None:
    pass


def test_two_launches_convert_once_and_never_see_half_of_it(source: str) -> None:
    convert, found = FakeConverter(), []
    threads = [
        threading.Thread(
            target=lambda: found.append(ensure_converted(source, quiet, convert=convert))
        )
        for _ in range(2)
    ]
    threads[0].start()
    assert convert.half_done.wait(180)
    threads[1].start()
    assert not resolve_model(source).ready
    convert.go_on.set()
    for thread in threads:
        thread.join(180)
    assert convert.calls == 1
    assert found == [resolve_model(source).cache_dir] * 2
    assert (found[0] / "model.safetensors").read_text() == "tiny.gguf"


def test_failed_and_killed_conversions_leave_nothing_and_can_be_repeated(source: str) -> None:
    def fail(source: Path, target: Path, progress: ReportProgress) -> None:
        (target / "config.json").write_text("{}")
        raise ConfigError("broken")

    target = resolve_model(source).cache_dir
    (target.parent / f".{target.name}-of-one-that-was-killed").mkdir(parents=True)
    with pytest.raises(ConfigError, match="broken"):
        ensure_converted(source, quiet, convert=fail)
    assert [entry for entry in target.parent.iterdir() if entry.is_dir()] == []
    convert = FakeConverter()
    convert.go_on.set()
    assert ensure_converted(source, quiet, convert=convert).is_dir()


UP_PROJ = "blk.1.ffn_up.weight"


def spoil_number(made: Any) -> None:
    shape, numbers = made.tensors[UP_PROJ]
    made.tensors[UP_PROJ] = shape, [*numbers[:-1], math.inf]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (spoil_number, "up_proj.weight holds numbers that are not finite"),
        (
            lambda made: made.tensors.pop(UP_PROJ),
            "1 missing, model.layers.1.mlp.up_proj.weight among them",
        ),
        (
            lambda made: made.tensors.update({"blk.1.attn_q.weight": ((32, 16), [0.0] * 512)}),
            "1 mismatched, model.layers.1.self_attn.q_proj.weight among them",
        ),
        (
            lambda made: made.values.update({"general.architecture": "walrus"}),
            "architecture walrus is not supported",
        ),
        (
            lambda made: made.values.update({"tokenizer.ggml.merges": ["no such", "tokens here"]}),
            "cannot be converted: ",
        ),
    ],
)
def test_what_cannot_be_converted_is_one_line_with_a_fix(
    spoil: Callable[[Any], None], said: str, source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tiny_gguf()
    spoil(made)
    made.write(Path(source))
    assert main([source]) == 1
    told = capsys.readouterr().err
    assert said in told
    assert "Traceback" not in told
    assert [line.split(": ")[0] for line in told.splitlines()[-2:]] == ["error", "fix"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"<html>", "is damaged: it is not a GGUF file but an HTML"),
        *((tiny_gguf().encode()[:size], "cannot be converted: ") for size in (4, 600, 20_000, -1)),
    ],
    ids=["html", "4", "600", "20000", "all but a byte"],
)
def test_a_file_that_is_damaged_is_one_line_with_a_fix(
    content: bytes, said: str, source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(source).write_bytes(content)
    assert main([source]) == 1
    captured = capsys.readouterr()
    *_, error, fix = captured.err.splitlines()
    assert error.startswith(f"error: {source} {said}")
    assert fix.endswith(DOWNLOAD_AGAIN)
    assert ("loading libraries" in captured.out) == (content != b"<html>")
