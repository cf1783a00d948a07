"""Splits a request into choices and runs them on rank 0.

Each prompt has ``n`` choices; each choice is one request to the rank: ``<request id>/<index>``.

- Prefill side of a hand-over: one token for each choice; the first choice leases the prompt's
  blocks for all choices.
- Decode side: every choice starts with the token that prefill has drawn
  (``pdlaunch.first_tokens``), or without one when the router does not pass it on.
- ``resume``: every choice starts with its tokens in ``resume``.
"""

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from pdlaunch.engine.server.choice import Choice, Delta
from pdlaunch.engine.server.rank_link import RankEvent, RankLink
from pdlaunch.engine.server.served_model import ServedModel
from pdlaunch.errors import OverloadedError, RequestError
from pdlaunch.http.errors import RANK_LOST
from pdlaunch.observe.metrics import RequestClock
from pdlaunch.observe.spans import SpanLog
from pdlaunch.protocol import kv_params
from pdlaunch.protocol.engine import AddRequest, RequestFinished, SamplingParams, Tokens
from pdlaunch.protocol.ids import NO_ORIGIN, HopId, PromptOrigin, RequestId
from pdlaunch.protocol.openai.requests import (
    ChatCompletionRequest,
    CompletionRequest,
    GenerationRequest,
    SamplingFields,
)
from pdlaunch.protocol.openai.responses import PromptTokensDetails, Usage

_SEED_BITS = 63


@dataclass(frozen=True, slots=True)
class Call:
    """Holds the ids and options of one HTTP request that are not in its body."""

    hop_id: HopId  # names the request for its caller, who may use an id twice at once
    origin: PromptOrigin = NO_ORIGIN
    is_suspect: bool = False  # it may have killed a rank
    spans: SpanLog = field(default_factory=SpanLog)
    wants_spans: bool = False  # the answer includes the spans


