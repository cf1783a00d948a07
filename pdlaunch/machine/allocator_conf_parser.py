"""Walks the text of PYTORCH_ALLOC_CONF as torch 2.13 does, and refuses what torch refuses.

torch has two parsers, one for the keys of every device and one for CUDA's own. Each walks the whole
text and passes over the other's keys. What stands between key and value, or behind a value, is
counted and not looked at: ``expandable_segments,True`` is accepted. A build without CUDA has the
first parser alone, which then passes over all keys that it does not know.

Source: c10/core/AllocatorConfig.h, and the parsers in libc10 and libc10_cuda of torch 2.13.0+cu130,
compared over 200,000 texts. torch 2.11.0+cu130 does the same on an H200, but for the keys
``pinned_max_round_threshold_mb``, ``pinned_max_cached_size_mb``, ``pinned_free_catch_all`` and
``throw_on_cudamalloc_oom``, some of which it does not know yet.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Mapping

EXPANDABLE_SEGMENTS = "expandable_segments"
_BACKEND = "backend"
_DIVISIONS = "roundup_power2_divisions"
_LARGE_SEGMENT = "large_segment_size_mb"
_LARGE_SEGMENT_MB = 20
"""Default of ``large_segment_size_mb``."""
_MAX_REGISTER_THREADS = 128

_TOKEN = re.compile(r"[,:\[\]]|[^,:\[\]]+")
_SPACE = re.compile(r"\s+", re.ASCII)
_INTEGER = re.compile(r"[+-]?[0-9]+")
_FLOAT = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?", re.IGNORECASE)
_HEX_FLOAT = re.compile(r"[+-]?0x([0-9a-f]+\.?[0-9a-f]*|\.[0-9a-f]+)(p[+-]?[0-9]+)?", re.IGNORECASE)
_HAS_DIGIT = re.compile(r"[+-]?(0x[0.]*[1-9a-f]|[0.]*[1-9])", re.IGNORECASE)
"""Begins a number that is not 0."""
_MEANT_AS_TRUE = frozenset({"true", "1", "yes", "on"})
_MAX_SIZE = 2**64 - 1


class ConfRefused(Exception):
    """torch refuses the text; the message says which key or value, and why."""


class ConfWalk:
    """Walks one text. The methods raise ConfRefused."""

    def __init__(self, text: str) -> None:
        self.expandable_segments = False
        """The last value that was met; what is meant as True counts as True."""
        self.backend: str | None = None
        """The backend that ``at_import`` has met."""
        self._tokens: list[str] = _TOKEN.findall(_SPACE.sub("", text))
        self._large_segment_mb = _LARGE_SEGMENT_MB
        self._sizes: list[tuple[str, str]] = []
        """Keys and values that may not be less than a large segment."""

    def of_all_devices(self) -> None:
        """Walk as the parser for the keys of every device does."""
        self._walk(_OF_ALL_DEVICES)
        # The last large_segment_size_mb counts, wherever it stands.
        for key, value in self._sizes:
            if _whole(key, value) < self._large_segment_mb:
                raise ConfRefused(f"{key}:{_shown(value)} is less than {self._large_segment_mb}")

    def of_cuda(self) -> None:
        """Walk as the parser for CUDA's own keys does."""
        self._walk(_OF_CUDA)

    def at_import(self) -> None:
        """Walk as libc10_cuda does when it is loaded: up to the backend, without a look at keys."""
        position = 0
        while position < len(self._tokens):
            key = self._tokens[position]
            if key == _BACKEND:
                self.backend = self._token(key, position + 2)
                return
            position = self._end_of_value(key, position + 2) + 2

    def _walk(self, own: Mapping[str, Check]) -> None:
        position = 0
        while position < len(self._tokens):
            key = self._tokens[position]
            if key not in _KEYS:
                raise ConfRefused(_unknown(key))
            # key, separator, value or list, separator
            at_value = position + 2
            if key not in own:
                end = self._end_of_value(key, at_value)
            elif key == _DIVISIONS:
                end = self._check_divisions(at_value)
            else:
                end = at_value
                self._check(key, self._token(key, at_value), own[key])
            position = end + 2

    def _check(self, key: str, value: str, check: Check) -> None:
        if key == EXPANDABLE_SEGMENTS:
            self.expandable_segments = value.lower() in _MEANT_AS_TRUE
        check(key, value)
        if key == _LARGE_SEGMENT:
            self._large_segment_mb = _whole(key, value)
        elif key in _NOT_BELOW_LARGE_SEGMENT:
            self._sizes.append((key, value))

    def _check_divisions(self, position: int) -> int:
        """Check ``[256:1,512:2,>:4]``, or one value for all sizes; return where it ends."""
        if self._token(_DIVISIONS, position) != "[":
            _power_of_two(_DIVISIONS, self._tokens[position], or_zero=False)
            return position
        position += 1
        while position < len(self._tokens) and self._tokens[position] != "]":
            size, divisions = (self._token(_DIVISIONS, at) for at in (position, position + 2))
            _power_of_two(_DIVISIONS, divisions, or_zero=True)
            if size != ">":
                _power_of_two(_DIVISIONS, size, or_zero=False)
            ends_list = self._token(_DIVISIONS, position + 3) == "]"
            position += 3 if ends_list else 4
        return position

    def _end_of_value(self, key: str, position: int) -> int:
        if self._token(key, position) != "[":
            return position
        if "]" not in self._tokens[position:]:
            raise ConfRefused(f"the list of {key} has no end: a ] is missing")
        return self._tokens.index("]", position)

    def _token(self, key: str, position: int) -> str:
        if position >= len(self._tokens):
            raise ConfRefused(f"the text ends where a value of {key} is expected")
        return self._tokens[position]


