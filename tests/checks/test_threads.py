"""Configurations from public threads and guides, judged as `check-config --assume` judges them."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import yaml

from tests.command_line import invoke

THREADS = Path(__file__).parent / "threads"
BROKEN, HEALTHY = (sorted((THREADS / kind).glob("*.yaml")) for kind in ("broken", "healthy"))
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working directory with the descriptions of models, which are found there by name."""
    folder = tmp_path_factory.mktemp("threads")
    for name, config in yaml.safe_load((THREADS / "models.yaml").read_text()).items():
        (folder / name).mkdir(parents=True)
        size = config.pop("total_size", None)
        (folder / name / "config.json").write_text(json.dumps(config))
        if size is not None:
            index = {"metadata": {"total_size": size}, "weight_map": {}}
            (folder / name / INDEX).write_text(json.dumps(index))
    return folder


@pytest.fixture
def check(folder, monkeypatch):
    """Return what is found in a thread's configuration: severities by rule."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(folder / "empty"))

    def check(thread):
        (folder / "deploy.yaml").write_text(yaml.safe_dump(thread["config"]))
        command = ["check-config", "deploy.yaml", "--assume", thread["machine"], "--format", "json"]
        result = invoke(command)
        assert result.exit_code in (0, 1), result.output
        return {each["rule"]: each["severity"] for each in json.loads(result.stdout)["findings"]}

    return check


def read(path):
    return yaml.safe_load(path.read_text())


def merged(old, new):
    """Return a value with the entries of another one; None removes an entry."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return new
    both = old | {name: merged(old.get(name), value) for name, value in new.items()}
    return {name: value for name, value in both.items() if value is not None}


FIXED = [path for path in BROKEN if "fixed" in read(path)]
EXPECTED = {thread["expect"] for path in BROKEN if "expect" in (thread := read(path))}


@pytest.mark.parametrize("path", BROKEN, ids=lambda path: path.stem)
def test_what_broke_is_found(path, check):
    thread = read(path)
    assert re.fullmatch(r"[\w.-]+/[\w.-]+#\d+", thread["source"])
    assert thread.get("missed") or thread["expect"] in check(thread)


@pytest.mark.parametrize("path", FIXED, ids=lambda path: path.stem)
def test_what_was_repaired_is_not_found(path, check):
    thread = read(path)
    found = check(merged(thread, thread["fixed"]))
    assert thread["expect"] not in found
    assert "error" not in found.values(), found


@pytest.mark.parametrize("path", HEALTHY, ids=lambda path: path.stem)
def test_what_works_is_not_refused(path, check):
    found = check(read(path))
    assert "error" not in found.values(), found
    assert not EXPECTED & found.keys()  # what is said of every launch catches nothing


def test_the_score_is_what_the_docs_say():
    caught = Counter("expect" in read(path) for path in BROKEN)
    num_new = sum(read(path)["opened"] > "2026-08-25" for path in BROKEN)
    page = (Path(__file__).parents[2] / "docs" / "checking.md").read_text()
    assert f"{caught[True]} of {len(BROKEN)}" in page
    assert f"none of {len(HEALTHY)}" in page
    assert f"{num_new} of them opened" in page
    assert f"{len(FIXED)} of these" in page
    assert num_new >= 10
    assert len(BROKEN) >= 30
    assert caught[True] >= 25
    assert len(HEALTHY) >= 30
