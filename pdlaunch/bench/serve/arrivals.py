"""Says when requests are sent whose clients do not wait for each other."""

from __future__ import annotations

import math
import random
from itertools import accumulate


def arrival_times(
    rate: float, burstiness: float, num_requests: int, rng: random.Random
) -> list[float]:
    """Return the seconds from the start at which requests are sent, ``rate`` a second on average.

    The pauses between them are gamma distributed of shape ``burstiness``, as vLLM's benchmark has
    them: 1 is a Poisson process, less comes in bursts, infinity comes evenly.
    """
    if math.isinf(burstiness):
        pauses = [1 / rate] * (num_requests - 1)
    else:
        scale = 1 / (rate * burstiness)
        pauses = [rng.gammavariate(burstiness, scale) for _ in range(num_requests - 1)]
    return list(accumulate(pauses, initial=0.0))