Check = Callable[[str, str], None]
"""Checks the value of a key: key and value; raises ConfRefused."""


def _check_bool(key: str, value: str) -> None:
    if value not in ("True", "False"):
        raise ConfRefused(f"{key}:{_shown(value)} is neither True nor False")


def _check_whole(key: str, value: str) -> None:
    _whole(key, value)


def _check_positive(key: str, value: str) -> None:
    if _whole(key, value) == 0:
        raise ConfRefused(f"{key}:{_shown(value)} is not more than 0")


def _check_large_segment(key: str, value: str) -> None:
    if _whole(key, value) <= 10:
        raise ConfRefused(f"{key}:{_shown(value)} is not more than 10")


def _check_threads(key: str, value: str) -> None:
    _power_of_two(key, value, or_zero=False)
    if _whole(key, value) > _MAX_REGISTER_THREADS:
        raise ConfRefused(f"{key}:{_shown(value)} is more than {_MAX_REGISTER_THREADS}")


def _check_threshold(key: str, value: str) -> None:
    if not 0.0 < _number(key, value) < 1.0:
        raise ConfRefused(f"{key}:{_shown(value)} is not between 0 and 1")


def _check_share(key: str, value: str) -> None:
    if not 0.0 <= _number(key, value) <= 1.0:
        raise ConfRefused(f"{key}:{_shown(value)} is not between 0 and 1")


def _check_backend(key: str, value: str) -> None:
    if value not in ("native", "cudaMallocAsync"):
        raise ConfRefused(f"{key}:{_shown(value)} is neither native nor cudaMallocAsync")


_NOT_BELOW_LARGE_SEGMENT = frozenset({"max_split_size_mb", "max_non_split_rounding_mb"})
_OF_ALL_DEVICES: Mapping[str, Check] = {
    _LARGE_SEGMENT: _check_large_segment,
    **dict.fromkeys(_NOT_BELOW_LARGE_SEGMENT, _check_whole),
    "garbage_collection_threshold": _check_threshold,
    _DIVISIONS: _check_whole,
    EXPANDABLE_SEGMENTS: _check_bool,
    "pinned_use_background_threads": _check_bool,
    "pinned_max_round_threshold_mb": _check_whole,
    "pinned_max_cached_size_mb": _check_whole,
}
_OF_CUDA: Mapping[str, Check] = {
    _BACKEND: _check_backend,
    "release_lock_on_cudamalloc": _check_bool,
    "release_lock_on_hipmalloc": _check_bool,
    "pinned_use_cuda_host_register": _check_bool,
    "pinned_use_hip_host_register": _check_bool,
    "pinned_num_register_threads": _check_threads,
    "pinned_reserve_segment_size_mb": _check_positive,
    "graph_capture_record_stream_reuse": _check_bool,
    "per_process_memory_fraction": _check_share,
    "pinned_free_catch_all": _check_bool,
    "throw_on_cudamalloc_oom": _check_bool,
}
_KEYS = frozenset({*_OF_ALL_DEVICES, *_OF_CUDA})


def _power_of_two(key: str, value: str, *, or_zero: bool) -> None:
    number = _whole(key, value)
    if number.bit_count() != 1 and not (or_zero and number == 0):
        raise ConfRefused(f"{key}: {_shown(value)} is no power of 2")


def _whole(key: str, value: str) -> int:
    """Read a number as ``std::stoull`` does: digits, then anything; a negative one wraps."""
    match = _INTEGER.match(value)
    number = int(match[0]) if match else None
    if number is None or abs(number) > _MAX_SIZE:
        raise ConfRefused(f"{key}:{_shown(value)} is no number")
    return number % (_MAX_SIZE + 1)


def _number(key: str, value: str) -> float:
    """Read a number as ``std::stod`` does: a number, then anything."""
    if match := _HEX_FLOAT.match(value):
        number = float.fromhex(match[0])
    elif match := _FLOAT.match(value):
        number = float(match[0])
    else:
        # stod takes infinities and NaN for numbers; they are out of every range.
        raise ConfRefused(f"{key}:{_shown(value)} is no number")
    too_small = abs(number) < sys.float_info.min and _HAS_DIGIT.match(match[0]) is not None
    if number in (float("inf"), -float("inf")) or too_small:
        raise ConfRefused(f"{key}:{_shown(value)} is out of range")
    return number


def _unknown(key: str) -> str:
    if key in (",", ":", "[", "]"):
        return f"{key!r} stands where a key is expected"
    name = key.strip("\"'").partition("=")[0]
    near = difflib.get_close_matches(name.lower(), sorted(_KEYS), n=1)
    hint = f"; did you mean {near[0]}:...?" if near else ""
    return f"{_shown(key)} is no key that torch knows{hint}"


def _shown(value: str) -> str:
    """Return a key or value for messages; the environment may hold anything."""
    return ascii(value[:40])
