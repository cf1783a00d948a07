"""Chooses routes by what they are estimated to cost (``cost_model.py``)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from operator import itemgetter

import msgspec

from pdlaunch.protocol.control import PairReady
from pdlaunch.router.cost_model import (
    Estimate,
    Load,
    RouteKind,
    Work,
    estimate_alone,
    estimate_decode,
    estimate_pair,
    estimate_prefill,
    load_of,
)
from pdlaunch.router.engine import Engine, EngineKey
from pdlaunch.router.exposure import Exposure
from pdlaunch.router.health import may_pull, survey
from pdlaunch.router.policy import (
    WAITS,
    LeastWork,
    PrefixIndex,
    Route,
    RoutingRequest,
    covers,
    may_tell_early,
)

TRIED_AFTER = 32
"""Choices after which an engine that rests while others work is chosen, whatever it may cost, and
refusals by engines that all rest after which a request is sent, as late as it may come: one request
in so many is what it may cost to find out that estimates are wrong.
"""


class LeastCost:
    """Gives a new prompt the route of the least estimated cost (``cost_model.py``).

    ``max_ttft_s`` and ``max_itl_s`` come first: routes that exceed them least. What costs cannot
    decide is left to ``LeastWork``: prompts of which an engine has failed, all that comes after the
    first route, and deployments with an engine that tells no costs.

    Costs refuse what comes too late in any case, with ``prefers_pairs`` too, which leaves all
    choices to ``LeastWork``.

    It remembers what it was asked: how many prompts streams have met, and which engines rest. The
    same questions in the same order have the same answers.
    """

    def __init__(
        self,
        *,
        max_ttft_s: float | None = None,
        max_itl_s: float | None = None,
        prefers_pairs: bool = False,
    ) -> None:
        self.prefers_pairs = prefers_pairs
        self._max_ttft_s = max_ttft_s
        self._max_itl_s = max_itl_s
        self._otherwise = LeastWork()
        self._exposure = Exposure()
        self._unused: Counter[EngineKey] = Counter()
        """Choices since an engine that rests was last chosen."""
        self._num_refused = 0
        """Requests that were refused while all engines rested, since one was not."""

    def choose(
        self,
        request: RoutingRequest,
        engines: Sequence[Engine],
        pairs: Sequence[PairReady],
        index: PrefixIndex,
        now_at: float,
    ) -> Route:
        if request.hop == "prefill":
            cheapest = self._cheapest(request, engines, pairs, index, now_at)
            if cheapest is not None:
                return cheapest
            if (silent := self._try_of_silent(request, engines, now_at)) is not None:
                return silent
        return self._otherwise.choose(request, engines, pairs, index, now_at)

    def _cheapest(
        self,
        request: RoutingRequest,
        engines: Sequence[Engine],
        pairs: Sequence[PairReady],
        index: PrefixIndex,
        now_at: float,
    ) -> Route | None:
        """Return the best route, or what says that all are too late; None: costs cannot decide."""
        if all(engine.costs is None for engine in engines):
            return None
        health = survey(engines, now_at)
        usable = health.usable
        loads = [load for one in usable.values() if (load := load_of(one, now_at)) is not None]
        if not loads or len(loads) != len(usable):
            return None
        loads = [load for load in loads if load.engine.key not in request.tried]
        decides = self._decides(request)
        if decides:
            num_cached = max(_num_cached(request, load, index) for load in loads)
            self._exposure.arrives(request.num_prompt_tokens - num_cached, loads)
        exposure = self._exposure.of_prefill(loads)
        of_pairs = [*_estimates_of_pairs(request, loads, pairs, index, now_at)]
        if not decides and of_pairs and request.max_tokens != 1:
            estimates = of_pairs  # the ones that come first then
        else:
            estimates = [*_estimates_alone(request, loads, index, exposure), *of_pairs]
        if not estimates:
            return None
        # An engine tells better what is wrong with a prompt that is too long for it.
        fits = all(
            load.engine.max_model_len is None
            or request.num_prompt_tokens < load.engine.max_model_len
            for load in loads
        )
        in_time = _in_time(request, estimates)
        if not in_time and not fits:
            return None
        is_late = not in_time and self._tries_late(loads)
        if is_late:
            in_time = estimates
        if not in_time:
            soonest = min(estimates, key=partial(_end_s, _share_after_first(request)))
            if decides:
                self._exposure.take_back()
            reason = "no route ends before the deadline"
            return Route(reason=reason, too_late=soonest, left_out=health.left_out)
        if not decides:
            return None

        def rank(estimate: Estimate) -> tuple[bool, float, float, int]:
            first, last = usable[estimate.engines[0]], usable[estimate.engines[-1]]
            is_try = not wants_try.isdisjoint(estimate.engines) or _tries_pull(first, last, now_at)
            num_picks = first.num_picks + (last.num_picks if last is not first else 0)
            return not is_try, self._excess(estimate), estimate.cost_s, num_picks

        long_unused = self._long_unused(loads)
        wants_try = health.wants_try | long_unused
        best_of_kind: dict[RouteKind, tuple[tuple[bool, float, float, int], Estimate]] = {}
        for estimate in in_time:
            ranked, known = rank(estimate), best_of_kind.get(estimate.kind)
            if known is None or ranked < known[0]:
                best_of_kind[estimate.kind] = ranked, estimate
        (_, best), *others = sorted(best_of_kind.values(), key=itemgetter(0))
        for name in best.engines:
            self._unused.pop(usable[name].key, None)
        first, last = usable[best.engines[0]], usable[best.engines[-1]]
        is_pair = first is not last
        early = is_pair and may_tell_early(request, first) and covers(last.capabilities, WAITS)
        tries = health.wants_try & {*best.engines}
        if tries or _tries_pull(first, last, now_at):
            reason = "a try of what was left out"
        elif not long_unused.isdisjoint(best.engines):
            reason = "a try of what has rested for long"
        elif is_late:
            reason = "a try of estimates that nothing corrects"
        else:
            reason = "least excess of the limits" if self._excess(best) else "least cost"
        return Route(
            reason=reason,
            prefill=first if is_pair else None,
            decode=last if early or not is_pair else None,
            planned=last if is_pair else None,
            estimate=best,
            alternatives=tuple(estimate for _, estimate in others),
            tries=tries,
            left_out=health.left_out,
        )

    def take_over(
        self,
        request: RoutingRequest,
        prefill: Engine,
        engines: Sequence[Engine],
        pairs: Sequence[PairReady],
        index: PrefixIndex,
        now_at: float,
    ) -> Route | None:
        own = load_of(prefill, now_at)
        health = survey(engines, now_at)
        usable = [one for name, one in health.usable.items() if name not in health.wants_try]
        loads = [load for one in usable if (load := load_of(one, now_at)) is not None]
        if own is None or len(loads) != len(usable):
            return None
        if request.is_suspect or request.wants_pair or self.prefers_pairs:
            return None
        # Its own tokens are the last ones in the queue.
        num_own = request.num_prompt_tokens - _num_cached(request, own, index)
        own = msgspec.structs.replace(own, queued_tokens=own.queued_tokens - num_own)
        if own.queued_tokens <= 0:
            return None  # it has begun, or is about to
        others = [
            load
            for load in loads
            if load.engine is not prefill and load.engine.key not in request.tried
        ]
        here = [load for load in others if load.engine.role == "decode"]
        stays = _at_least_cost(_estimates_of_pairs(request, [own, *here], pairs, index, now_at))
        leaves = _at_least_cost(_estimates_alone(request, others, index))
        if stays is None or leaves is None or leaves.cost_s >= stays.cost_s:
            return None
        if self._excess(leaves) > self._excess(stays):
            return None
        taker = next(load.engine for load in others if load.engine.name == leaves.engines[0])
        reason = f"takes over what waits at {prefill.name}"
        return Route(reason=reason, decode=taker, estimate=leaves, alternatives=(stays,))

    def _decides(self, request: RoutingRequest) -> bool:
        """Tell whether costs decide where a prompt goes that nobody has computed."""
        is_new = not request.tried and not request.is_suspect
        return is_new and request.max_tokens != 1 and not (request.wants_pair or self.prefers_pairs)

    def _long_unused(self, loads: Sequence[Load]) -> set[str]:
        """Return the engines that rest while others work, and have not been chosen for long.

        What they tell of themselves may be wrong, and stays so until they are used.
        """
        rests = {load.engine.key: load.engine.name for load in loads if load.is_idle}
        works = len(rests) < len(loads)
        self._unused = Counter({key: self._unused[key] + works for key in rests})
        return {name for key, name in rests.items() if self._unused[key] >= TRIED_AFTER}

    def _try_of_silent(
        self, request: RoutingRequest, engines: Sequence[Engine], now_at: float
    ) -> Route | None:
        """Return a route to an engine that has told no costs for long, while others have: one that
        ``LeastWork`` never chooses would never tell any, and costs would never decide.
        """
        if not self._decides(request) or all(engine.costs is None for engine in engines):
            return None
        health = survey(engines, now_at)
        for engine in health.usable.values():
            if engine.costs is None:
                self._unused[engine.key] += 1
                if self._unused[engine.key] >= TRIED_AFTER and covers(
                    engine.capabilities, request.needs
                ):
                    self._unused[engine.key] = 0
                    reason = "a try of what has told no costs"
                    return Route(reason=reason, decode=engine, left_out=health.left_out)
        return None

    def _tries_late(self, loads: Sequence[Load]) -> bool:
        """Tell whether what comes too late is sent all the same, now and then.

        Where nothing runs, nothing shows that estimates are too long: all would be refused for
        ever.
        """
        if all(load.is_idle for load in loads):
            self._num_refused = (self._num_refused + 1) % TRIED_AFTER
            return self._num_refused == 0
        return False

    def _excess(self, estimate: Estimate) -> float:
        """Return by how much a route exceeds what was asked for, as shares of it."""
        limits = (
            (estimate.first_token_s, self._max_ttft_s),
            (estimate.itl_s, self._max_itl_s),
        )
        return sum(max(0.0, value / limit - 1) for value, limit in limits if limit is not None)


def _tries_pull(prefill: Engine, decode: Engine, now_at: float) -> bool:
    """Tell whether a route shows whether the pulls of a pair work again."""
    pulls = decode.pulls.get(prefill.key) if decode.pulls else None
    return pulls is not None and pulls.wants_try(now_at)


def _share_after_first(request: RoutingRequest) -> float:
    """Return the share of the usual answer's tokens, without the first, that a short one has."""
    num_tokens = _work(request).num_output_tokens
    least = min(request.least_tokens or 1.0, num_tokens)
    return max(0.0, least - 1) / max(1.0, num_tokens - 1)


