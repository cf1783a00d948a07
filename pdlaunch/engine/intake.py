"""Requests as they arrive: what becomes of a message, and which ones this engine can never
serve.
"""

from __future__ import annotations

from pdlaunch.engine.request import Request
from pdlaunch.kvcache.hashing import BlockHasher, root_hash
from pdlaunch.kvcache.manager import KVCacheManager
from pdlaunch.protocol.engine import AddRequest


class Intake:
    """Makes the scheduler's requests and knows the engine's limits."""

    def __init__(
        self, kv: KVCacheManager, *, block_size: int, max_model_len: int, model_digest: str
    ) -> None:
        self._kv = kv
        self._block_size = block_size
        self._max_model_len = max_model_len
        self._model_digest = model_digest
        self._num_arrived = 0

    def new_request(self, message: AddRequest) -> Request:
        """The next request in order of arrival."""
        output_limit = min(
            message.sampling.max_tokens, self._max_model_len - len(message.prompt_token_ids)
        )
        if message.do_remote_decode:
            # The lease is on the prompt: later tokens would push its blocks out of the windows.
            output_limit = min(output_limit, 1)
        hasher = BlockHasher(
            root_hash(self._model_digest, cache_salt=message.cache_salt), self._block_size
        )
        self._num_arrived += 1
        return Request(message, self._num_arrived, output_limit, self._kv.new_tables(), hasher)

    def refusal(self, request: Request) -> str | None:
        """Why this engine can never serve the request; None when it can."""
        if request.num_prompt_tokens == 0:
            return "the prompt has no tokens"
        if request.num_prompt_tokens >= self._max_model_len:
            return (
                f"the prompt has {request.num_prompt_tokens} tokens, max_model_len is "
                f"{self._max_model_len}: "
                "no room for an output token; shorten the prompt or raise max_model_len"
            )
        # The last output token is never computed.
        num_tokens = request.num_prompt_tokens + request.output_limit - 1
        num_needed, num_blocks = self._kv.min_blocks(num_tokens), self._kv.pool.num_blocks
        if num_needed > num_blocks:
            return (
                f"the request's {num_tokens} tokens need {num_needed} KV blocks, the engine has "
                f"{num_blocks}; "
                "lower max_tokens or raise kv_cache_memory"
            )
        return None
