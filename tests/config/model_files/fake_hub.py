"""A small hub on 127.0.0.1: what huggingface_hub asks of one, for the models that it is given."""

import asyncio
import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from aiohttp import web

from tests.web_server import web_server

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

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(f"{request.method} {request.path}")
        api, file = API.fullmatch(request.path), FILE.fullmatch(request.path)
        found = api or file
        key = request.headers.get("Authorization")
        may_read = not self.needs_token or key == f"Bearer {TOKEN}"
        if found is None or found[1] != self.name or not may_read:
            return refusal(401, "RepoNotFound")
        revision = found[3] if api else found[2]
        commit = self.revisions.get(revision, revision if revision == COMMIT else None)
        if commit is None:
            return refusal(404, "RevisionNotFound")
        if api is not None:
            return self._description(commit, is_tree=api[2] == "tree")
        return await self._file(request, commit, found[3])

    def _description(self, commit: str, *, is_tree: bool) -> web.Response:
        paths = [path for path in sorted(self.folder.rglob("*")) if path.is_file()]
        files = [(str(path.relative_to(self.folder)), path.read_bytes()) for path in paths]
        if is_tree:
            return web.json_response(
                [
                    {"type": "file", "path": name, "size": len(content), "oid": etag(content)}
                    for name, content in files
                ]
            )
        siblings = [{"rfilename": name, "size": len(content)} for name, content in files]
        return web.json_response({"id": self.name, "sha": commit, "siblings": siblings})

    async def _file(self, request: web.Request, commit: str, name: str) -> web.StreamResponse:
        path = self.folder / name
        if not path.is_file():
            return refusal(404, "EntryNotFound")
        content = path.read_bytes()
        headers = {"ETag": f'"{etag(content)}"', "X-Repo-Commit": commit}
        if name not in self.hold or request.method == "HEAD":
            return web.Response(body=content, headers=headers)
        response = web.StreamResponse(headers=headers)
        response.content_length = len(content)
        await response.prepare(request)
        half = len(content) // 2
        await response.write(content[:half])
        await asyncio.to_thread(self.hold[name].wait)
        await response.write(content[half:])
        return response


def refusal(status: int, code: str) -> web.Response:
    return web.Response(status=status, headers={"X-Error-Code": code, "X-Error-Message": code})


def etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextmanager
def fake_hub(name: str, folder: Path) -> Iterator[FakeHub]:
    hub = FakeHub(name, folder)
    with web_server(hub.answer) as hub.url:
        try:
            yield hub
        finally:
            for event in hub.hold.values():
                event.set()