def _end_s(share: float, estimate: Estimate) -> float:
    """Return the time to the end of an answer that has this share of tokens after its first."""
    return estimate.first_token_s + share * (estimate.total_s - estimate.first_token_s)


def _in_time(request: RoutingRequest, estimates: Sequence[Estimate]) -> Sequence[Estimate]:
    left_s = request.left_s
    if left_s is None:
        return estimates
    share = _share_after_first(request)
    return [estimate for estimate in estimates if _end_s(share, estimate) <= left_s]


def _work(request: RoutingRequest) -> Work:
    expected = request.expected_tokens or request.max_tokens or 1
    return Work(
        num_prompt_tokens=request.num_prompt_tokens,
        num_output_tokens=min(expected, request.max_tokens or expected),
        num_choices=request.num_choices,
    )


def _num_cached(request: RoutingRequest, load: Load, index: PrefixIndex) -> int:
    num_tokens = index.num_cached_tokens(load.engine, request.prefix)
    return min(num_tokens, request.num_prompt_tokens - 1)


def _estimates_alone(
    request: RoutingRequest, loads: Sequence[Load], index: PrefixIndex, exposure: float = 0.0
) -> Iterator[Estimate]:
    for load in loads:
        if covers(load.engine.capabilities, request.needs):
            yield estimate_alone(
                load,
                _work(request),
                _num_cached(request, load, index),
                exposure if load.engine.role == "prefill" else 0.0,
            )


