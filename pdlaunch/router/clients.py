"""Identifies clients by their API keys, and enforces the limits of each key."""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from aiohttp import web

from pdlaunch.errors import OverloadedError, RequestError
from pdlaunch.http.app import bearer_token
from pdlaunch.protocol.process.bootstrap import ClientKey
from pdlaunch.router.fair_queue import Flow, Turn
from pdlaunch.router.metrics import RouterMetrics

_CLIENT = web.RequestKey("client", object)
_MINUTE_S = 60.0


class Client:
    """Counts the running prompts of one key, and the tokens that it may still use.

    The tokens refill evenly over a minute. A request may overdraw them; later requests are refused
    until they are positive again.
    """

    def __init__(self, key: ClientKey, metrics: RouterMetrics, clock: Callable[[], float]) -> None:
        self.name = key.name
        self.flow = Flow[Turn](key.weight)
        self.num_running = 0
        self._key = key
        self._metrics = metrics
        self._clock = clock
        self._left = float(key.tokens_per_minute or 0)
        # For each running request: a function that returns the charged tokens not used so far
        self._unused: list[Callable[[], int]] = []
        self._counted_at = clock()
        for name in ("requests", "prompt_tokens", "generation_tokens", "queue_seconds"):
            self._count(f"key_{name}", by=0)
        for limit in ("max_concurrent", "tokens_per_minute"):
            self._count("key_refusals", limit, by=0)

    @contextmanager
    def admit(
        self, num_prompts: int, num_tokens: int, used: Callable[[], tuple[int, int]]
    ) -> Iterator[None]:
        """Count a request while the block runs. Raises OverloadedError (429).

        ``num_tokens``: estimate for the prompts and answers, charged at once. ``used`` returns the
        real prompt and output tokens at the end; the difference is given back.
        """
        self._check(num_prompts)
        self._count("key_requests")
        self.num_running += num_prompts
        self._left -= num_tokens

        def unused() -> int:
            return num_tokens - sum(used())

        self._unused.append(unused)
        try:
            yield
        finally:
            self.num_running -= num_prompts
            self._unused.remove(unused)
            num_prompt_tokens, num_output_tokens = used()
            self._left += num_tokens - num_prompt_tokens - num_output_tokens
            self._count("key_prompt_tokens", by=num_prompt_tokens)
            self._count("key_generation_tokens", by=num_output_tokens)

    def waited(self, seconds: float) -> None:
        self._count("key_queue_seconds", by=seconds)

    def _check(self, num_prompts: int) -> None:
        key = self._key
        if key.max_concurrent and self.num_running + num_prompts > key.max_concurrent:
            raise self._refused(
                "max_concurrent",
                f"has {self.num_running} prompts in flight; at most {key.max_concurrent} are "
                "served at a time",
            )
        if key.tokens_per_minute is None:
            return
        tokens_per_s = key.tokens_per_minute / _MINUTE_S
        now_at = self._clock()
        self._left += (now_at - self._counted_at) * tokens_per_s
        self._left = min(self._left, float(key.tokens_per_minute))
        self._counted_at = now_at
        if self._left <= 0:
            # Running requests will give back their unused tokens, so these do not count.
            num_missing = -self._left - sum(unused() for unused in self._unused)
            raise self._refused(
                "tokens_per_minute",
                f"has used its {key.tokens_per_minute} tokens per minute",
                retry_after_s=math.ceil(num_missing / tokens_per_s),
            )

    def _refused(self, limit: str, text: str, retry_after_s: int = 1) -> OverloadedError:
        self._count("key_refusals", limit)
        message = f"the API key {self.name!r} {text} ({limit} of this key)"
        return OverloadedError(message, retry_after_s=max(1, retry_after_s), code=limit)

    def _count(self, name: str, *labels: str, by: float = 1) -> None:
        if self.name:
            self._metrics.count(name, self.name, *labels, by=by)


class Clients:
    """Holds the clients of a router. ``check`` verifies keys; None: the router has no keys."""

    def __init__(
        self, keys: Sequence[ClientKey], metrics: RouterMetrics, clock: Callable[[], float]
    ) -> None:
        self._by_hash = {key.sha256: Client(key, metrics, clock) for key in keys}
        # Clients without a key: the router has no keys, or they use the admin socket.
        self._anonymous = Client(ClientKey(name="", sha256=""), metrics, clock)
        self.check = self._check if keys else None

    def __iter__(self) -> Iterator[Client]:
        return iter(self._by_hash.values())

    def of(self, http: web.Request) -> Client:
        client = http.get(_CLIENT, self._anonymous)
        assert isinstance(client, Client)
        return client

    def _check(self, http: web.Request) -> None:
        # Looked up by hash, so the time reveals nothing about similar keys.
        client = self._by_hash.get(hashlib.sha256(bearer_token(http)).hexdigest())
        if client is None:
            message = "the API key is missing or wrong"
            raise RequestError(message, status=401, code="invalid_api_key")
        http[_CLIENT] = client
