"""Chooses the next measurement, and evaluates the measurements: pure functions.

Arms take turns (A B B A), so that no arm gains from drift of the machine. Each visit of an arm is a
bisection over request rates. All probes of an arm together give its goodput with an interval.
"""

import math
import random
import statistics
from collections.abc import Sequence
from typing import Literal

import msgspec

from pdlaunch.bench.serve import BenchRow
from pdlaunch.bench.verdict.arms import Arm
from pdlaunch.bench.verdict.queueing import EngineFigures

MAX_ERROR = 0.2  # predictions with a larger relative error are not trusted
_KEPT_SHARE = 0.6  # arms predicted below this share of the best are ruled out
MAX_ARMS = 5
_FIRST_FACTOR, _LATER_FACTOR = 1.4, 1.2  # first steps of a bisection
_PRECISION = 1.06  # narrower brackets are not divided
_DRIFT = 1.15  # an arm is dropped after one visit if even this factor would not make it the best
_MIN_PROBES, _MIN_OPEN_PROBES = 2, 5
# Largest factor between the goodput and the nearest probed rate: _OPEN if all probes passed or all
# failed, _SLOPE if this is so only in a bootstrap draw (shares fall from 1 to 0 within about 1.2).
_OPEN, _SLOPE = 2.0, 1.2
_NUM_DRAWS = 200
_NUM_BLOCKS = 6
_SURE = 0.95


class Probe(msgspec.Struct, frozen=True, kw_only=True):
    """A measurement at one rate: which requests met the goals."""

    arm: str
    visit: int
    rate: float
    met: list[bool]  # in the order of arrival, without the warm-up
    seconds: float
    row: BenchRow
    limit: str = ""  # the most frequent cause of missed goals

    def passes(self, attainment: float) -> bool:
        return sum(self.met) >= attainment * len(self.met)


class Estimate(msgspec.Struct, frozen=True):
    """A goodput in requests per second, with its bootstrap draws."""

    rate: float
    draws: list[float]
    # Set if all measured rates passed ("at least") or all failed; ``rate`` is then the nearest one
    bound: Literal["", "at least", "less than"] = ""

    @property
    def low(self) -> float:
        return sorted(self.draws)[round(0.05 * (len(self.draws) - 1))]

    @property
    def high(self) -> float:
        return sorted(self.draws)[round(0.95 * (len(self.draws) - 1))]

    def __str__(self) -> str:
        if self.bound:
            return f"{self.bound} {self.rate:.3g}"
        return f"{self.rate:.3g} ({self.low:.3g} to {self.high:.3g})"


class Step(msgspec.Struct, frozen=True):
    """The next measurement of an arm. ``rate`` 0: measure single engines, or a hand-over."""

    arm: Arm
    visit: int = 0
    rate: float = 0.0


class Findings(msgspec.Struct, kw_only=True):
    """All measurements; ``--resume`` reads them from a file."""

    figures: dict[int, EngineFigures] = {}  # by TP size
    hand_over_s: float | None = None
    probes: list[Probe] = []
    ended: list[tuple[str, int]] = []  # complete visits: arm, number of the visit
    broken: dict[str, str] = {}  # failed arm -> the reason
    spent_s: float = 0.0
    start_s: float = 0.0  # start time of the latest arm


def estimate(probes: Sequence[Probe], attainment: float) -> Estimate | None:
    """Return the goodput of an arm from its probes."""
    points = [(probe.rate, probe.met) for probe in probes if probe.met]
    if not points:
        return None
    rng = random.Random(len(points))
    middle, bound = _crossing(points, attainment, _OPEN)
    reach = _OPEN if bound else _SLOPE
    draws = []
    for _ in range(_NUM_DRAWS):
        resampled = [(rate, _resampled(met, rng)) for rate, met in points]
        draws.append(_crossing(resampled, attainment, reach, rng)[0])
    return Estimate(middle, draws, bound)


