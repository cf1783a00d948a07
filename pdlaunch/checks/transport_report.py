"""What was measured between the ranks of a launch; filled after the handshake, judged by the PD5xx
rules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Allocator = Literal["host", "cuda", "cumem", "expandable_segments"]


@dataclass(frozen=True, slots=True)
class PairTransport:
    """One decode rank reading from one prefill rank."""

    puller: str
    """``decode-0/rank-0``"""
    holder: str
    """``prefill-0/rank-0``"""
    path: str
    """``nixl/UCX``, ``p2p/memfd`` and such: the one in use."""
    allocator: Allocator
    """What the KV cache of the holder is allocated with."""
    gigabytes_per_s: float | None = None
    """None: too few bytes moved to tell, or nothing could be moved."""
    expected_gigabytes_per_s: float | None = None
    """What a good path over the link between the two gives; None: not known."""
    link: str = ""
    """The link, in words: ``18 NVLinks with 478 GB/s``."""
    error: str | None = None
    """Why nothing could be moved."""
    bytes_equal: bool = True
    """What arrived is what was sent."""
    other_paths: Mapping[str, str] = field(default_factory=dict)
    """How fast the paths are that are not in use, or why they cannot be."""


@dataclass(frozen=True, slots=True)
class TransportReport:
    """Every pair of a launch that was measured."""

    pairs: tuple[PairTransport, ...]
