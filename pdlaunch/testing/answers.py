"""Reads answers of /v1/completions, whole or streamed, into one form that can be compared."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterable
from typing import Any

import msgspec

from pdlaunch.errors import ProtocolError

LOGPROB_TOLERANCE = 1e-3
"""Tolerance in nats, in float32: batches of other shapes add in another order."""


class AnsweredChoice(msgspec.Struct):
    """Holds one choice of an answer."""

    token_ids: list[int] = []
    text: str = ""
    logprobs: list[float] = []
    """Log-probabilities of the tokens, where they were asked for."""
    finish_reason: str | None = None


class ReceivedAnswer(msgspec.Struct):
    """Holds the choices of an answer by index, as far as they have come."""

    choices: dict[int, AnsweredChoice] = {}
    events_at: list[float] = []
    """Instants of the monotonic clock at which the events of a stream came."""


def read_answer(body: dict[str, Any]) -> ReceivedAnswer:
    """Read the body of a whole answer."""
    answer = ReceivedAnswer()
    for choice in body["choices"]:
        _add(answer, choice)
    return answer


async def collect_stream(lines: AsyncIterable[bytes], answer: ReceivedAnswer) -> str | None:
    """Add the events of a stream to ``answer``; return the message of an error event.

    Raises ProtocolError when the stream has no proper end.
    """
    async for line in lines:
        if not line.startswith(b"data:"):
            continue
        if line.strip() == b"data: [DONE]":
            return None
        event = json.loads(line[5:])
        if "error" in event:
            return f"in the stream: {event['error']['message']}"
        answer.events_at.append(time.monotonic())
        for choice in event["choices"]:
            _add(answer, choice)
    raise ProtocolError("a stream that ended without [DONE]")


def difference(found: ReceivedAnswer, expected: ReceivedAnswer, *, is_whole: bool) -> str:
    """Describe how ``found`` differs from ``expected``; empty: not at all.

    ``is_whole``: False compares only what is there.
    """
    if is_whole and found.choices.keys() != expected.choices.keys():
        return f"choices {sorted(found.choices)} instead of {sorted(expected.choices)}"
    for index, choice in found.choices.items():
        wanted = expected.choices[index]
        if not is_whole:
            wanted = _begin_of(wanted, choice)
        if (choice.token_ids, choice.text, choice.finish_reason) != (
            wanted.token_ids,
            wanted.text,
            wanted.finish_reason,
        ):
            return f"choice {index}: {choice} instead of {wanted}"
        if len(choice.logprobs) != len(wanted.logprobs):
            return (
                f"choice {index}: {len(choice.logprobs)} logprobs instead of {len(wanted.logprobs)}"
            )
        if any(
            abs(ours - theirs) > LOGPROB_TOLERANCE
            for ours, theirs in zip(choice.logprobs, wanted.logprobs, strict=True)
        ):
            return f"choice {index}: logprobs {choice.logprobs} instead of {wanted.logprobs}"
    return ""


def _begin_of(whole: AnsweredChoice, begun: AnsweredChoice) -> AnsweredChoice:
    """Cut ``whole`` to as much as ``begun`` has."""
    return AnsweredChoice(
        token_ids=whole.token_ids[: len(begun.token_ids)],
        text=whole.text[: len(begun.text)],
        logprobs=whole.logprobs[: len(begun.logprobs)],
        finish_reason=whole.finish_reason if begun.finish_reason else None,
    )


def _add(answer: ReceivedAnswer, piece: dict[str, Any]) -> None:
    choice = answer.choices.setdefault(piece["index"], AnsweredChoice())
    if choice.finish_reason is not None:
        raise ProtocolError(f"choice {piece['index']} goes on after its end")
    choice.token_ids = choice.token_ids + (piece.get("token_ids") or [])
    choice.text += piece.get("text") or ""
    if piece.get("logprobs"):
        choice.logprobs = choice.logprobs + piece["logprobs"]["token_logprobs"]
    choice.finish_reason = piece.get("finish_reason")