@dataclass(eq=False)
class Generation:
    """Runs the choices of one HTTP request, except choices that known tokens have ended."""

    link: RankLink
    call: Call
    request: CompletionRequest | ChatCompletionRequest
    prompts: list[list[int]]
    model: ServedModel
    has_peers: bool  # the engine exchanges KV blocks with others
    grammar: str = ""
    on_events: Callable[[], None] = lambda: None  # called each time that events of rank 0 arrive

    def __post_init__(self) -> None:
        """Split the request into choices. Raises RequestError."""
        call, request, model = self.call, self.request, self.model
        self.choices: list[Choice] = []
        self.num_prompt_tokens = sum(map(len, self.prompts))
        self._sent_at = 0.0
        self._running: dict[RequestId, Choice] = {}
        self._events: asyncio.Queue[RankEvent] = asyncio.Queue()
        self._remote_kv: kv_params.RemoteKV | None = None
        # Output of known tokens, which the client gets before any event of rank 0.
        self._known: list[Delta] = []

        transfer = request.kv_transfer()
        known, sent = _known(request, transfer)
        self.is_remote_prefill = transfer.do_remote_decode
        # The client has the beginning of the answer, such as role and prompt ids, already.
        self.continues = known is not None and sent
        _check(request, transfer, known, model, len(self.prompts), has_peers=self.has_peers)
        sampling = _sampling(request, model, self.grammar, scores_prompt=not self.continues)
        unique_id = f"{call.hop_id}-{secrets.token_hex(4)}"
        param = "messages" if isinstance(request, ChatCompletionRequest) else "prompt"
        for number_of_prompt, prompt in enumerate(self.prompts):
            echo = _echo(request, number_of_prompt, prompt, model)
            model.check_token_ids(prompt, param)
            limit = model.output_limit(request, len(prompt), param)
            for number in range(request.n):
                index = len(self.choices)
                leases = transfer.do_remote_decode and index == 0
                add = AddRequest(
                    request_id=RequestId(f"{unique_id}/{index}"),
                    prompt_token_ids=prompt,
                    sampling=msgspec.structs.replace(sampling, max_tokens=limit, choice=number),
                    do_remote_decode=leases,
                    num_readers=request.n if leases else 1,
                    remote_kv=transfer.remote_kv,
                    cache_salt=request.cache_salt,
                    priority=request.priority,
                    origin=call.origin,
                    is_suspect=call.is_suspect,
                    records_spans=call.wants_spans,
                )
                choice = Choice(
                    index,
                    add,
                    request,
                    model.tokenizer,
                    continues_elsewhere=transfer.do_remote_decode,
                    echo=echo,
                    is_echo_sent=self.continues,
                )
                self.choices.append(choice)
                if known is not None and (tokens := known[number]):
                    delta = choice.resume(tokens, sent=sent)
                    self._known += [] if delta is None else [delta]

    def start(self) -> None:
        self._sent_at = self.call.spans.clock()
        for choice in self.choices:
            add = choice.request
            if not choice.is_over:
                self._running[add.request_id] = choice
                self.link.submit(add, self._events.put_nowait)
            elif add.remote_kv is not None:
                # The prefill side waits for each reader. Adding and aborting the choice makes rank
                # 0 report that this reader needs no blocks.
                self.link.submit(add, lambda _: None)
                self.link.abort(add.request_id)

    async def deltas(self, clock: RequestClock) -> AsyncIterator[list[Delta]]:
        """Yield new output until every choice has ended; each list holds all that has arrived.
        Raises OverloadedError (503) if the rank is lost, RequestError (500) if a choice fails; the
        caller must then call ``abort``.
        """
        if self._known:
            yield self._known
        while self._running:
            # One write for all events that have arrived; at high load, these are many.
            events = [await self._events.get()]
            self.on_events()
            while not self._events.empty():
                events.append(self._events.get_nowait())
            if deltas := [delta for event in events if (delta := self._take(event)) is not None]:
                for delta in deltas:
                    clock.tokens(delta.index, len(delta.tokens))
                yield deltas

    def abort(self) -> None:
        for request_id in self._running:
            self.link.abort(request_id)
        self._running = {}

    def release(self) -> None:
        """End the lease of a remote prefill, granted or not, because no engine will pull it."""
        self.link.abort(self.choices[0].request.request_id)

    def hand_over(self, deltas: Sequence[Delta]) -> dict[str, Any] | None:
        """Return the ``kv_transfer_params`` of a finished remote prefill; None when every choice
        ended with its first token. Without leased blocks the decode engine gets the first tokens
        alone and computes the prompt itself. ``deltas``: the first token of each choice.
        """
        num_open = sum(choice.finish_reason != "stop" for choice in self.choices)
        if num_open == 0:
            self.release()
            return None
        tokens = [
            msgspec.structs.replace(
                *delta.tokens, finish_reason="stop" if delta.finish_reason == "stop" else None
            )
            for delta in deltas
        ]
        first_tokens = kv_params.PdlaunchParams(first_tokens=tokens)
        if self._remote_kv is None:
            return {
                "do_remote_prefill": False,
                "do_remote_decode": False,
                "pdlaunch": msgspec.to_builtins(first_tokens),
            }
        return kv_params.to_wire(self._remote_kv, first_tokens)

    def usage(self) -> Usage:
        """Return the token counts so far; cached tokens are those of each prompt's first choice."""
        num_output = sum(choice.num_tokens for choice in self.choices)
        cached = sum(choice.num_cached_tokens for choice in self.choices[:: self.request.n])
        return Usage(
            prompt_tokens=self.num_prompt_tokens,
            completion_tokens=num_output,
            total_tokens=self.num_prompt_tokens + num_output,
            prompt_tokens_details=PromptTokensDetails(cached),
        )

    def _take(self, event: RankEvent) -> Delta | None:
        if event is None:
            raise OverloadedError("the engine is restarting", status=503, code=RANK_LOST)
        choice = self._running.get(event.request_id)
        if choice is None:
            return None
        if event.spans is not None:
            if len(self.choices) > 1:
                for span in event.spans.spans:
                    span.attributes["choice"] = int(event.request_id.rpartition("/")[2])
            spans = self.call.spans
            spans.take(event.spans, sent_at=self._sent_at, received_at=spans.clock())
        match event:
            case Tokens():
                delta = choice.take(event.tokens, prompt=event.prompt)
                if choice.is_over:  # by a stop string, which the rank does not know
                    del self._running[event.request_id]
                    self.link.abort(event.request_id)
            case RequestFinished():
                del self._running[event.request_id]
                if event.reason in ("error", "abort"):
                    message = event.error or "the engine aborted the request"
                    raise RequestError(message, status=500, code="engine_error")
                choice.num_cached_tokens = event.num_cached_tokens
                self._remote_kv = event.remote_kv or self._remote_kv
                stops = event.stop_token_id is not None
                delta = choice.take(
                    event.tokens, event.reason, ends_with_stop_token=stops, prompt=event.prompt
                )
        return delta


