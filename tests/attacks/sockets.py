"""All doors of a launch: which sockets listen, what they say to a stranger, and what another user
can read.
"""

import contextlib
import json
import os
import socket
from functools import partial
from pathlib import Path

from tests.attacks.target import Target
from tests.attacks.verdict import Verdict
from tests.e2e.listening import all_processes, speaks_curve, tcp_listeners
from tests.other_user import as_nobody

SHARED_MEMORY = "/dev/shm/"
OF_A_PROCESS = ("environ", "mem", "maps", "fd/0")
ROUTER_OPEN = (
    "POST /v1/completions",
    "POST /v1/chat/completions",
    "GET /v1/models",
    "POST /tokenize",
    "POST /detokenize",
    "GET /metrics",
    "GET /pdlaunch/status",
)
"""What clients of a router without an API key may do."""
REQUESTS = (
    *ROUTER_OPEN,
    "POST /pdlaunch/release",
    "GET /pdlaunch/integrity",
    "GET /pdlaunch/kv_events",
    "POST /sleep?level=9",
    "POST /wake_up?tags=none",
    "GET /is_sleeping",
)
BODY = {"prompt": "a", "max_tokens": 1, "tokens": [1], "request_id": "x"}
BODY |= {"messages": [{"role": "user", "content": "a"}]}


def sockets(target: Target, verdict: Verdict) -> None:
    """Every listening socket answers strangers with a refusal; nothing of the launch can be read by
    another user.
    """
    http_ports = {int(url.rpartition(":")[2]) for url in target.urls.values()}
    for port, (name, address) in sorted(tcp_listeners(target.deployment).items()):
        if address not in ("127.0.0.1", "::1"):
            verdict.broke("sockets listen on loopback", f"{name} listens on {address}:{port}")
        # A busy machine answers late.
        if port not in http_ports and not any(speaks_curve(port) for _ in range(5)):
            how = f"{name} listens on port {port}, and speaks neither HTTP nor ZMQ with CURVE"
            verdict.broke("no socket listens without authentication", how)
    for who in target.urls:
        judge_http(verdict, who, {each: status_of(target, who, each) for each in REQUESTS})
    unix, files = unix_sockets(target), shared_files(target)
    for path in files:
        mode = Path(path).stat().st_mode & 0o777
        if mode & 0o077:
            verdict.broke("shared memory is its user's alone", f"{path} has mode {mode:o}")
    if os.getuid() == 0:
        pids = [process.pid for process in target.living.values()]
        of_processes = {f"/proc/{pid}/{name}" for pid in pids for name in OF_A_PROCESS}
        for path, got in as_nobody(partial(try_all, unix, files | of_processes)).items():
            if got.startswith(("read", "let in")):
                verdict.broke("other users get nothing", f"{path}: {got}")
    verdict.row("sockets in files, shared memory", f"{len(unix)} and {len(files)}")


def status_of(target: Target, who: str, request: str) -> int:
    """The status of a request without any key."""
    method, path = request.split()
    body = json.dumps(BODY).encode() if method == "POST" else None
    return target.send(who, path, body, method=method, key="").status


def judge_http(verdict: Verdict, who: str, statuses: dict[str, int]) -> None:
    """Nothing opens without a key, but what a router without a key serves."""
    for request, status in statuses.items():
        is_open = who == "router" and request in ROUTER_OPEN
        if status not in (401, 403, 404, 405) and not is_open:
            verdict.broke(
                "engines and commands need a key", f"{who}: {request} without a key: {status}"
            )
    verdict.row(who, "HTTP", f"statuses {sorted(set(statuses.values()))}")


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
    for process in target.living.values():
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines():
                path = line[73:].strip()
                if path.startswith(SHARED_MEMORY) and not path.endswith("(deleted)"):
                    found.add(path)
    return found


def try_all(unix: set[str], files: set[str]) -> dict[str, str]:
    return {path: try_unix(path) for path in unix} | {path: try_file(path) for path in files}


def try_unix(path: str) -> str:
    """Whether somebody listens to us there; a socket in no folder is open to all, and whoever
    accepts has to ask who we are.
    """
    refusal = ""
    for kind in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET):
        with socket.socket(socket.AF_UNIX, kind) as connection:
            connection.settimeout(20)
            try:
                # A name that begins with @ is in no folder.
                connection.connect("\0" + path[1:] if path.startswith("@") else path)
                connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
                answer = connection.recv(64)
            except TimeoutError:
                return "let in"
            except OSError as error:
                refusal = type(error).__name__
                continue
            return f"let in, answered {answer.hex()}" if answer else "closed"
    return refusal


def try_file(path: str) -> str:
    try:
        with open(path, "rb") as file:  # noqa: PTH123 - no more than it needs
            return f"read {len(file.read(16))} bytes"
    except OSError as error:
        return type(error).__name__
