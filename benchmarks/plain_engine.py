"""Simulates engines of vLLM that need almost no CPU time, to measure the cost of a router.

::

    POST, do_remote_decode ──▶ kv_transfer_params, at once, or one prompt after another at
                               ``tokens_per_s``
    POST, stream           ──▶ one chunk for every stream, each ``interval_s``   as a decode step
                                 └ stamped with the instant at which it was sent

``python -m benchmarks.plain_engine PORT PORT INTERVAL_S [TOKENS_PER_S]`` serves a prefill and a
decode engine at 127.0.0.1. All tokens are equal, so that a canary accepts both engines.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from typing import Any

import msgspec

MODEL = "plain"
VERSION = "0.32.0"
_BYTES_READ = b"vllm:nixl_bytes_transferred_sum"
STAMP = b'"system_fingerprint":"'
"""Precedes the time at which a chunk was sent, in nanoseconds on the host's monotonic clock."""
_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)
_TOKEN = 100


class PlainEngines:
    """The state that all connections share: the streams, and the bytes that were "read"."""

    def __init__(self, interval_s: float, tokens_per_s: float = 0.0) -> None:
        self._interval_s = interval_s
        self._tokens_per_s = tokens_per_s
        self._computed_at = 0.0
        self._streams: dict[_Stream, None] = {}
        self.num_bytes_read = 1

    def computed_at(self, prompt: object) -> float:
        """Return when a prompt of token ids is computed; prompts are computed one by one."""
        num_tokens = len(prompt) if self._tokens_per_s and isinstance(prompt, list) else 0
        self._computed_at = max(self._computed_at, asyncio.get_running_loop().time())
        self._computed_at += num_tokens / (self._tokens_per_s or 1.0)
        return self._computed_at

    def begin(self, stream: _Stream) -> None:
        self._streams[stream] = None

    def end(self, connection: asyncio.Transport) -> None:
        """Forget the streams of a closed connection."""
        for stream in [one for one in self._streams if one.transport is connection]:
            del self._streams[stream]

    async def run(self) -> None:
        """Send the next token of every stream, each ``interval_s``."""
        loop = asyncio.get_running_loop()
        next_at = loop.time()
        while True:
            next_at = max(next_at + self._interval_s, loop.time())
            await asyncio.sleep(next_at - loop.time())
            for stream in list(self._streams):
                if stream.tell():
                    self._streams.pop(stream, None)


class _Stream:
    """Sends one answer token by token."""

    def __init__(self, transport: asyncio.Transport, body: dict[str, Any], is_chat: bool) -> None:
        self.transport = transport
        self._left = self._num_tokens = body.get("max_tokens") or 16
        self._is_chat = is_chat
        self._sends_ids = bool(body.get("return_token_ids"))
        self._wants_usage = bool((body.get("stream_options") or {}).get("include_usage"))

    def tell(self) -> bool:
        """Send a token; return True if it was the last one."""
        self._left -= 1
        ids = b',"token_ids":[%d]' % _TOKEN if self._sends_ids else b""
        reason = b"null" if self._left else b'"length"'
        said = b'"delta":{"content":" word"}' if self._is_chat else b'"text":" word"'
        kind = b"chat.completion.chunk" if self._is_chat else b"text_completion"
        event = b"".join(
            [
                b'data: {"id":"cmpl-1","object":"%b","created":1,"model":"plain",' % kind,
                STAMP + b'%d","choices":[{"index":0,%b,' % (time.monotonic_ns(), said),
                b'"logprobs":null,"finish_reason":%b,"stop_reason":null%b}]}\n\n' % (reason, ids),
            ]
        )
        if not self._left:
            if self._wants_usage:
                usage = msgspec.json.encode(_usage(self._num_tokens))
                event += b'data: {"id":"cmpl-1","choices":[],"usage":%b}\n\n' % usage
            event += b"data: [DONE]\n\n"
        self.transport.write(b"%x\r\n%b\r\n" % (len(event), event))
        if not self._left:
            self.transport.write(b"0\r\n\r\n")
        return not self._left