def _known(
    request: GenerationRequest, transfer: kv_params.KVTransferParams
) -> tuple[list[list[kv_params.TokenOutput]] | None, bool]:
    """Return the output tokens that exist, by choice, and whether the client has their output."""
    # ``resume`` takes precedence over first tokens, because it includes them.
    resume, pdlaunch = request.resumed(), transfer.pdlaunch
    if resume is not None:
        return resume.choices, resume.sent
    if not pdlaunch.first_tokens:
        return None, False
    if len(pdlaunch.first_tokens) != request.n:
        raise RequestError(
            f"there are {len(pdlaunch.first_tokens)} first tokens for n={request.n}",
            param="kv_transfer_params.pdlaunch.first_tokens",
        )
    return [[token] for token in pdlaunch.first_tokens], pdlaunch.first_token_sent


def _check(
    request: GenerationRequest,
    transfer: kv_params.KVTransferParams,
    known: list[list[kv_params.TokenOutput]] | None,
    model: ServedModel,
    num_prompts: int,
    *,
    has_peers: bool,
) -> None:
    """Check token ids, and that the request allows its hand-over or resume. Raises RequestError."""
    hands_over = transfer.do_remote_decode or transfer.remote_kv is not None
    if hands_over and not has_peers:
        raise RequestError(
            "this engine has no peers: it neither hands over nor pulls KV blocks; leave out "
            "kv_transfer_params",
            param="kv_transfer_params",
        )
    if num_prompts > 1 and (known is not None or hands_over):
        raise RequestError("kv_transfer_params and resume allow one prompt only", param="prompt")
    if transfer.do_remote_decode:
        if request.token_limit != 1:
            raise RequestError("do_remote_decode needs max_tokens: 1", param="max_tokens")
        if request.stream:
            raise RequestError("do_remote_decode needs stream: false", param="stream")
        if request.resume is not None:
            raise RequestError("do_remote_decode and resume cannot be combined", param="resume")
    model.check_token_ids(request.stop_token_ids, "stop_token_ids")
    model.check_token_ids(list(request.logit_bias), "logit_bias")
    first_tokens = "kv_transfer_params.pdlaunch.first_tokens"
    for tokens in known or ():
        for token in tokens:
            ids = [token.token_id, *dict(token.top_logprobs)]
            model.check_token_ids(ids, first_tokens if request.resume is None else "resume")


def _echo(
    request: CompletionRequest | ChatCompletionRequest,
    number: int,
    token_ids: list[int],
    model: ServedModel,
) -> str:
    """Return the prompt's text if the request wants it before the output; otherwise empty."""
    if not isinstance(request, CompletionRequest) or not request.echo:
        return ""
    prompt = request.prompt[number]
    if isinstance(prompt, str):
        return prompt
    return model.tokenizer.decode(token_ids, skip_special_tokens=request.skip_special_tokens)


def _sampling(
    request: GenerationRequest, model: ServedModel, grammar: str, *, scores_prompt: bool
) -> SamplingParams:
    """Return what all choices have in common."""
    seed = secrets.randbits(_SEED_BITS) if request.seed is None else request.seed
    # When a grammar is complete, only end tokens may follow, so they must end the answer.
    end_tokens = () if request.ignore_eos and not grammar else model.eos_token_ids
    chosen = {
        name: getattr(request if name in request.model_fields_set else model.defaults, name)
        for name in SamplingFields.model_fields
    }
    return SamplingParams(
        max_tokens=1,
        min_tokens=0 if grammar else request.min_tokens,
        **chosen | {"top_k": max(chosen["top_k"], 0)},
        logit_bias=request.logit_bias,
        stop_token_ids=tuple(dict.fromkeys((*request.stop_token_ids, *end_tokens))),
        eos_token_ids=model.eos_token_ids,
        seed=seed % 2**_SEED_BITS,
        num_top_logprobs=request.num_top_logprobs,
        num_prompt_logprobs=request.num_prompt_logprobs if scores_prompt else None,
        grammar=grammar,
    )