def _resampled(met: Sequence[bool], rng: random.Random) -> list[bool]:
    """Draw blocks of consecutive requests, because queues make neighbours depend on each other."""
    size = max(1, len(met) // _NUM_BLOCKS)
    starts = [rng.randrange(len(met)) for _ in range(-(-len(met) // size))]
    return [met[(start + place) % len(met)] for start in starts for place in range(size)]


def _crossing(
    points: Sequence[tuple[float, Sequence[bool]]],
    attainment: float,
    reach: float,
    rng: random.Random | None = None,
) -> tuple[float, Literal["", "at least", "less than"]]:
    """Return the rate at which the share of good requests falls below ``attainment``.

    Pooling adjacent violators makes the share fall with the rate. With ``rng``, the result is drawn
    at random between the two probed rates around it, because nothing between them was measured.
    """
    pools: list[tuple[float, int, list[float]]] = []  # good requests, requests, rates
    for rate, met in sorted(points, key=lambda point: point[0]):
        pools.append((sum(met), len(met), [rate]))
        while len(pools) > 1:
            (good, number, rates), (more, others, later) = pools[-2:]
            if more * number <= good * others and later[0] > rates[-1]:
                break
            pools[-2:] = [(good + more, number + others, rates + later)]
    shares = [(rate, good / number) for good, number, rates in pools for rate in rates]
    passed = [each for each in shares if each[1] >= attainment]
    failed = [each for each in shares if each[1] < attainment]
    below, share = passed[-1] if passed else (failed[0][0] / reach, 1.0)
    above, lower = failed[0] if failed else (passed[-1][0] * reach, attainment - 0.1)
    if rng is None and not failed:
        return below, "at least"
    if rng is None and not passed:
        return above, "less than"
    place = (share - attainment) / (share - lower) if rng is None else rng.random()
    return below * (above / below) ** place, ""


def next_rate(probes: Sequence[Probe], guess: float, attainment: float, factor: float) -> float:
    """Return the next rate of a visit's bisection; 0 if its bracket is narrow enough."""
    if not probes:
        return guess
    good = [probe.rate for probe in probes if probe.passes(attainment)]
    bad = [probe.rate for probe in probes if not probe.passes(attainment)]
    # Several probes in one direction: the guess is far off.
    far = factor if len(probes) < 3 else factor**2
    if not bad:
        return max(good) * far
    if not good:
        return min(bad) / far
    # A rate may fail by chance below one that passes: the bracket ends at the lowest failure.
    low = max((rate for rate in good if rate < min(bad)), default=min(bad) / factor)
    return 0.0 if min(bad) / low <= _PRECISION else math.sqrt(min(bad) * low)


def is_sure(one: Estimate, other: Estimate) -> bool:
    """Return whether the first goodput is higher in nearly all draws."""
    if one.bound == "less than" or other.bound == "at least":
        return False
    won = [mine > theirs for mine, theirs in zip(one.draws, reversed(other.draws), strict=True)]
    return sum(won) >= _SURE * len(won)


class Race(msgspec.Struct, frozen=True):
    """The arms and their predictions; chooses which arms to measure, and in which order."""

    arms: Sequence[Arm]
    attainment: float
    budget_s: float
    probe_s: float
    limit_s: float = math.inf  # the search ends after this time, once both kinds were measured
    predictions: dict[str, float] = {}  # arm -> goodput, once single engines are measured

    def next_single(self, findings: Findings) -> Step | None:
        """Return the next step for single engines or a hand-over; None: all are measured."""
        usable = [arm for arm in self.arms if arm.name not in findings.broken]
        for arm in usable:
            if arm.num_both and arm.tp_size not in findings.figures:
                return Step(arm)
            if arm.num_prefill and findings.hand_over_s is None:
                return Step(arm)
        return None

    def next_step(self, findings: Findings) -> Step | None:
        """Return the next step; None if the verdict is final. Ends visits in ``findings``."""
        if len({arm.kind for arm in self.arms if arm.name not in findings.broken}) < 2:
            return None
        if (step := self.next_single(findings)) is not None:
            return step
        while pending := self._pending_visits(findings):
            arm, visit = pending[0]
            if rate := self._next_rate(findings, arm, visit, len(pending)):
                return Step(arm, visit, rate)
            findings.ended.append((arm.name, visit))
        return None

    def estimates(self, findings: Findings) -> dict[str, Estimate]:
        found = {}
        for name in (arm.name for arm in self.arms if arm.name not in findings.broken):
            probes = [probe for probe in findings.probes if probe.arm == name]
            if (value := estimate(probes, self.attainment)) is not None:
                found[name] = value
        return found

    def error(self, name: str, measured: Estimate) -> float | None:
        """Return the relative error of a prediction; None if the error is unknown."""
        if name not in self.predictions or measured.bound:
            return None
        return self.predictions[name] / measured.rate - 1

    def ruled_out(self, findings: Findings) -> dict[str, str]:
        """Return arm -> reason for arms that are skipped because of their prediction."""
        known = {arm.name: self.predictions.get(arm.name, math.inf) for arm in self.arms}
        best = max(self.predictions.values(), default=0.0)
        order = sorted(self.arms, key=lambda arm: -known[arm.name])
        # If the model was wrong about a measured arm, its other predictions are not used.
        measured = self.estimates(findings).items()
        errors = [self.error(*each) or 0.0 for each in measured if (each[0], 1) in findings.ended]
        is_wrong = any(abs(error) > MAX_ERROR for error in errors)
        least = 0.0 if is_wrong else _KEPT_SHARE * best
        kept = {arm.name for arm in order[:MAX_ARMS] if known[arm.name] >= least}
        # The verdict compares the two kinds, so the best arm of each kind stays.
        for kind in ("aggregated", "split"):
            kept |= {arm.name for arm in [each for each in order if each.kind == kind][:1]}
        out = {name: rate for name, rate in self.predictions.items() if name not in kept}
        if is_wrong:
            return dict.fromkeys(out, "no time")
        text = "predicted {:.3g} requests/s, {:.0%} below the best"
        return {name: text.format(rate, 1 - rate / best) for name, rate in out.items()}

    def _pending_visits(self, findings: Findings) -> list[tuple[Arm, int]]:
        out = self.ruled_out(findings)
        racing = [arm for arm in self.arms if arm.name not in {*out, *findings.broken}]
        racing.sort(key=lambda arm: -self.predictions.get(arm.name, math.inf))
        names = {probe.arm for probe in findings.probes}
        begun = [arm for arm in racing if arm.name in names]
        if findings.spent_s >= self.budget_s and len({arm.kind for arm in begun}) > 1:
            if findings.spent_s >= self.limit_s:
                return []
            # The time is over, and both kinds have begun: begin no further arms.
            racing = begun
        first = [(arm, 1) for arm in racing if (arm.name, 1) not in findings.ended]
        if first:
            return first + [(arm, 2) for arm in reversed(racing)]
        found = self.estimates(findings)
        best = max((value.low for value in found.values()), default=0.0)
        left = [arm for arm in racing if arm.name in found and found[arm.name].high * _DRIFT > best]
        if len(left) < 2:
            return []
        return [(arm, 2) for arm in reversed(left) if (arm.name, 2) not in findings.ended]

    def _next_rate(self, findings: Findings, arm: Arm, visit: int, num_pending: int) -> float:
        probes = [each for each in findings.probes if each.arm == arm.name]
        here = [probe for probe in probes if probe.visit == visit]
        before = estimate([probe for probe in probes if probe.visit < visit], self.attainment)
        taken_s = sum(probe.seconds for probe in here)
        slot_s = (self.budget_s - findings.spent_s + taken_s) / num_pending - findings.start_s
        expected_s = statistics.mean([probe.seconds for probe in here] or [self.probe_s])
        # If all rates pass, or all fail, the goodput has only a bound, and there is no verdict.
        is_open = len({probe.passes(self.attainment) for probe in probes}) < 2
        least = _MIN_OPEN_PROBES if is_open else _MIN_PROBES
        is_over = findings.spent_s >= self.limit_s
        if here and (is_over or (len(here) >= least and taken_s + expected_s > slot_s)):
            return 0.0
        # A prediction far below the best may be wrong, and a probe at such a low rate is slow.
        floor = max(self.predictions.values(), default=float(arm.num_devices)) / 4
        floor = max(floor, 1 / self.probe_s)  # at this rate, five requests take a whole visit
        guess = before.rate if before else max(self.predictions.get(arm.name, 0.0), floor)
        factor = _LATER_FACTOR if before else _FIRST_FACTOR
        return next_rate(here, guess, self.attainment, factor)