class _Connection(asyncio.Protocol):
    def __init__(self, engines: PlainEngines) -> None:
        self._engines = engines
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self._engines.end(self._transport)

    def data_received(self, data: bytes) -> None:
        self._received += data
        while True:
            head, found, rest = self._received.partition(b"\r\n\r\n")
            if not found:
                return
            length = _content_length(head)
            if len(rest) < length:
                return
            self._received = rest[length:]
            path = head.split(b" ", 2)[1].decode()
            self._answer(path, rest[:length])

    def _answer(self, path: str, body: bytes) -> None:
        match path:
            case "/health":
                self._send(b"")
            case "/version":
                self._send(msgspec.json.encode({"version": VERSION}))
            case "/v1/models":
                card = {"id": MODEL, "object": "model", "max_model_len": 100_000}
                self._send(msgspec.json.encode({"object": "list", "data": [card]}))
            case "/metrics":
                page = b"%b %d\n" % (_BYTES_READ, self._engines.num_bytes_read)
                self._send(page, b"text/plain")
            case _:
                self._generate(path, msgspec.json.decode(body))

    def _generate(self, path: str, body: dict[str, Any]) -> None:
        is_chat = path.endswith("chat/completions")
        params = body.get("kv_transfer_params") or {}
        if params.get("do_remote_prefill"):
            self._engines.num_bytes_read += 1_000_000
        if body.get("stream"):
            self._transport.write(_STREAM_HEAD)
            self._engines.begin(_Stream(self._transport, body, is_chat))
            return
        num_tokens = body.get("max_tokens") or 16
        choice: dict[str, Any] = {"index": 0, "finish_reason": "length"}
        said = " word" * num_tokens
        choice |= {"message": {"role": "assistant", "content": said}} if is_chat else {"text": said}
        if body.get("return_token_ids"):
            choice["token_ids"] = [_TOKEN] * num_tokens
        if body.get("logprobs") is not None:
            choice["logprobs"] = {"token_logprobs": [-0.5] * num_tokens}
        answer: dict[str, Any] = {
            "id": "cmpl-1",
            "object": "text_completion",
            "created": 1,
            "model": MODEL,
            "choices": [choice],
            "usage": _usage(num_tokens),
        }
        if params.get("do_remote_decode"):
            answer["kv_transfer_params"] = {
                "do_remote_prefill": True,
                "do_remote_decode": False,
                "remote_engine_id": "plain",
                "remote_block_ids": [[1]],
                "remote_request_id": "1",
                "remote_host": "127.0.0.1",
                "remote_port": 1,
                "tp_size": 1,
            }
        at = self._engines.computed_at(body.get("prompt"))
        asyncio.get_running_loop().call_at(at, self._send, msgspec.json.encode(answer))

    def _send(self, body: bytes, content_type: bytes = b"application/json") -> None:
        self._transport.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nContent-Length: %d\r\n\r\n"
            % (content_type, len(body))
            + body
        )


def _content_length(head: bytes) -> int:
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
    return 0


def _usage(num_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": 16,
        "completion_tokens": num_tokens,
        "total_tokens": 16 + num_tokens,
        "prompt_tokens_details": {"cached_tokens": 16},
    }


async def serve(ports: list[int], interval_s: float, tokens_per_s: float) -> None:
    """Serve at these ports of 127.0.0.1, until cancelled."""
    engines, loop = PlainEngines(interval_s, tokens_per_s), asyncio.get_running_loop()
    with contextlib.ExitStack() as stack:
        for port in ports:
            server = await loop.create_server(
                lambda: _Connection(engines), "127.0.0.1", port, backlog=4096
            )
            stack.callback(server.close)
        await engines.run()


def main() -> None:
    """Serve until killed."""
    prefill, decode, interval_s, *tokens_per_s = sys.argv[1:]
    speed = float(tokens_per_s[0]) if tokens_per_s else 0.0
    asyncio.run(serve([int(prefill), int(decode)], float(interval_s), speed))


if __name__ == "__main__":
    main()
