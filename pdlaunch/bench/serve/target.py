"""Opens the deployment that a benchmark drives: its URL, its model, its longest context."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import aiohttp
import msgspec

from pdlaunch.bench.serve.timed_completion import describe_failure, read_refusal
from pdlaunch.errors import PdlaunchError
from pdlaunch.launch.client.api import check_url


class BenchTarget(msgspec.Struct, frozen=True):
    """Names a deployment that answers."""

    session: aiohttp.ClientSession
    model: str
    max_model_len: int | None
    """Longest context in tokens; None: the deployment does not say."""

    def check_length(self, input_tokens: int, output_tokens: int) -> None:
        """Raise PdlaunchError when such a request cannot fit."""
        if self.max_model_len is None or input_tokens + output_tokens <= self.max_model_len:
            return
        raise PdlaunchError(
            f"a prompt of {input_tokens} tokens and {output_tokens} tokens of output are "
            f"{input_tokens + output_tokens}, but "
            f"{self.model!r} is served with max_model_len {self.max_model_len}: ask for fewer "
            "tokens, or serve it with a larger "
            "--max-model-len if the model allows it"
        )


@contextlib.asynccontextmanager
async def open_target(
    url: str, api_key: str | None, request_timeout_s: float
) -> AsyncIterator[BenchTarget]:
    """Ask the deployment at ``url`` for its model. Raises PdlaunchError when it cannot be used."""
    check_url(url)
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    timeout = aiohttp.ClientTimeout(total=request_timeout_s)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(
        url, headers=headers, timeout=timeout, connector=connector
    ) as session:
        yield BenchTarget(session, *await _first_model(session, url))


async def _first_model(session: aiohttp.ClientSession, url: str) -> tuple[str, int | None]:
    """Return the model's name, and the longest context if the deployment says so."""
    try:
        async with session.get("/v1/models") as response:
            if response.status != 200:
                raise PdlaunchError(f"{response.url} answers {await read_refusal(response)}")
            card = (await response.json(content_type=None))["data"][0]
            max_model_len = card.get("max_model_len")
            return str(card["id"]), max_model_len if isinstance(max_model_len, int) else None
    except (aiohttp.ClientError, TimeoutError) as error:
        raise PdlaunchError(
            f"{url} does not answer /v1/models: {describe_failure(error)}"
        ) from error
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise PdlaunchError(f"{url} answers /v1/models, but with no list of models") from error
