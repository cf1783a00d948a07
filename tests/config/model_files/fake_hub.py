"""A small hub on 127.0.0.1: what huggingface_hub asks of one, for the models that it is given."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_of_the_test"

API = re.compile(r"/api/models/([^/]+/[^/]+)/(revision|tree)/([^/?]+)")
FILE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass
class FakeHub:
    """Serves the files of a folder as one model, ``name``, at one commit."""

    name: str
    folder: Path
    url: str = ""
    revisions: dict[str, str] = field(default_factory=lambda: {"main": COMMIT})
    needs_token: bool = False
    hold: dict[str, threading.Event] = field(default_factory=dict)
    """The second half of a file is sent once its event is set."""
    requests: list[str] = field(default_factory=list)
    """Method and path of each."""

    def asked(self) -> list[str]:
        found = (FILE.fullmatch(each.removeprefix("GET ")) for each in self.requests)
        return [match[3] for match in found if match]


@contextmanager
def fake_hub(name: str, folder: Path) -> Iterator[FakeHub]:
    hub = FakeHub(name, folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            _answer(hub, self, with_body=False)

        def do_GET(self) -> None:
            _answer(hub, self, with_body=True)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield hub
    finally:
        for event in hub.hold.values():
            event.set()
        server.shutdown()
        thread.join()
        server.server_close()


def _answer(hub: FakeHub, request: BaseHTTPRequestHandler, *, with_body: bool) -> None:
    path = unquote(urlsplit(request.path).path)
    hub.requests.append(f"{request.command} {path}")
    api, file = API.fullmatch(path), FILE.fullmatch(path)
    found = api or file
    may_read = not hub.needs_token or request.headers.get("Authorization") == f"Bearer {TOKEN}"
    if found is None or found[1] != hub.name or not may_read:
        _refuse(request, 401, "RepoNotFound")
        return
    revision = found[3] if api else found[2]
    commit = hub.revisions.get(revision, revision if revision == COMMIT else None)
    if commit is None:
        _refuse(request, 404, "RevisionNotFound")
        return
    if api is not None:
        _describe(hub, request, commit, tree=api[2] == "tree")
    elif file is not None:
        _send_file(hub, request, commit, file[3], with_body=with_body)


def _refuse(request: BaseHTTPRequestHandler, status: int, code: str) -> None:
    _begin(request, status, 0, {"X-Error-Code": code, "X-Error-Message": code})


def _begin(
    request: BaseHTTPRequestHandler, status: int, num_bytes: int, headers: dict[str, str]
) -> None:
    request.send_response(status)
    for name, value in {"Content-Length": str(num_bytes), **headers}.items():
        request.send_header(name, value)
    request.end_headers()


def _describe(hub: FakeHub, request: BaseHTTPRequestHandler, commit: str, *, tree: bool) -> None:
    files = sorted(path for path in hub.folder.rglob("*") if path.is_file())
    names = {str(path.relative_to(hub.folder)): path for path in files}
    sizes = {name: path.stat().st_size for name, path in names.items()}
    body: object = {
        "id": hub.name,
        "sha": commit,
        "siblings": [{"rfilename": name, "size": size} for name, size in sizes.items()],
    }
    if tree:
        body = [
            {"type": "file", "path": name, "size": size, "oid": _etag(names[name])}
            for name, size in sizes.items()
        ]
    data = json.dumps(body).encode()
    _begin(request, 200, len(data), {"Content-Type": "application/json"})
    request.wfile.write(data)


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


def _send_file(
    hub: FakeHub, request: BaseHTTPRequestHandler, commit: str, name: str, *, with_body: bool
) -> None:
    path = hub.folder / name
    if not path.is_file():
        _refuse(request, 404, "EntryNotFound")
        return
    data = path.read_bytes()
    _begin(request, 200, len(data), {"ETag": f'"{_etag(path)}"', "X-Repo-Commit": commit})
    if not with_body:
        return
    half = len(data) // 2
    request.wfile.write(data[:half])
    request.wfile.flush()
    if name in hub.hold:
        hub.hold[name].wait()
    request.wfile.write(data[half:])
