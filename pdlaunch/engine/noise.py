"""Makes the noise that decides sampled tokens: a pure function of (seed, choice, index, number).

The host hashes (seed, choice, index) to one key for each row. The device hashes key and number
(SplitMix64) to a uniform number, and turns that into an exponentially distributed one. No generator
keeps a state.
"""

from __future__ import annotations

import hashlib
import struct

import torch

_SEED_MASK = 2**64 - 1
_INCREMENT = 0x9E3779B97F4A7C15 - 2**64
_FIRST_FACTOR = 0xBF58476D1CE4E5B9 - 2**64
_SECOND_FACTOR = 0x94D049BB133111EB - 2**64
_UNIFORM_BITS = 52
"""One bit fewer than a double holds: the middle of each interval then differs from 0 and 1, whose
logarithms, minus infinity and 0, are no use as noise.
"""


def draw_key(seed: int, choice: int, index: int) -> int:
    """Return the key that decides output token ``index`` of a choice: BLAKE2b-64 of three
    little-endian u64, as a signed number.
    """
    message = struct.pack("<QQQ", seed & _SEED_MASK, choice, index)
    return int.from_bytes(hashlib.blake2b(message, digest_size=8).digest(), "little", signed=True)


def uniform_noise(keys: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Return float64 [num_rows, n] in (0, 1).

    ``keys``: [num_rows] int64; ``numbers``: [n] or [num_rows, n] int64.
    """
    mixed = keys[:, None] + numbers * _INCREMENT
    mixed = (mixed ^ _shift_right(mixed, 30)) * _FIRST_FACTOR
    mixed = (mixed ^ _shift_right(mixed, 27)) * _SECOND_FACTOR
    mixed = mixed ^ _shift_right(mixed, 31)
    # From the middle of the lowest interval on; both steps are exact.
    return (mixed >> (64 - _UNIFORM_BITS)).double() * 2.0**-_UNIFORM_BITS + (
        0.5 + 2.0 ** -(_UNIFORM_BITS + 1)
    )


def exponential_noise(keys: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Return exponential noise. The argmax of weights / noise falls on each weight with a
    probability in proportion to it.

    The arguments are those of ``uniform_noise``.
    """
    return -uniform_noise(keys, numbers).log()


def _shift_right(numbers: torch.Tensor, num_bits: int) -> torch.Tensor:
    """Shift as if the numbers were unsigned, for which torch has no operation."""
    return (numbers >> num_bits) & ((1 << (64 - num_bits)) - 1)
