"""Turns the output tokens of one choice into the text that its client gets.

The text emitted after k tokens is a pure function of the prompt, these k tokens and the stop
strings. Therefore another engine emits the same text for the same tokens. Text is held back while
its last UTF-8 character is incomplete, or while it may be the beginning of a stop string.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pdlaunch.engine.server.structured import ToolCallReader, overlap
from pdlaunch.engine.server.text import TextTokenizer
from pdlaunch.protocol.engine import AddRequest
from pdlaunch.protocol.kv_params import TokenOutput
from pdlaunch.protocol.openai.requests import ChatCompletionRequest, GenerationRequest
from pdlaunch.protocol.openai.responses import CalledTool

_REPLACEMENT = "�"
_NUM_PROMPT_TOKENS = 6  # enough context to decide whether the text begins with a space
# More tokens without a complete character are emitted as U+FFFD; real characters are far shorter
_MAX_HELD_TOKENS = 24


@dataclass(eq=False)
class TextStream:
    """Detokenizes one choice and looks for stop strings.

    ::

        tokens   ... [ context | pending ]
                      ^start    ^read
        text          [ prefix | stable | � ]     ``emitted`` characters of stable were emitted

    The text of a token depends on the few tokens before it, so the window ``tokens[start:]`` is
    decoded again for each token. The window moves on when it ends in a whole character.
    """

    tokenizer: TextTokenizer
    prompt_token_ids: Sequence[int] = ()
    skip_special_tokens: bool = True
    stop: Sequence[str] = ()
    min_tokens: int = 0  # stop strings are searched for from this output token on
    include_stop: bool = False

    def __post_init__(self) -> None:
        self._window = list(self.prompt_token_ids[-_NUM_PROMPT_TOKENS:])
        self._read = len(self._window)
        self._prefix = self._decode().rstrip(_REPLACEMENT)
        self._emitted = 0
        self._num_tokens = 0
        self._held = ""
        self.num_chars = 0  # characters of all tokens so far, including those held back
        self.stop_string: str | None = None  # the stop string that was found; the choice is over

    def push(self, token_id: int) -> str:
        self._num_tokens += 1
        new = self._detokenize(token_id)
        self.num_chars += len(new)
        if not self.stop or self._num_tokens < self.min_tokens:
            return new
        text = self._held + new
        found = [(start, len(stop), stop) for stop in self.stop if (start := text.find(stop)) >= 0]
        if found:
            # Of two stop strings at one place, the shorter one was complete first.
            start, size, self.stop_string = min(found)
            self._held = ""
            return text[: start + size] if self.include_stop else text[:start]
        num_held = max(overlap(text, stop) for stop in self.stop)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def finish(self) -> str:
        """Return the text that was held back, if the choice has ended without a stop string."""
        # An incomplete character is emitted as U+FFFD.
        rest = self._decode()[len(self._prefix) + self._emitted :]
        self._emitted += len(rest)
        self.num_chars += len(rest)
        text, self._held = self._held + rest, ""
        return text

    def _detokenize(self, token_id: int) -> str:
        """Return the text that the token completes; empty while a character is incomplete."""
        self._window.append(token_id)
        text = self._decode()
        stable = text.rstrip(_REPLACEMENT)
        if len(self._window) - self._read > _MAX_HELD_TOKENS:
            stable = text.removesuffix(_REPLACEMENT)
        new = stable[len(self._prefix) + self._emitted :]
        self._emitted += len(new)
        if len(text) > len(self._prefix) and stable == text:
            self._window = self._window[self._read :]
            self._read = len(self._window)
            self._prefix = self._decode()
            self._emitted = 0
        return new

    def _decode(self) -> str:
        return self.tokenizer.decode(self._window, skip_special_tokens=self.skip_special_tokens)


@dataclass(slots=True)
class Delta:
    """Holds new output of a choice for the client."""

    index: int
    text: str = ""
    tokens: list[TokenOutput] = field(default_factory=list)
    # Characters of the answer before each token
    text_offsets: list[int] = field(default_factory=list)
    tool_calls: list[CalledTool] = field(default_factory=list)
    # The prompt's tokens, with the requested log probabilities
    prompt: list[TokenOutput] = field(default_factory=list)
    finish_reason: str | None = None
    # The stop string or stop token id that ended the choice; None: neither did
    stop_reason: str | int | None = None

    def add(self, other: Delta) -> None:
        self.text += other.text
        self.tokens += other.tokens
        self.text_offsets += other.text_offsets
        self.tool_calls += other.tool_calls
        self.prompt += other.prompt
        self.finish_reason, self.stop_reason = other.finish_reason, other.stop_reason


@dataclass(eq=False)
class Choice:
    """Turns the tokens of one choice into text; ends with a ``finish_reason``, once."""

    index: int
    request: AddRequest
    options: GenerationRequest
    tokenizer: TextTokenizer
    continues_elsewhere: bool  # another engine continues, and emits the text held back here
    echo: str = ""  # the prompt's text, which comes first in the answer
    is_echo_sent: bool = False
    num_tokens: int = 0
    num_cached_tokens: int = 0
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    def __post_init__(self) -> None:
        options, self._num_echoed = self.options, len(self.echo)
        self._text = TextStream(
            self.tokenizer,
            self.request.prompt_token_ids,
            skip_special_tokens=options.skip_special_tokens,
            stop=options.stop,
            min_tokens=options.min_tokens,
            include_stop=options.include_stop_str_in_output,
        )
        if self.is_echo_sent:
            self.echo = ""
        calls_tools = isinstance(options, ChatCompletionRequest) and options.callable_functions
        self._calls = ToolCallReader() if calls_tools else None

    @property
    def is_over(self) -> bool:
        return self.finish_reason is not None

    def take(
        self,
        tokens: Sequence[TokenOutput],
        reason: str | None = None,
        *,
        ends_with_stop_token: bool = False,
        prompt: Sequence[TokenOutput] = (),
    ) -> Delta:
        """Add new tokens, with the finish ``reason`` if they are the last. A stop string ends the
        choice early; tokens after it are dropped.
        """
        delta = Delta(self.index, prompt=list(prompt))
        if self.options.token_limit == 0:  # the rank draws a token nevertheless
            tokens, ends_with_stop_token, reason = (), False, reason and "length"
        for place, token in enumerate(tokens, 1):
            is_stop_token = ends_with_stop_token and place == len(tokens)
            self.num_tokens += 1
            delta.tokens.append(token)
            delta.text_offsets.append(self._num_echoed + self._text.num_chars)
            # The text of a stop token is left out unless the client wants it.
            if not is_stop_token or self.options.include_stop_str_in_output:
                delta.text += self._text.push(token.token_id)
            if self._text.stop_string is not None:
                reason, self.stop_reason = "stop", self._text.stop_string
                break
            if is_stop_token and token.token_id not in self.request.sampling.eos_token_ids:
                self.stop_reason = token.token_id
        self.finish_reason = reason
        continues = reason == "length" and self.continues_elsewhere
        if self.is_over and self._text.stop_string is None and not continues:
            delta.text += self._text.finish()
        if (reader := self._calls) is not None:
            delta.text, delta.tool_calls = reader.push(delta.text)
            if self.is_over and not continues:
                text, calls = reader.finish(is_cut=self.finish_reason == "length")
                delta.text += text
                delta.tool_calls += calls
                if reader.num_calls and self.finish_reason == "stop":
                    self.finish_reason = "tool_calls"
        delta.text, self.echo = self.echo + delta.text, ""
        delta.finish_reason, delta.stop_reason = self.finish_reason, self.stop_reason
        return delta

    def resume(self, tokens: Sequence[TokenOutput], *, sent: bool) -> Delta | None:
        """Add tokens that another engine has drawn; return the output that the client lacks.
        ``sent``: the client has the output of these tokens, and the end if the last token has a
        ``finish_reason``.
        """
        sampling, told = self.request.sampling, tokens[-1].finish_reason
        self.request.output = list(tokens)
        is_stop = (
            tokens[-1].token_id in sampling.stop_token_ids and len(tokens) >= sampling.min_tokens
        )
        # The end is separate, because a client that has the tokens may lack the end.
        delta, end = self.take(tokens[:-1] if is_stop else tokens), Delta(self.index)
        if not self.is_over:
            if is_stop:
                end = self.take(tokens[-1:], "stop", ends_with_stop_token=True)
            elif told is not None or self.num_tokens >= sampling.max_tokens:
                end = self.take((), "length" if told in (None, "length") else "stop")
        if sent and (told is not None or not self.is_over):
            return None
        if sent:
            delta = Delta(self.index)
            end.tokens, end.text_offsets = [], []
        delta.add(end)
        delta.finish_reason, delta.stop_reason = self.finish_reason, self.stop_reason
        return delta
