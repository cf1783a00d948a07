"""Says what a version of an engine can do."""

from __future__ import annotations

import re

import msgspec

from pdlaunch.protocol.control import Capabilities

TELLS_TOKEN_IDS_SINCE = (0, 11)
"""``return_token_ids``, without which no router knows the tokens so far."""


def with_version(capabilities: Capabilities, version: str) -> Capabilities:
    """Return the capabilities with those that depend on ``version``: ``0.32.0+cpu``."""
    if capabilities.kind != "vllm":
        return msgspec.structs.replace(capabilities, version=version)
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    return msgspec.structs.replace(
        capabilities, version=version, continues=numbers >= TELLS_TOKEN_IDS_SINCE
    )
