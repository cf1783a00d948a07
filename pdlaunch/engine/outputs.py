"""Collects what the server has to be told of requests."""

from __future__ import annotations

from pdlaunch.engine.request import Request
from pdlaunch.protocol.engine import (
    FinishReason,
    RequestFinished,
    TokenOutput,
    Tokens,
)
from pdlaunch.protocol.kv_params import RemoteKV


class RequestOutputs:
    """Holds messages for the server in their order; each request ends in one RequestFinished."""

    def __init__(self) -> None:
        self._items: list[Tokens | RequestFinished] = []

    def add_token(self, request: Request, token: TokenOutput) -> None:
        self._items.append(
            Tokens(
                request_id=request.request_id,
                tokens=[token],
                spans=request.spans.first_news(),
            )
        )

    def finish(
        self,
        request: Request,
        reason: FinishReason,
        *,
        tokens: list[TokenOutput] | None = None,
        stop_token_id: int | None = None,
        error: str | None = None,
        error_param: str | None = None,
        remote_kv: RemoteKV | None = None,
    ) -> None:
        """Add the end of a request; ``tokens`` are those that have not been added."""
        self._items.append(
            RequestFinished(
                request_id=request.request_id,
                reason=reason,
                tokens=tokens or [],
                stop_token_id=stop_token_id,
                error=error,
                error_param=error_param,
                num_cached_tokens=request.num_cached_tokens or 0,
                remote_kv=remote_kv,
                spans=request.spans.end(reason, request.num_output_tokens),
            )
        )

    def take(self) -> list[Tokens | RequestFinished]:
        """Return what was added since the last call, in order."""
        items, self._items = self._items, []
        return items
