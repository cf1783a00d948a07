"""Examples are configurations without errors; the workflow, the Dockerfile and the README's first
lines say what is true.
"""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from pdlaunch.config.model_files.find import ALIASES
from pdlaunch.config.sources import load_config
from tests.command_line import invoke
from tools.install import DEMO_MODEL

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


@pytest.mark.parametrize("document", ["README.md", "docs/connectors.md"])
def test_configurations_in_the_documents_can_be_read(document: str, tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        path = tmp_path / "deploy.yaml"
        path.write_text(block)
        load_config(path, {}, {})


@pytest.mark.processes
def test_the_workflow_runs_from_its_configuration_to_the_check(tmp_path: Path) -> None:
    workflow = yaml.safe_load((EXAMPLES / "github-actions.yml").read_text())
    steps = [step["run"] for step in workflow["jobs"]["pd"]["steps"] if "run" in step]
    _, *configure_and_check, serve = steps
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "PDLAUNCH_PORT": "0",  # 8000 may be busy here
    }
    for script in configure_and_check:
        command = ["bash", "-e", "-c", script]
        subprocess.run(command, cwd=tmp_path, env=environment, timeout=180, check=True)
    (file,) = tmp_path.iterdir()
    # The launch itself is what tests/e2e/test_surroundings.py does with another model.
    *command, config = shlex.split(serve)[1:4]
    assert (command, config) == (["bench", "serve"], file.name)
    flags = shlex.split(serve)[4:]
    told = invoke(["bench", "serve", "--help-all"]).stdout
    assert {flag for flag in flags if flag.startswith("--")} <= set(re.findall(r"--[\w-]+", told))


def installed_in(text: str) -> tuple[set[str], set[str]]:
    extras = re.findall(r"(?:\.|\.whl\))\[([\w,]+)\]", text)
    return {e for group in extras for e in group.split(",")}, set(re.findall(r"\S+==\S+", text))


@pytest.mark.parametrize("name", ["examples/github-actions.yml", "Dockerfile"])
def test_what_is_installed_exists(name: str) -> None:
    text = (ROOT / name).read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras, pinned = installed_in(text)
    assert "gguf" in extras <= set(project["optional-dependencies"])
    assert pinned == {ALIASES["smollm2"][1]} == {DEMO_MODEL}
    assert "--constraint constraints.txt" in text


def test_the_image_gets_the_files_that_it_copies() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    sent = {
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    copied = {
        source
        for line in re.findall(r"^COPY (?!--from)(.+)$", dockerfile, re.MULTILINE)
        for source in line.split()[:-1]
    }
    assert copied == sent
    assert all((ROOT / source).exists() for source in copied)
    targets = set(re.findall(r"^FROM \S+ AS (\w+)$", dockerfile, re.MULTILINE))
    page = (ROOT / "docs" / "first_hour.md").read_text()
    assert set(re.findall(r"--target (\w+)", dockerfile + page)) == {"cpu", "cuda"} <= targets
