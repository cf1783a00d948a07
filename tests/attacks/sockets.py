"""All doors of a launch: which sockets listen, what they say to a stranger, and what another user
can read.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.attacks.target import Target
from tests.attacks.verdict import Verdict
from tests.e2e.listening import all_processes, tcp_listeners

STRANGER_UID = 65534
SHARED_MEMORY = "/dev/shm/"
ROUTER_OPEN = (
    "POST /v1/completions",
    "POST /v1/chat/completions",
    "GET /v1/models",
    "POST /tokenize",
    "POST /detokenize",
)
"""What clients of a router without an API key may do."""


def sockets(target: Target, verdict: Verdict) -> None:
    """Every listening socket answers strangers with a refusal; nothing of the launch can be read by
    another user.
    """
    listening = tcp_listeners(target.deployment)
    is_other = False
    router_port = int(target.router.rpartition(":")[2])
    asked: dict[str, list[Any]] = {
        "tcp": sorted(listening),
        "unix": sorted(unix_sockets(target)),
        "files": sorted(shared_files(target)),
        "pids": [process.pid for process in target.processes().values()],
    }
    for path in asked["files"]:
        mode = Path(path).stat().st_mode & 0o777
        if mode & 0o077:
            verdict.broke("shared memory is its user's alone", f"{path} has mode {mode:o}")
    for port, (name, address) in sorted(listening.items()):
        if address not in ("127.0.0.1", "::1"):
            verdict.broke("sockets listen on loopback", f"{name} listens on {address}:{port}")
    for found in stranger(asked):
        if "uid" in found:
            is_other = found["uid"] != os.getuid()
            verdict.row(
                "stranger",
                f"user id {found['uid']}" + ("" if is_other else ", as no other can be had"),
            )
        elif "port" in found:
            name = listening[found["port"]][0]
            judge_port(verdict, name, found, is_router=found["port"] == router_port)
        elif is_other and found["got"].startswith(("read", "let in")):
            verdict.broke("other users get nothing", f"{found}")
    verdict.row(
        "sockets in files, shared memory", f"{len(asked['unix'])} and {len(asked['files'])}"
    )


def judge_port(verdict: Verdict, name: str, found: dict[str, Any], *, is_router: bool) -> None:
    """A TCP port speaks HTTP and asks for a key, or ZMQ with CURVE; anything else is a door without
    a lock.
    """
    port = found["port"]
    if "statuses" in found:
        opened = {
            request: status
            for request, status in found["statuses"].items()
            if status not in (401, 403, 404, 405) and not (is_router and request in ROUTER_OPEN)
        }
        harmless = {"GET /metrics", "GET /pdlaunch/status"} if is_router else set()
        for request in sorted(set(opened) - harmless):
            verdict.broke(
                "engines and commands need a key",
                f"{name}, port {port}: {request} without a key: {opened[request]}",
            )
        verdict.row(
            f"{name}, {port}", "HTTP", f"statuses {sorted(set(found['statuses'].values()))}"
        )
    elif b"CURVE" in bytes.fromhex(found.get("zmq", "")):
        verdict.row(f"{name}, {port}", "ZMQ with CURVE")
    else:
        verdict.broke(
            "no socket listens without authentication", f"{name} listens on port {port}: {found}"
        )


def unix_sockets(target: Target) -> set[str]:
    """Paths of the launch's Unix sockets; abstract ones begin with @."""
    return {
        str(connection.laddr)
        for process in all_processes(target.deployment).values()
        for connection in process.net_connections(kind="unix")
        if connection.laddr
    }


def shared_files(target: Target) -> set[str]:
    """Named shared memory that the processes have mapped."""
    found = set()
    for process in target.processes().values():
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines():
                path = line[73:].strip()
                if path.startswith(SHARED_MEMORY) and not path.endswith("(deleted)"):
                    found.add(path)
    return found


def stranger(asked: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """What ``stranger.py`` prints, as another user where this one may become it."""
    # Another user need not be able to read this folder.
    code = Path(__file__).with_name("stranger.py").read_text()
    command = [_python(), "-I", "-c", code]
    if os.getuid() == 0 and (setpriv := shutil.which("setpriv")):
        ids = (f"--reuid={STRANGER_UID}", f"--regid={STRANGER_UID}", "--clear-groups")
        command = [setpriv, *ids, *command]
    said = subprocess.check_output(
        command, input=json.dumps(asked), text=True, timeout=300, cwd="/"
    )
    return [json.loads(line) for line in said.splitlines()]


def _python() -> str:
    """The interpreter itself: a virtual environment may lie where others cannot read."""
    return str(Path(sys.executable).resolve())
