"""A rank 0 that speaks the real protocol and draws its tokens from a script."""

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Iterable
from typing import TypeVar

import zmq
import zmq.asyncio

from pdlaunch.engine.server.text import TextTokenizer
from pdlaunch.protocol.engine import (
    AddRequest,
    CheckIntegrity,
    EngineStats,
    FromRank,
    Hello,
    IntegrityReport,
    Outputs,
    ReadStats,
    RequestFinished,
    Tokens,
    ToRank,
    Welcome,
    from_rank,
    to_rank,
)
from pdlaunch.protocol.kv_params import RemoteKV, TokenOutput
from pdlaunch.protocol.sockets import SecureContext

M = TypeVar("M", bound=ToRank)
Script = Callable[[AddRequest], Iterable[Tokens | RequestFinished]]


class FakeRank:
    """Answers every request with ``script(request)``; remembers what it was sent."""

    def __init__(self, context: SecureContext, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._socket, self.endpoint = context.listen(
            zmq.ROUTER, "tcp://127.0.0.1:0", socket_class=zmq.asyncio.Socket
        )
        self.received: list[ToRank] = []
        self._arrived = asyncio.Condition()
        self._server = b""
        self.max_model_len = 100_000
        self.checks_integrity = True
        self.answers_stats = True
        self.totals = EngineStats(num_blocks=64, num_free_blocks=64)
        self.script: Script = self.says("hello world, the quick brown fox stops here")
        self._task = asyncio.create_task(self._run())

    def ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def says(
        self,
        text: str | list[int],
        *,
        ends: bool = False,
        num_cached_tokens: int = 0,
        step: int = 1,
    ) -> Script:
        """A script: the tokens of ``text``, again and again up to max_tokens, ``step`` of them a
        message.

        ``ends``: only once, and the last token is one that stops the request.
        """
        token_ids = self.ids(text) if isinstance(text, str) else text

        def script(request: AddRequest) -> Iterable[Tokens | RequestFinished]:
            limit = request.sampling.max_tokens
            is_stop = ends and limit >= len(token_ids)
            wanted = (
                token_ids if ends else list(itertools.islice(itertools.cycle(token_ids), limit))
            )
            outputs = [self.output(token, request) for token in wanted[len(request.output) : limit]]
            prompt = self.scores(request)
            last = outputs[-1:]
            rest = outputs[: len(outputs) - len(last)]
            for start in range(0, len(rest), step):
                new = rest[start : start + step]
                yield Tokens(request_id=request.request_id, tokens=new, prompt=prompt)
                prompt = []
            yield RequestFinished(
                request_id=request.request_id,
                reason="stop" if is_stop else "length",
                tokens=last,
                prompt=prompt,
                stop_token_id=last[0].token_id if is_stop else None,
                num_cached_tokens=num_cached_tokens,
                remote_kv=remote_kv(request) if request.do_remote_decode else None,
            )

        return script

    def scores(self, request: AddRequest) -> list[TokenOutput]:
        """The prompt with made-up logprobs: each token -0.25, token 100 above it."""
        if request.sampling.num_prompt_logprobs is None:
            return []
        first, *rest = request.prompt_token_ids
        scored = [TokenOutput(token_id=i, logprob=-0.25, top_logprobs=((100, -0.1),)) for i in rest]
        return [TokenOutput(token_id=first), *scored]

    def output(self, token_id: int, request: AddRequest) -> TokenOutput:
        """The token with made-up logprobs: itself -0.5, ids 100, 101, ... below it."""
        num_top = request.sampling.num_top_logprobs
        if num_top is None:
            return TokenOutput(token_id=token_id)
        top = ((token_id, -0.5), *((100 + index, -1.0 - index) for index in range(num_top)))[
            :num_top
        ]
        return TokenOutput(token_id=token_id, logprob=-0.5, top_logprobs=top)

    def added(self) -> list[AddRequest]:
        return [message for message in self.received if isinstance(message, AddRequest)]

    async def wait_for(self, kind: type[M], count: int = 1) -> list[M]:
        """The first ``count`` messages of ``kind``."""

        def found() -> list[M]:
            return [message for message in self.received if isinstance(message, kind)]

        async with self._arrived:
            await asyncio.wait_for(
                self._arrived.wait_for(lambda: len(found()) >= count), timeout=60
            )
        return found()

    async def send(self, message: FromRank) -> None:
        await self._socket.send_multipart([self._server, from_rank.encode(message)])

    async def say(self, *items: Tokens | RequestFinished) -> None:
        await self.send(Outputs(items=list(items)))

    async def close(self) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self._socket.close()

    async def _run(self) -> None:
        while True:
            self._server, frame = await self._socket.recv_multipart()
            message = to_rank.decode(frame)
            async with self._arrived:
                self.received.append(message)
                self._arrived.notify_all()
            if isinstance(message, Hello):
                welcome = Welcome(num_blocks=64, max_model_len=self.max_model_len)
                await self.send(welcome)
            elif isinstance(message, ReadStats) and self.answers_stats:
                await self.send(self.totals)
            elif isinstance(message, CheckIntegrity) and self.checks_integrity:
                stats = EngineStats(num_blocks=64, num_free_blocks=63)
                await self.send(IntegrityReport(call_id=message.call_id, error=None, stats=stats))
            elif isinstance(message, AddRequest):
                for item in self.script(message):
                    await self.say(item)


def remote_kv(request: AddRequest) -> RemoteKV:
    return RemoteKV(
        engine_id="e1",
        lease_id=request.request_id,
        host="127.0.0.1",
        port=5555,
        block_ids=[[1, 2]],
        num_tokens=len(request.prompt_token_ids),
        lease_s=30.0,
    )


def silent(request: AddRequest) -> Iterable[Tokens | RequestFinished]:
    """A script that says nothing: the test speaks itself."""
    return ()
