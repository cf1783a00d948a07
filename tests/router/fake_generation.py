"""Generations of ``FakeEngine``: their tokens are a pure function of (prompt, seed, choice,
position).
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.router.fake_engine import FakeEngine

EOS = 0


def token_at(prompt: object, seed: int, choice: int, position: int) -> int:
    digest = hashlib.sha256(repr((prompt, seed, choice, position)).encode()).digest()
    return 1 + int.from_bytes(digest[:4], "big") % 9000


def expected_tokens(prompt: object, seed: int, choice: int, num_tokens: int) -> list[int]:
    return [token_at(prompt, seed, choice, position) for position in range(num_tokens)]


def text_of(token_ids: list[int]) -> str:
    return "".join("" if token_id == EOS else f" {token_id}" for token_id in token_ids)


class Seen:
    """One request as the engine saw it."""

    def __init__(self, path: str, headers: Any, body: dict[str, Any]) -> None:
        self.path = path
        self.headers = headers
        self.body = body

    @property
    def is_prefill(self) -> bool:
        return bool((self.body.get("kv_transfer_params") or {}).get("do_remote_decode"))


class Job:
    """One generation: what each choice has, and what is still to come."""

    def __init__(self, engine: FakeEngine, seen: Seen) -> None:
        self.engine = engine
        self.body = body = seen.body
        self.chat = seen.path.endswith("chat/completions")
        self.prompt = body["messages"] if self.chat else body["prompt"]
        self.n = body.get("n") or 1
        self.max_tokens = body.get("max_completion_tokens") or body.get("max_tokens") or 16
        self.seed = body["seed"]
        self.is_prefill = seen.is_prefill
        self.request_id = seen.headers["X-Request-Id"]
        self.told, self.over = self._known()
        self.is_continued = any(self.told)

    def _known(self) -> tuple[list[list[int]], set[int]]:
        """What the client has of each choice already; choices that are over."""
        if "resume" in self.body:
            assert self.body["resume"]["sent"] is True
            choices = self.body["resume"]["choices"]
            assert len(choices) == self.n
        else:
            ours = (self.body.get("kv_transfer_params") or {}).get("pdlaunch") or {}
            choices = [[] for _ in range(self.n)]
            if ours.get("first_token_sent"):
                choices = [[token] for token in ours["first_tokens"]]
        over = {
            index
            for index, tokens in enumerate(choices)
            if tokens and tokens[-1].get("finish_reason")
        }
        return [[token["token_id"] for token in tokens] for tokens in choices], over

    def token(self, choice: int, position: int) -> int:
        if position + 1 == self.engine.ends.get(choice):
            return EOS
        return token_at(self.prompt, self.seed, choice, position)

    def head(self) -> dict[str, Any]:
        kind = "chat.completion" if self.chat else "text_completion"
        if self.chat and self.body.get("stream"):
            kind += ".chunk"
        head = {"id": f"engine-{self.engine.name}", "object": kind, "created": 1, "model": "tiny"}
        return head | {"padding": self.engine.padding} if self.engine.padding else head

    def opening(self) -> list[dict[str, Any]]:
        if not self.chat or self.is_continued:
            return []
        return [
            self.head()
            | {"choices": [self._choice(index, [], role=True) for index in range(self.n)]}
        ]

    def chunks(self) -> list[dict[str, Any]]:
        """One token a chunk, choices in turn."""
        chunks = []
        for position in range(self.max_tokens):
            for index in range(self.n):
                tokens = self.told[index]
                if index not in self.over and len(tokens) == position:
                    token_id = self.token(index, position)
                    tokens.append(token_id)
                    reason = (
                        "stop"
                        if token_id == EOS
                        else "length"
                        if position + 1 == self.max_tokens
                        else None
                    )
                    if reason:
                        self.over.add(index)
                    chunks.append(
                        self.head() | {"choices": [self._choice(index, [token_id], reason=reason)]}
                    )
        return chunks

    def whole(self) -> dict[str, Any]:
        choices = []
        tokens = [
            [self.token(index, position) for position in range(self.max_tokens)]
            for index in range(self.n)
        ]
        for index, token_ids in enumerate(tokens):
            reason = "stop" if token_ids[-1] == EOS else "length"
            self.told[index] = token_ids
            choice = self._choice(index, token_ids, reason=reason)
            if self.chat:
                choice["message"] = {"role": "assistant", "content": choice.pop("delta")["content"]}
            choices.append(choice)
        lasts = self.is_prefill and any(token_ids[-1] != EOS for token_ids in tokens)
        params = self._lease([token_ids[0] for token_ids in tokens]) if lasts else None
        answer = {"choices": choices, "usage": self.usage(), "kv_transfer_params": params}
        return self.head() | answer

    def _lease(self, first_tokens: list[int]) -> dict[str, Any]:
        lease = f"{self.request_id}/0"
        self.engine.leases[lease] = self.prompt
        tokens = [
            {"token_id": token, "finish_reason": "stop" if token == EOS else None}
            for token in first_tokens
        ]
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_engine_id": self.engine.name,
            "remote_request_id": lease,
            "remote_host": "127.0.0.1",
            "remote_port": 1,
            "remote_block_ids": [[1]],
            "pdlaunch": {"first_tokens": tokens, "first_token_sent": False},
        }

    def usage(self) -> dict[str, Any]:
        prompt, completion = len(self.prompt), sum(map(len, self.told))
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": 0 if self.is_prefill else prompt},
        }

    def _choice(
        self, index: int, token_ids: list[int], *, reason: str | None = None, role: bool = False
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": index,
            "finish_reason": reason,
            "logprobs": self._logprobs(token_ids),
        }
        if self.chat:
            choice["delta"] = {"content": text_of(token_ids)} | (
                {"role": "assistant"} if role else {}
            )
        else:
            choice["text"] = text_of(token_ids)
        if self.body.get("return_token_ids"):
            choice["token_ids"] = token_ids
        return choice

    def _logprobs(self, token_ids: list[int]) -> dict[str, Any] | None:
        if not self.body.get("logprobs") or not token_ids:
            return None
        if self.chat:
            return {
                "content": [
                    {"token": str(t), "logprob": -t / 100, "bytes": None, "top_logprobs": []}
                    for t in token_ids
                ]
            }
        return {
            "tokens": [str(t) for t in token_ids],
            "token_logprobs": [-t / 100 for t in token_ids],
            "top_logprobs": [None for _ in token_ids],
            "text_offset": [0 for _ in token_ids],
        }
