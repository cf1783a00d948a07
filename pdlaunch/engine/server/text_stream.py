"""Converts the output tokens of one choice to the text that a stream emits.

The text emitted after k tokens is a pure function of the prompt, these k tokens and the stop
strings: another engine that is fed the same tokens is at the same place. Two things hold text back:
a UTF-8 character that is incomplete, and text that may begin a stop string.
"""

from __future__ import annotations

from collections.abc import Sequence

from pdlaunch.engine.server.tokenizer import TextTokenizer

_REPLACEMENT = "�"
_NUM_PROMPT_TOKENS = 6
"""Context that decides on a leading space; more is never needed."""
_MAX_HELD_TOKENS = 24
"""A run of tokens that are no text at all is emitted from here on; real characters end far
earlier.
"""


class IncrementalDetokenizer:
    """Decodes a growing list of tokens.

    ::

        tokens   ... [ context | pending ]
                      ^start    ^read
        text          [ prefix | stable | � ]     ``emitted`` characters of stable were given out

    The text of a token depends on the few before it, so the window ``tokens[start:]`` is decoded
    again for each token and moves on when it ends in a whole character.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        prompt_token_ids: Sequence[int],
        *,
        skip_special_tokens: bool,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._window = list(prompt_token_ids[-_NUM_PROMPT_TOKENS:])
        self._read = len(self._window)
        self._prefix = self._decode(self._window).rstrip(_REPLACEMENT)
        self._emitted = 0

    def push(self, token_id: int) -> str:
        """Return the text that is certain now; empty while a character is incomplete."""
        self._window.append(token_id)
        text = self._decode(self._window)
        stable = text.rstrip(_REPLACEMENT)
        if len(self._window) - self._read > _MAX_HELD_TOKENS:
            stable = text.removesuffix(_REPLACEMENT)
        start = len(self._prefix) + self._emitted
        new = stable[start:]
        self._emitted += len(new)
        if len(text) > len(self._prefix) and stable == text:
            self._move_on()
        return new

    def flush(self) -> str:
        """Return what is left at the end: incomplete characters as U+FFFD."""
        rest = self._decode(self._window)[len(self._prefix) + self._emitted :]
        self._emitted += len(rest)
        return rest

    def _move_on(self) -> None:
        self._window = self._window[self._read :]
        self._read = len(self._window)
        self._prefix = self._decode(self._window)
        self._emitted = 0

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special_tokens)


class TextStream:
    """Detokenizes one choice and looks for stop strings."""

    def __init__(
        self,
        detokenizer: IncrementalDetokenizer,
        *,
        stop: Sequence[str] = (),
        min_tokens: int = 0,
        include_stop: bool = False,
    ) -> None:
        self._detokenizer = detokenizer
        self._stop = tuple(stop)
        self._min_tokens = min_tokens
        self._include_stop = include_stop
        self._num_tokens = 0
        self._held = ""
        self.num_chars = 0
        """Characters of all tokens so far, also of those held back."""
        self.stop_string: str | None = None
        """The stop string that was found; the choice is over."""

    def push(self, token_id: int) -> str:
        """Return the text to emit after one more token.

        Text of earlier tokens than ``min_tokens`` is not searched.
        """
        assert self.stop_string is None
        self._num_tokens += 1
        return self._take(self._detokenizer.push(token_id))

    def finish(self) -> str:
        """Return the text to emit when the choice has ended by anything but a stop string."""
        rest = self._detokenizer.flush()
        self.num_chars += len(rest)
        text, self._held = self._held + rest, ""
        return text

    def _take(self, new: str) -> str:
        self.num_chars += len(new)
        if not self._stop or self._num_tokens < self._min_tokens:
            return new
        text = self._held + new
        found = _first_stop(text, self._stop)
        if found is not None:
            start, self.stop_string = found
            self._held = ""
            return text[: start + len(self.stop_string)] if self._include_stop else text[:start]
        num_held = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]


def _first_stop(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    """Find where the earliest stop string begins, and which it is.

    Of two at one place it is the shorter one, which was complete first.
    """
    found = [(start, len(stop), stop) for stop in stops if (start := text.find(stop)) >= 0]
    return (min(found)[0], min(found)[2]) if found else None


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of ``text`` that ``stop`` begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
