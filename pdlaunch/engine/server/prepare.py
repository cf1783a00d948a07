"""Splits a checked request into the choices that rank 0 works on, with what is known of them.

Each prompt has ``n`` choices, each choice is one request to the rank: ``<request id>/<index>``.

- Prefill side of a hand-over: one token a choice; the first choice puts the prompt's blocks under a
  lease for all.
- Decode side: every choice starts with the token that prefill has drawn
  (``pdlaunch.first_tokens``), or without one when the router does not pass them on.
- ``resume``: every choice starts with the tokens that it has.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field

from pdlaunch.engine.server.choice import Choice, Delta
from pdlaunch.engine.server.served_model import ServedModel
from pdlaunch.engine.server.text_stream import IncrementalDetokenizer, TextStream
from pdlaunch.errors import RequestError
from pdlaunch.observe.spans import SpanLog
from pdlaunch.protocol.engine import AddRequest, SamplingParams, TokenOutput, output_of
from pdlaunch.protocol.ids import NO_ORIGIN, HopId, PromptOrigin, RequestId
from pdlaunch.protocol.kv_params import FirstToken, KVTransferParams
from pdlaunch.protocol.openai.requests import (
    DEFAULT_MAX_TOKENS,
    CompletionRequest,
    GenerationRequest,
    SamplingFields,
)

_SEED_BITS = 63


@dataclass(frozen=True, slots=True)
class Call:
    """Identifies one HTTP request on its way."""

    hop_id: HopId
    """Names the request for its caller; the answer's id has it."""
    unique_id: str
    """The same with a random end: a caller may use its id twice at once."""
    traceparent: str | None
    origin: PromptOrigin = NO_ORIGIN
    is_suspect: bool = False
    """A rank may have died of it."""
    spans: SpanLog = field(default_factory=SpanLog)
    wants_spans: bool = False
    """The caller is to be told them."""


