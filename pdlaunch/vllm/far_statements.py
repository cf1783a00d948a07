"""Asks for what prefill workers on other hosts state, by way of this engine's sidecar.

The sidecar alone holds the launch's token and certificate::

    decode worker ── Unix socket ──> sidecar ── TLS, token ──> sidecar ── folder <── prefill worker
"""

from __future__ import annotations

import http.client
import os
import socket
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from urllib.parse import urlencode

from pdlaunch.vllm.statements import Statement, StatementBoard, statement_name

# Path of the socket; unset if all engines are on this host.
STATEMENTS_SOCKET = "PDLAUNCH_STATEMENTS_SOCKET"
TIMEOUT_S = 10.0
_NUM_THREADS = 4

# The statement of each prefill rank, None if it is gone; or the reason why there is no answer.
Answer = Mapping[int, Statement | None] | str


class FarStatements:
    """Finds statements in threads of its own: an engine goes on with its steps meanwhile."""

    def __init__(self, board: StatementBoard, path: str) -> None:
        self._board = board
        self._path = path
        self._threads = ThreadPoolExecutor(_NUM_THREADS, "kv-statements")

    @classmethod
    def from_environment(cls, board: StatementBoard) -> FarStatements | None:
        """Return None where all engines are on this host."""
        path = os.environ.get(STATEMENTS_SOCKET)
        return cls(board, path) if path else None

    def ask(
        self, engine_id: str, ranks: Sequence[int], request_id: str, host: str, port: int
    ) -> Future[Answer]:
        """Ask for the statements of a request; its READ has ended.

        ``host``, ``port``: the side channel of its prefill engine.
        """
        return self._threads.submit(self._answer, engine_id, ranks, request_id, host, port)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _answer(
        self, engine_id: str, ranks: Sequence[int], request_id: str, host: str, port: int
    ) -> Answer:
        found: dict[int, Statement | None] = {}
        try:
            for rank in ranks:
                here = self._board.find(engine_id, rank, request_id)
                name = statement_name(engine_id, rank, request_id)
                found[rank] = here or _fetch(self._path, name, host, port)
        except (OSError, http.client.HTTPException, ValueError) as error:
            return f"{host}:{port} cannot be asked what it states of them: {error}"
        return found


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(TIMEOUT_S)
        self.sock.connect(self._path)


def _fetch(path: str, name: str, host: str, port: int) -> Statement | None:
    """Raises OSError, HTTPException, ValueError."""
    connection = _Connection(path)
    try:
        connection.request("GET", f"/?{urlencode({'name': name, 'host': host, 'port': port})}")
        response = connection.getresponse()
        body = response.read()
    finally:
        connection.close()
    match response.status:
        case 200:
            return Statement.decode(body)
        case 404:
            return None
        case _:
            raise OSError(body.decode(errors="replace")[:300])
