"""An engine of vLLM to a router: tokens are bytes of UTF-8, and the model writes ``script``.

What it has written so far is what stands behind the last ``|`` of its prompt, so that a prompt with
output goes on there. Leases are read once, by anybody who shares ``leases``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from aiohttp import web

from pdlaunch.http.engine_calls import with_version
from pdlaunch.launch.engines import capabilities_over_http
from pdlaunch.protocol.control import Role
from tests.router.fake_engine import FakeEngine, Seen

CAPABILITIES = with_version(capabilities_over_http("vllm"), "0.32.0")
SCRIPT = "Grüße 🙂 an alle, STOP und weiter"
CACHED_AT_PREFILL = 3
BAR = ord("|")


def text_of(ids: list[int]) -> str:
    return bytes(ids).decode("utf-8", errors="replace")


class VllmJob:
    """One generation, of one token a chunk, with what vLLM's detokenizer tells of it."""

    def __init__(self, engine: FakeVllmEngine, seen: Seen) -> None:
        self.engine, self.seen = engine, seen
        self.body = body = seen.body
        if seen.is_chat:
            self.prompt = list(f"<chat>{body['messages'][-1]['content']}|".encode())
        else:
            prompt = body.get("prompt")
            self.prompt = list(prompt.encode()) if isinstance(prompt, str) else prompt
        self.num_cached = CACHED_AT_PREFILL if seen.is_prefill else 0
        if seen.params.get("do_remote_prefill") and engine.pulls:
            lent = engine.leases.pop(seen.params["remote_request_id"])
            self.num_cached = len(lent)
            # With the first token, if the client has it.
            assert self.prompt in (lent, [*lent, seen.params.get("first")])
        self.choices = self._written()
        if body.get("echo") and not body.get("return_token_ids"):
            # With ids the text of the prompt is left out.
            self.choices[0]["text"] = text_of(self.prompt) + self.choices[0]["text"]
            for choice in self.choices:
                del choice["token_ids"]
            if body.get("max_tokens") == 0:
                alone = {"text": text_of(self.prompt), "finish_reason": "length"}
                self.choices = [self.choices[0] | alone]

    def _written(self) -> list[dict[str, Any]]:
        done = len(self.prompt) - 1 - max(at for at, each in enumerate(self.prompt) if each == BAR)
        left = list(self.engine.script.encode())[done:]
        # A prompt that ends within a character is told with it.
        primed = self.prompt if text_of(self.prompt).endswith("\ufffd") else []
        limit = self.body.get("max_completion_tokens") or self.body.get("max_tokens") or 16
        choices: list[dict[str, Any]] = []
        num_told = 0
        for count in range(1, min(limit, len(left)) + 1):
            text = text_of(primed + left[:count])
            text = "" if text.endswith("\ufffd") else text
            whole = text or text_of(left[:count]).rstrip("\ufffd")
            reason = "stop" if count == len(left) else "length" if count == limit else None
            upto = max(num_told, len(whole))
            choice = {"index": 0, "text": whole[num_told:upto], "token_ids": [left[count - 1]]}
            choices.append(choice | {"finish_reason": reason})
            num_told = upto
        return choices

    def opening(self) -> list[dict[str, Any]]:
        if not self.seen.is_chat:
            return []
        opening = {"index": 0, "delta": {"role": "assistant", "content": ""}}
        return [{"choices": [opening], "prompt_token_ids": self.prompt}]

    def chunks(self) -> Iterator[dict[str, Any]]:
        for number, choice in enumerate(self.choices):
            if self.seen.is_chat:
                delta = {"content": choice.pop("text")}
                choice["delta"] = self.engine.message or delta
            elif not number:
                choice["prompt_token_ids"] = self.prompt
            yield {"choices": [choice]}

    def ending(self) -> list[dict[str, Any]]:
        return [{"choices": [], "usage": self._usage()}]

    def _usage(self) -> dict[str, Any]:
        return {
            "prompt_tokens": len(self.prompt),
            "completion_tokens": len(self.choices),
            "total_tokens": len(self.prompt) + len(self.choices),
            "prompt_tokens_details": {"cached_tokens": self.num_cached},
        }

    def whole(self) -> dict[str, Any]:
        text = "".join(each["text"] for each in self.choices)
        token_ids = [token_id for each in self.choices for token_id in each.get("token_ids", ())]
        choice: dict[str, Any] = {"text": text}
        if self.seen.is_chat:
            message = {"role": "assistant", "content": text}
            choice = {"message": self.engine.message or message}
        choice |= {"token_ids": token_ids, "finish_reason": self.choices[-1]["finish_reason"]}
        answer: dict[str, Any] = {
            "choices": [choice | {"index": index} for index in range(self.body.get("n") or 1)],
            "usage": self._usage(),
            "system_fingerprint": "fake",
        }
        if self.seen.is_prefill:
            lease = f"{self.engine.name}-{len(self.engine.seen)}"
            self.engine.leases[lease] = self.prompt
            params = answer["kv_transfer_params"] = {
                "do_remote_prefill": True,
                "remote_request_id": lease,
                "remote_prefill_cached_tokens": CACHED_AT_PREFILL,
                "first": token_ids[0],
            }
            if self.engine.names_first_token:
                params["pdlaunch"] = {"first_tokens": [{"token_id": token_ids[0]}]}
        if self.body.get("return_token_ids"):
            answer["prompt_token_ids"] = self.prompt
        return answer


class FakeVllmEngine(FakeEngine):
    """``pulls=False``: it computes what it was handed blocks of. ``names_first_token``: its leases
    name the token that was drawn, as those of pdlaunch's connector.
    """

    job = VllmJob

    def __init__(self, name: str, role: Role, leases: dict[str, list[int]]) -> None:
        super().__init__(name, role)
        self.has_rank = False
        self.leases = leases
        self.pulls = True
        self.names_first_token = False
        self.script = SCRIPT
        self.capabilities = CAPABILITIES
        self.message: dict[str, Any] | None = None
        self.models = ["tiny", "tiny-lora"]

    async def _detokenize(self, request: web.Request) -> web.Response:
        return web.json_response({"prompt": text_of((await request.json())["tokens"])})

    def _refusal(self, seen: Seen) -> str:
        if seen.body.get("stream") and seen.body.get("use_beam_search"):
            self.leases.pop(seen.params.get("remote_request_id", ""), None)
            return "use_beam_search is not there"
        return ""

    async def _answer(self, request: web.Request, seen: Seen) -> web.StreamResponse:
        if seen.body.get("model", "tiny") not in self.models:
            return web.json_response({"error": {"message": "no such model"}}, status=404)
        return await super()._answer(request, seen)


def vllm_pairs(number: int = 1) -> list[FakeVllmEngine]:
    leases: dict[str, list[int]] = {}
    return [
        FakeVllmEngine(f"{role}-{index}", role, leases)
        for role in ("prefill", "decode")
        for index in range(number)
    ]
