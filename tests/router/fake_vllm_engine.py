"""An engine of vLLM to a router: tokens are bytes of UTF-8, and the model writes ``script``.

What it has written so far is what stands behind the last ``|`` of its prompt, so that a prompt with
output goes on there. Leases are read once, by anybody who shares ``leases``.
"""

from __future__ import annotations

from typing import Any

import msgspec
from aiohttp import web

from pdlaunch.http.watch.engine_api import with_version
from pdlaunch.launch.engines.plan import capabilities_over_http
from pdlaunch.protocol.control import Role
from tests.router.fake_engine import FakeEngine, Seen

CAPABILITIES = with_version(capabilities_over_http("vllm"), "0.32.0")
SCRIPT = "Grüße 🙂 an alle, STOP und weiter"
CACHED_AT_PREFILL = 3


def text_of(ids: list[int]) -> str:
    return bytes(ids).decode("utf-8", errors="replace")


class FakeVllmEngine(FakeEngine):
    """``pulls=False``: it computes what it was handed blocks of. ``names_first_token``: its leases
    name the token that was drawn, as those of pdlaunch's connector.
    """

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

    async def _answer(self, request: web.Request, seen: Seen) -> web.StreamResponse:
        body, params = seen.body, seen.body.get("kv_transfer_params") or {}
        if self.status is not None:
            return web.Response(status=self.status, body=self.error_body)
        if body.get("stream") and body.get("use_beam_search"):
            self.leases.pop(params.get("remote_request_id", ""), None)
            return web.json_response({"error": {"message": "no beam search"}}, status=400)
        if body.get("model", "tiny") not in self.models:
            return web.json_response({"error": {"message": "no such model"}}, status=404)
        prompt = self._prompt(seen)
        pulled = 0
        if params.get("do_remote_prefill") and self.pulls:
            lent = self.leases.pop(params["remote_request_id"])
            pulled = len(lent)
            # With the first token, if the client has it.
            assert prompt in (lent, [*lent, params.get("first")])
        if self.hold_prefill and params.get("do_remote_decode"):
            self.holding.set()
            await self.go.wait()
        usage = {
            "prompt_tokens": len(prompt),
            "prompt_tokens_details": {
                "cached_tokens": CACHED_AT_PREFILL if params.get("do_remote_decode") else pulled
            },
        }
        chunks = self._chunks(body, prompt)
        if body.get("echo") and not body.get("return_token_ids"):
            # With ids the text of the prompt is left out.
            chunks[0]["text"] = text_of(prompt) + chunks[0]["text"]
            for chunk in chunks:
                del chunk["token_ids"]
            if body.get("max_tokens") == 0:
                chunks = [chunks[0] | {"text": text_of(prompt), "finish_reason": "length"}]
        if body.get("stream"):
            return await self._tell_stream(request, seen, chunks, usage, prompt)
        return self._whole(seen, chunks, usage, prompt)

    def _prompt(self, seen: Seen) -> list[int]:
        if seen.path.endswith("chat/completions"):
            content = seen.body["messages"][-1]["content"]
            return list(f"<chat>{content}|".encode())
        prompt = seen.body.get("prompt")
        return list(prompt.encode()) if isinstance(prompt, str) else prompt

    def _chunks(self, body: dict[str, Any], prompt: list[int]) -> list[dict[str, Any]]:
        """One token each, with what vLLM's detokenizer tells of it."""
        done = len(prompt) - 1 - max(at for at, token in enumerate(prompt) if token == ord("|"))
        left = list(self.script.encode())[done:]
        # A prompt that ends within a character is told with it.
        primed = prompt if text_of(prompt).endswith("\ufffd") else []
        limit = body.get("max_completion_tokens") or body.get("max_tokens") or 16
        chunks: list[dict[str, Any]] = []
        num_told, reason = 0, None
        for count in range(1, min(limit, len(left)) + 1):
            text = text_of(primed + left[:count])
            text = "" if text.endswith("\ufffd") else text
            whole = text or text_of(left[:count]).rstrip("\ufffd")
            if count == len(left):
                reason = "stop"
            elif count == limit:
                reason = "length"
            upto = max(num_told, len(whole))
            chunks.append(
                {
                    "text": whole[num_told:upto],
                    "token_ids": [left[count - 1]],
                    "finish_reason": reason,
                }
            )
            num_told = upto
        return chunks

    async def _tell_stream(
        self,
        request: web.Request,
        seen: Seen,
        chunks: list[dict[str, Any]],
        usage: dict[str, Any],
        prompt: list[int],
    ) -> web.StreamResponse:
        is_chat = seen.path.endswith("chat/completions")
        response = await self._open_stream(request)

        async def send(payload: dict[str, Any]) -> None:
            await response.write(b"data: " + msgspec.json.encode(payload) + b"\n\n")

        if is_chat:
            opening = {"index": 0, "delta": {"role": "assistant", "content": ""}}
            await send({"choices": [opening], "prompt_token_ids": prompt})
        async for num_sent, chunk in self._paced(request, chunks):
            choice = {"index": 0} | chunk
            if is_chat:
                delta = {"content": choice.pop("text")}
                choice["delta"] = self.message or delta
            elif not num_sent:
                choice["prompt_token_ids"] = prompt
            await send({"choices": [choice]})
        ends = {"completion_tokens": len(chunks), "total_tokens": len(prompt) + len(chunks)}
        await send({"choices": [], "usage": usage | ends})
        await response.write_eof(b"data: [DONE]\n\n")
        return response

    def _whole(
        self, seen: Seen, chunks: list[dict[str, Any]], usage: dict[str, Any], prompt: list[int]
    ) -> web.Response:
        choice: dict[str, Any] = {
            "index": 0,
            "text": "".join(chunk["text"] for chunk in chunks),
            "token_ids": [token_id for chunk in chunks for token_id in chunk.get("token_ids", ())],
            "finish_reason": chunks[-1]["finish_reason"],
        }
        if seen.path.endswith("chat/completions"):
            text = choice.pop("text")
            choice["message"] = self.message or {"role": "assistant", "content": text}
        answer: dict[str, Any] = {
            "choices": [choice | {"index": index} for index in range(seen.body.get("n") or 1)],
            "usage": usage | {"completion_tokens": len(chunks), "total_tokens": 0},
            "system_fingerprint": "fake",
        }
        if seen.is_prefill:
            lease = f"{self.name}-{len(self.seen)}"
            self.leases[lease] = prompt
            answer["kv_transfer_params"] = {
                "do_remote_prefill": True,
                "remote_request_id": lease,
                "remote_prefill_cached_tokens": CACHED_AT_PREFILL,
                "first": choice["token_ids"][0],
            }
            if self.names_first_token:
                first = {"token_id": choice["token_ids"][0]}
                answer["kv_transfer_params"]["pdlaunch"] = {"first_tokens": [first]}
        if seen.body.get("return_token_ids"):
            answer["prompt_token_ids"] = prompt
        return web.json_response(answer)


def vllm_pairs(number: int = 1) -> list[FakeVllmEngine]:
    leases: dict[str, list[int]] = {}
    return [
        FakeVllmEngine(f"{role}-{index}", role, leases)
        for role in ("prefill", "decode")
        for index in range(number)
    ]
