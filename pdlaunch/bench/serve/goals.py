"""Goals for a request's times, and which requests meet them: goodput."""

from __future__ import annotations

import math

import msgspec

from pdlaunch.bench.serve.timed_completion import TimedCompletion

_ITL_SHARE = 0.99
_UNITS = {"ms": 1.0, "s": 1000.0, "": 1.0}


class Goals(msgspec.Struct, frozen=True, kw_only=True):
    """Holds upper limits in milliseconds; None: any time will do."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    """Mean time between the tokens of a request."""
    itl_ms: float | None = None
    """99 of 100 times between tokens of a request, the first gap included."""
    e2e_ms: float | None = None
    """Time from the request to its last token."""

    def __bool__(self) -> bool:
        return self != Goals()

    def __str__(self) -> str:
        return ", ".join(
            f"{name.removesuffix('_ms')} {limit:g} ms"
            for name, limit in msgspec.structs.asdict(self).items()
            if limit is not None
        )

    def met_by(self, completion: TimedCompletion) -> bool:
        """Tell whether a request was answered without an error and within all limits."""
        if completion.error is not None:
            return False
        gaps_s = sorted(completion.all_gaps_s)
        within = gaps_s[: math.ceil(_ITL_SHARE * len(gaps_s))]
        took_s = {
            "ttft_ms": completion.ttft_s,
            "tpot_ms": sum(gaps_s) / len(gaps_s) if gaps_s else 0.0,
            "itl_ms": within[-1] if within else 0.0,
            "e2e_ms": completion.e2e_s,
        }
        limits = msgspec.structs.asdict(self)
        return all(
            limits[name] is None or seconds * 1000 <= limits[name]
            for name, seconds in took_s.items()
        )


def read_goals(text: str) -> Goals:
    """Read ``ttft=200,itl=0.05s``; numbers without a unit are milliseconds.

    Raises ValueError that says what is wrong.
    """
    found: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        known = [field.removesuffix("_ms") for field in Goals.__struct_fields__]
        if name not in known:
            raise ValueError(f"{name!r} is none of {', '.join(known)}")
        number = value.removesuffix("s").removesuffix("m")
        try:
            limit = float(number) * _UNITS[value.removeprefix(number)]
        except (ValueError, KeyError):
            limit = math.nan
        if not 0 < limit < math.inf:
            raise ValueError(f"{value!r} is no time such as 200, 200ms or 0.2s")
        found[f"{name}_ms"] = limit
    return Goals(**found)
