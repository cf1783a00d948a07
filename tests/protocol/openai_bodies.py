"""Bodies of requests, parsed, for tests of what the request models accept."""

from __future__ import annotations

import pytest

from pdlaunch.errors import RequestError
from pdlaunch.protocol.openai.body import parse_request
from pdlaunch.protocol.openai.requests import ChatCompletionRequest, CompletionRequest

USER = [{"role": "user", "content": "hi"}]
TEXT = {"type": "text", "text": "hi"}


def completion(public: bool = False, **fields) -> CompletionRequest:
    return parse_request(CompletionRequest, {"prompt": "x"} | fields, public=public)


def chat(**fields) -> ChatCompletionRequest:
    return parse_request(ChatCompletionRequest, {"messages": USER} | fields, public=False)


def refusal(make, **fields) -> RequestError:
    with pytest.raises(RequestError) as caught:
        make(**fields)
    return caught.value
