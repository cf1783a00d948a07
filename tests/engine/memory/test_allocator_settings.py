from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field

import pytest

from pdlaunch.engine.memory.pools import expandable_segments_off


@dataclass
class FakeSettings:
    text: str
    written: list[str] = field(default_factory=list)

    def read(self) -> str:
        return self.text

    def write(self, text: str) -> None:
        self.text = text
        self.written.append(text)


@pytest.mark.parametrize(
    "text", ["", "max_split_size_mb:64", "expandable_segments:True,expandable_segments:False"]
)
def test_settings_without_expandable_segments_are_not_touched(text: str) -> None:
    settings = FakeSettings(text)
    with expandable_segments_off(settings):
        pass
    assert not settings.written


def test_the_whole_setting_is_kept_inside_and_restored_after_an_error() -> None:
    text = "max_split_size_mb:64,expandable_segments:True"
    settings = FakeSettings(text)
    with pytest.raises(ZeroDivisionError), expandable_segments_off(settings):
        raise ZeroDivisionError
    assert settings.written == [f"{text},expandable_segments:False", text]


@pytest.mark.parametrize("variable", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
@pytest.mark.processes
def test_torch_reads_and_takes_the_settings(variable: str) -> None:
    text = "max_split_size_mb:64,expandable_segments:True"
    code = """
import json
from pdlaunch.engine.memory.pools import (
    TorchAllocatorSettings,
    expandable_segments_off,
)
settings = TorchAllocatorSettings()
seen = [settings.read()]
with expandable_segments_off(settings):
    seen.append(settings.read())
print(json.dumps([*seen, settings.read()]))
"""
    environ = {variable: text, "PATH": "/usr/bin:/bin"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == [text, f"{text},expandable_segments:False", text]