def _estimates_of_pairs(
    request: RoutingRequest,
    loads: Sequence[Load],
    pairs: Sequence[PairReady],
    index: PrefixIndex,
    now_at: float,
) -> Iterator[Estimate]:
    work, speeds = _work(request), _gigabytes_per_s(pairs)
    decodes = {
        load.engine.name: (
            load.engine,
            estimate_decode(load, work, _num_cached(request, load, index)),
        )
        for load in loads
        if load.engine.role == "decode"
    }
    for load in loads:
        prefill, peers = load.engine, load.engine.peers
        if prefill.role != "prefill":
            continue
        computing = estimate_prefill(load, work, _num_cached(request, load, index))
        for name in decodes if peers is None else sorted(peers & decodes.keys()):
            decode, decoding = decodes[name]
            if may_pull(decode, prefill, now_at):
                speed = speeds.get((prefill.name, name), 0.0)
                yield estimate_pair(computing, decoding, speed)


def _gigabytes_per_s(pairs: Sequence[PairReady]) -> dict[tuple[str, str], float]:
    """Return the speed between the slowest ranks of engines, of prefill and decode, by name."""
    speeds: dict[tuple[str, str], float] = {}
    for pair in pairs:
        if pair.gigabytes_per_s is not None:
            names = pair.peer.partition("/")[0], pair.local.partition("/")[0]
            speeds[names] = min(pair.gigabytes_per_s, speeds.get(names, math.inf))
    return speeds


def _at_least_cost(estimates: Iterable[Estimate]) -> Estimate | None:
    return min(estimates, key=lambda estimate: estimate.cost_s, default=None)