@dataclass(frozen=True, slots=True)
class Known:
    """Holds what one choice has before the engine has done anything."""

    tokens: list[TokenOutput]
    finish_reason: str | None = None
    sent: bool = False
    """The client has it already."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """Holds the choices of a request, and what there is to say before rank 0 says anything."""

    choices: list[Choice]
    deltas: list[Delta]
    prompts: list[list[int]]
    continues: bool
    """Something was sent by another engine before, or is known: no role, no prompt ids again."""
    is_remote_prefill: bool

    @property
    def num_prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))


def prepare(
    call: Call,
    request: GenerationRequest,
    prompts: Sequence[list[int]],
    model: ServedModel,
    *,
    prompt_param: str,
    has_peers: bool,
) -> Prepared:
    """Split a request into choices. Raises RequestError.

    ``has_peers``: the engine exchanges KV blocks with others.
    """
    transfer = request.kv_transfer()
    if not has_peers and (transfer.do_remote_decode or transfer.remote_kv is not None):
        raise RequestError(
            "this engine computes prompts and tokens itself: it hands no KV blocks over and pulls "
            "none",
            param="kv_transfer_params",
        )
    known = _known(request, transfer)
    _check_transfer(request, transfer, known, len(prompts))
    _check_ids(request, transfer, model)
    seed = secrets.randbits(_SEED_BITS) if request.seed is None else request.seed % 2**_SEED_BITS
    choices: list[Choice] = []
    deltas: list[Delta] = []
    for prompt in prompts:
        model.check_token_ids(prompt, prompt_param)
        limit = _limit(request, model, len(prompt), prompt_param)
        for number in range(request.n):
            choice = _choice(
                call,
                request,
                transfer,
                model,
                prompt,
                _sampling(request, model, limit, seed, number),
                len(choices),
            )
            choices.append(choice)
            if known is not None:
                deltas += _replay(choice, known[number])
    continues = bool(known and known[0].sent)
    return Prepared(choices, deltas, list(prompts), continues, transfer.do_remote_decode)


def _check_transfer(
    request: GenerationRequest,
    transfer: KVTransferParams,
    known: list[Known] | None,
    num_prompts: int,
) -> None:
    """Raise RequestError for a request that no hand-over of KV blocks, or of known tokens, fits."""
    if num_prompts > 1 and (
        known is not None or transfer.remote_kv is not None or transfer.do_remote_decode
    ):
        raise RequestError("one prompt only with kv_transfer_params or resume", param="prompt")
    if transfer.do_remote_decode:
        _check_remote_prefill(request)


def _known(request: GenerationRequest, transfer: KVTransferParams) -> list[Known] | None:
    """Return the tokens that exist, by choice; None without any.

    ``resume`` beats first tokens, as it has them too.
    """
    resume = request.resumed()
    if resume is not None:
        return [_known_tokens(tokens, resume.sent) for tokens in resume.choices]
    pdlaunch = transfer.pdlaunch
    if pdlaunch is None or not pdlaunch.first_tokens:
        return None
    if len(pdlaunch.first_tokens) != request.n:
        raise RequestError(
            f"{len(pdlaunch.first_tokens)} first tokens for n={request.n}",
            param="kv_transfer_params.pdlaunch.first_tokens",
        )
    return [_known_tokens([token], pdlaunch.first_token_sent) for token in pdlaunch.first_tokens]


def _known_tokens(tokens: list[FirstToken], sent: bool) -> Known:
    return Known(
        [output_of(token) for token in tokens], tokens[-1].finish_reason if tokens else None, sent
    )


def _check_remote_prefill(request: GenerationRequest) -> None:
    """Raise RequestError for what a remote prefill cannot do."""
    if request.token_limit != 1:
        raise RequestError("do_remote_decode needs max_tokens: 1", param="max_tokens")
    if request.stream:
        raise RequestError("do_remote_decode needs stream: false", param="stream")
    if request.resume is not None:
        raise RequestError("do_remote_decode and resume exclude each other", param="resume")


def _check_ids(request: GenerationRequest, transfer: KVTransferParams, model: ServedModel) -> None:
    model.check_token_ids(request.stop_token_ids, "stop_token_ids")
    model.check_token_ids(list(request.logit_bias), "logit_bias")
    resume = request.resumed()
    if resume is not None:
        tokens = [token for choice in resume.choices for token in choice]
        model.check_token_ids(_ids_of(tokens), "resume")
    if transfer.pdlaunch is not None:
        model.check_token_ids(
            _ids_of(transfer.pdlaunch.first_tokens), "kv_transfer_params.pdlaunch.first_tokens"
        )


def _ids_of(tokens: Sequence[FirstToken]) -> list[int]:
    return [
        token_id for token in tokens for token_id in (token.token_id, *dict(token.top_logprobs))
    ]


def _limit(
    request: GenerationRequest, model: ServedModel, num_prompt_tokens: int, prompt_param: str
) -> int:
    """Return the number of output tokens of a choice.

    Without a limit it is what remains, for completions at most 16 as OpenAI has it, for chats at
    most what the model's own defaults say.
    """
    remaining = model.remaining_tokens(num_prompt_tokens, request.token_limit, prompt_param)
    if request.token_limit is not None:
        return request.token_limit
    default = (
        DEFAULT_MAX_TOKENS
        if isinstance(request, CompletionRequest)
        else model.defaults.max_new_tokens
    )
    return remaining if default is None else min(remaining, default)


def _sampling(
    request: GenerationRequest, model: ServedModel, limit: int, seed: int, number: int
) -> SamplingParams:
    end_tokens = () if request.ignore_eos else model.eos_token_ids
    chosen = {
        name: getattr(request if name in request.model_fields_set else model.defaults, name)
        for name in SamplingFields.model_fields
    }
    return SamplingParams(
        max_tokens=limit,
        min_tokens=request.min_tokens,
        **chosen | {"top_k": max(chosen["top_k"], 0)},
        logit_bias=request.logit_bias,
        stop_token_ids=tuple(dict.fromkeys((*request.stop_token_ids, *end_tokens))),
        eos_token_ids=model.eos_token_ids,
        seed=seed,
        choice=number,
        num_top_logprobs=request.num_top_logprobs,
    )


def _choice(
    call: Call,
    request: GenerationRequest,
    transfer: KVTransferParams,
    model: ServedModel,
    prompt: list[int],
    sampling: SamplingParams,
    index: int,
) -> Choice:
    leases = transfer.do_remote_decode and index == 0
    add = AddRequest(
        request_id=RequestId(f"{call.unique_id}/{index}"),
        prompt_token_ids=prompt,
        sampling=sampling,
        do_remote_decode=leases,
        num_readers=request.n if leases else 1,
        remote_kv=transfer.remote_kv,
        cache_salt=request.cache_salt,
        origin=call.origin,
        is_suspect=call.is_suspect,
        traceparent=call.traceparent,
        records_spans=call.wants_spans,
    )
    text = TextStream(
        IncrementalDetokenizer(
            model.tokenizer, prompt, skip_special_tokens=request.skip_special_tokens
        ),
        stop=request.stop,
        min_tokens=request.min_tokens,
        include_stop=request.include_stop_str_in_output,
    )
    return Choice(
        index,
        add,
        text,
        include_stop=request.include_stop_str_in_output,
        goes_on_elsewhere=transfer.do_remote_decode,
    )


def _replay(choice: Choice, known: Known) -> list[Delta]:
    """Bring the choice to where it was; returns what its client has not seen of it."""
    if not known.tokens:
        return []
    seen, end = choice.replay(known.tokens, known.finish_reason)
    choice.request.output = known.tokens
    if known.finish_reason is not None:
        # The prefill side knows that it has ended, and waits for no pull.
        choice.request.remote_kv = None
    if not known.sent:
        seen.add(end)
        return [seen]
    # The engine that ended the choice has told the client so.
    if known.finish_reason is not None or not choice.is_over():
        return []
    return [
        Delta(choice.index, end.text, finish_reason=end.finish_reason, stop_reason=end.stop_reason)
    ]
