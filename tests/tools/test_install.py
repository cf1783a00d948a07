"""What `make` says while it installs, and what each target installs."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools import install

ROOT = Path(__file__).parents[2]
WITHOUT_GPU = pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="this machine has a GPU")


def make(*arguments: str, environment: dict[str, str] | None = None) -> tuple[int, str]:
    """Run make as a user without settings of pip or of an outer make; return exit code, output."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PIP_", "UV_", "MAKE", "MFLAGS"))
    }
    result = subprocess.run(
        ["make", *arguments],
        cwd=ROOT,
        env={**inherited, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
        check=False,
    )
    return result.returncode, result.stdout


@pytest.mark.processes
def test_each_target_installs_what_it_needs(tmp_path: Path) -> None:
    fresh = f"VENV={tmp_path / 'venv'}"
    for target, tools in (("serve", False), ("install", False), ("test", True), ("lint", True)):
        code, plan = make("--dry-run", fresh, target)
        assert code == 0, plan
        assert "install.py runtime 'gguf'" in plan
        assert ("install.py dev" in plan) is tools, target


@pytest.mark.processes
@pytest.mark.parametrize("version", ["3.10.13", None])
def test_another_python_is_refused_before_anything_is_installed(
    version: str | None, tmp_path: Path
) -> None:
    python = tmp_path / "python3"
    if version is not None:
        told = (
            f"import sys; sys.version = {version!r}; sys.version_info = (3, 10); exec(sys.argv[1])"
        )
        python.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{told}" "$2"\n')
        python.chmod(0o755)
    code, said = make("serve", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}")
    assert code == 2
    assert f"needs Python 3.11 or newer; {python} is {version or 'missing'}\n" in said
    assert "fix: make serve PYTHON=python3.11\n" in said
    assert not (tmp_path / "venv").exists()


@pytest.mark.processes
@pytest.mark.parametrize(
    ("variable", "named", "fix"),
    [
        ("PIP_INDEX_URL", "http://127.0.0.1:9/whl", "PIP_INDEX_URL"),
        ("PIP_EXTRA_INDEX_URL", "http://127.0.0.1:9/whl", "PIP_INDEX_URL"),
        pytest.param("HTTPS_PROXY", install.CPU_INDEX, "EXTRAS=gguf,cuda", marks=WITHOUT_GPU),
    ],
)
def test_an_index_that_does_not_answer_is_named_and_nothing_is_installed(
    variable: str, named: str, fix: str, tmp_path: Path
) -> None:
    environ = {variable: "http://127.0.0.1:9/whl", "PIP_RETRIES": "0", "UV_HTTP_RETRIES": "0"}
    environ |= {"PIP_CONFIG_FILE": os.devnull, "PATH": "/usr/bin:/bin"}
    if variable != "PIP_INDEX_URL":
        uv = shutil.which("uv") or str(Path(sys.prefix) / "bin" / "uv")
        (tmp_path / "uv").symlink_to(uv)
        environ["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    code, said = make(
        "serve", f"PYTHON={sys.executable}", f"VENV={tmp_path / 'venv'}", environment=environ
    )
    assert code == 2
    assert named in said
    assert len(re.findall("^error:", said, re.MULTILINE)) <= 2  # uv's or pip's, and ours
    assert re.search(f"fix: .*{fix}", said)
    assert "[2/3]" not in said
    assert not list((tmp_path / "venv").glob(".installed*"))


def test_uv_gets_the_settings_of_pip() -> None:
    listed = "\n".join(
        (
            "global.extra-index-url='http://a/simple\\nhttp://b/simple'",
            "global.index-url='http://c/simple'",
            "global.no-color='true'",
            ":env:.index-url='http://d/simple'",
            ":env:.find-links='/wheels /more'",
        )
    )
    assert install.environment(listed, {"UV_INDEX": "http://e/simple"}) == {
        "UV_DEFAULT_INDEX": "http://d/simple",
        "UV_FIND_LINKS": "/wheels,/more",
        "UV_INDEX": "http://e/simple",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
    }
    assert install.environment(listed, {})["UV_INDEX"] == "http://a/simple http://b/simple"


@WITHOUT_GPU
def test_without_a_gpu_the_cpu_build_is_taken_unless_a_variable_names_an_index() -> None:
    assert install.CPU_INDEX in install.torch_index("gguf", {})
    assert install.torch_index("gguf,cuda", {}) == []
    assert install.torch_index("gguf", {"UV_INDEX": "http://mine"}) == []


def test_an_environment_that_was_moved_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs: list[str] = []
    monkeypatch.setattr(install, "run_steps", lambda what, extras: not runs.append(what))
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "venv"))
    (tmp_path / "venv").mkdir()
    install.main(["runtime", "gguf"])
    (tmp_path / "venv").rename(tmp_path / "moved")
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "moved"))
    assert install.main(["runtime", "gguf"]) == 1
    said = capsys.readouterr().err
    assert f"was made in {tmp_path / 'venv'}, and does not work elsewhere" in said
    assert "fix: make clean" in said
    assert len(runs) == 1
