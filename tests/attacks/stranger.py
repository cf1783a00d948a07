# ruff: noqa: T201 - a script
"""Run as another user: tries sockets, files and processes of a launch, and prints what it got in,
as JSON lines.

It uses nothing but the standard library and nothing of this project.
Standard input: a JSON object with ``tcp`` (ports), ``unix`` and ``files`` (paths), and ``pids``.
"""

import http.client
import json
import os
import socket
import sys

UCX_MAGIC = bytes.fromhex("78563412bebafeca")
ZMQ_GREETING = b"\xff" + b"\0" * 8 + b"\x7f\x03\x00"
"""Up to the version: who hears more would hang up over the mechanism, and what it said would be
lost.
"""
FIRST_WORDS = {
    "zmq": ZMQ_GREETING,
    "ucx": UCX_MAGIC,
    "http": b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
}
OF_A_PROCESS = ("environ", "mem", "maps", "fd/0")
REQUESTS = """\
POST /v1/completions
POST /v1/chat/completions
GET /v1/models
POST /tokenize
POST /detokenize
GET /metrics
POST /pdlaunch/release
GET /pdlaunch/integrity
GET /pdlaunch/kv_events
POST /sleep?level=9
POST /wake_up?tags=none
GET /is_sleeping
GET /pdlaunch/status
""".splitlines()
BODY = (
    b'{"prompt":"a","max_tokens":1,"tokens":[1],"request_id":"x",'
    b'"messages":[{"role":"user","content":"a"}]}'
)


def speaks(port: int, first: bytes) -> str:
    """What comes back in a while, in hexadecimal."""
    answer = b""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        # A busy machine lets HTTP and ZMQ take their time; to UCX's word most doors say nothing.
        connection.settimeout(1 if first == UCX_MAGIC else 10)
        connection.sendall(first)
        try:
            while len(answer) < 64 and (piece := connection.recv(64)):
                answer += piece
        except OSError:
            pass
    return answer.hex()


def try_http(port: int) -> dict[str, int]:
    """Statuses of requests without any key."""
    found = {}
    headers = {"Content-Type": "application/json"}
    for request in REQUESTS:
        method, path = request.split()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        try:
            connection.request(method, path, BODY if method == "POST" else None, headers)
            found[request] = connection.getresponse().status
        except (OSError, http.client.HTTPException):
            found[request] = 0
        finally:
            connection.close()
    return found


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


def main() -> None:
    asked = json.load(sys.stdin)
    print(json.dumps({"uid": os.getuid()}))
    for port in asked["tcp"]:
        try:
            answer = {name: speaks(port, first) for name, first in FIRST_WORDS.items()}
        except OSError as error:
            answer = {"error": type(error).__name__}
        if bytes.fromhex(str(answer.get("http", ""))).startswith(b"HTTP/1."):
            answer["statuses"] = try_http(port)
        print(json.dumps({"port": port, **answer}))
    for path in asked["unix"]:
        print(json.dumps({"unix": path, "got": try_unix(path)}))
    own = [f"/proc/{pid}/{name}" for pid in asked["pids"] for name in OF_A_PROCESS]
    for path in [*asked["files"], *own]:
        print(json.dumps({"file": path, "got": try_file(path)}))


if __name__ == "__main__":
    main()
