"""Turns what the rank sends for one choice into what the client gets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from pdlaunch.engine.server.text_stream import TextStream
from pdlaunch.protocol.engine import AddRequest, RequestFinished, TokenOutput


@dataclass(slots=True)
class Delta:
    """Holds what is new of a choice, for the client."""

    index: int
    text: str = ""
    tokens: list[TokenOutput] = field(default_factory=list)
    text_offsets: list[int] = field(default_factory=list)
    """Characters of the output before each token."""
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    """The stop string or the token of ``stop_token_ids`` that ended it; None for the model's own
    end token.
    """

    def add(self, other: Delta) -> None:
        """Append what came later."""
        self.text += other.text
        self.tokens += other.tokens
        self.text_offsets += other.text_offsets
        self.finish_reason = other.finish_reason
        self.stop_reason = other.stop_reason


class Choice:
    """Turns the tokens of one choice into text; ends with a ``finish_reason``, once."""

    def __init__(
        self,
        index: int,
        request: AddRequest,
        text: TextStream,
        *,
        include_stop: bool = False,
        goes_on_elsewhere: bool = False,
    ) -> None:
        """Start without tokens.

        ``goes_on_elsewhere``: another engine continues at ``length``, so held back text stays held
        back.
        """
        self.index = index
        self.request = request
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self._text = text
        self._include_stop = include_stop
        self._goes_on_elsewhere = goes_on_elsewhere

    def is_over(self) -> bool:
        return self.finish_reason is not None

    def take(self, tokens: Iterable[TokenOutput], finished: RequestFinished | None = None) -> Delta:
        """Feed new tokens; a stop string ends the choice early and drops the tokens after it."""
        assert not self.is_over()
        delta = Delta(self.index)
        tokens = list(tokens)
        stop_token = (
            tokens.pop()
            if tokens and finished is not None and finished.stop_token_id is not None
            else None
        )
        for token in tokens:
            self._add(delta, token)
            if self.is_over():
                return self._signed(delta)
        if stop_token is not None:
            self._add_stop_token(delta, stop_token)
        elif finished is not None:
            self._end(delta, finished.reason)
        return self._signed(delta)

    def replay(
        self, tokens: Sequence[TokenOutput], finish_reason: str | None
    ) -> tuple[Delta, Delta]:
        """Feed tokens that exist already; ``finish_reason`` is set where somebody knows that the
        last one ended the choice.

        Returns what a stream has emitted for the tokens while the choice went on, and what its end
        adds, if it is over.
        """
        sampling = self.request.sampling
        last = tokens[-1]
        is_stop = last.token_id in sampling.stop_token_ids and len(tokens) >= sampling.min_tokens
        known, end = self.take(tokens[:-1] if is_stop else tokens), Delta(self.index)
        if self.is_over():
            end.finish_reason, end.stop_reason = known.finish_reason, known.stop_reason
            known.finish_reason = known.stop_reason = None
        elif is_stop:
            self._add_stop_token(end, last)
            self._signed(end)
        elif finish_reason is not None or self.num_tokens >= sampling.max_tokens:
            self._end(end, "stop" if finish_reason == "stop" else "length")
            self._signed(end)
        return known, end

    def _add(self, delta: Delta, token: TokenOutput) -> None:
        self._count(delta, token)
        delta.text += self._text.push(token.token_id)
        if self._text.stop_string is not None:
            self.finish_reason, self.stop_reason = "stop", self._text.stop_string

    def _add_stop_token(self, delta: Delta, token: TokenOutput) -> None:
        """Count the token that ends a choice; its text is left out unless the client wants it."""
        if self._include_stop:
            self._add(delta, token)
        else:
            self._count(delta, token)
        if not self.is_over():
            self._end(delta, "stop")
            if token.token_id not in self.request.sampling.eos_token_ids:
                self.stop_reason = token.token_id

    def _end(self, delta: Delta, reason: str) -> None:
        self.finish_reason = reason
        if not (reason == "length" and self._goes_on_elsewhere):
            delta.text += self._text.finish()

    def _count(self, delta: Delta, token: TokenOutput) -> None:
        self.num_tokens += 1
        delta.tokens.append(token)
        delta.text_offsets.append(self._text.num_chars)

    def _signed(self, delta: Delta) -> Delta:
        delta.finish_reason, delta.stop_reason = self.finish_reason, self.stop_reason
        return delta
