"""Measures until the verdict is clear, and writes its text."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import msgspec

from pdlaunch.bench.serve import ShowProgress
from pdlaunch.bench.verdict import search
from pdlaunch.bench.verdict.arms import Arm
from pdlaunch.bench.verdict.measure import Launches
from pdlaunch.bench.verdict.queueing import VISIT_SEEDS, predict
from pdlaunch.errors import PdlaunchError

_OF_CLIENTS = ("ttft_ms_median", "ttft_ms_p99", "itl_ms_median", "itl_ms_p99", "cached_share")
Choice = Literal["aggregated", "split", "no difference", "unknown"]


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """The advice as text, with the figures of every arm."""

    choice: Choice
    text: str
    winner: str | None  # the arm whose configuration file is written
    rows: list[dict[str, Any]]
    ruled_out: dict[str, str]  # arm that was not measured -> the reason
    note: str  # how accurate the predictions are


def find_verdict(
    race: search.Race,
    findings: search.Findings,
    launches: Launches,
    save: Callable[[search.Findings], None],
    show: ShowProgress,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Measure until the verdict is clear or the time is over. Adds each complete step to
    ``findings``, so that after Ctrl-C they still give a verdict.
    """
    _predict(race, findings, launches, show)
    while (step := race.next_step(findings)) is not None:
        arm, start_at = step.arm, clock()
        left_s = max(0.0, race.budget_s - findings.spent_s)
        what = f"{step.rate:.3g} requests/s" if step.rate else "measuring single engines"
        show(f"{arm.name}: {what}, about {left_s / 60:.0f} min left")
        try:
            launches.use(arm)
            findings.start_s = launches.start_s
            if step.rate:
                visit = (arm.name, step.visit)
                number = sum((probe.arm, probe.visit) == visit for probe in findings.probes)
                # Probes with the same number send the same requests to all arms.
                seed = number + VISIT_SEEDS * (step.visit - 1)
                findings.probes.append(asyncio.run(launches.probe(step, seed)))
            elif arm.num_both:
                findings.figures[arm.tp_size] = asyncio.run(launches.figures(arm))
            else:
                figures = findings.figures.get(arm.tp_size)
                step_s = figures.step_s(1) if figures else 0.0
                findings.hand_over_s = asyncio.run(launches.hand_over_s(step_s))
        except PdlaunchError as error:
            # Shortened, because a server's message may quote a whole prompt.
            findings.broken[arm.name] = str(error).partition("\n")[0][:200]
        findings.spent_s += clock() - start_at
        save(findings)
        _predict(race, findings, launches, show)


def _predict(
    race: search.Race, findings: search.Findings, launches: Launches, show: ShowProgress
) -> None:
    """Predict the arms, once single engines and a hand-over have been measured."""
    if race.predictions or race.next_single(findings) is not None:
        return
    hand_over_s, asked = findings.hand_over_s or 0.0, (launches.goals, race.attainment)
    jobs_at, policy = launches.load.jobs_at, launches.policy
    for arm in race.arms:
        if figures := findings.figures.get(arm.tp_size):
            show(f"{arm.name}: predicting its goodput")
            found = predict(arm, figures, hand_over_s, jobs_at, *asked, policy)
            race.predictions[arm.name] = found


def answer(race: search.Race, findings: search.Findings, ruled_out: Mapping[str, str]) -> Verdict:
    """Return the verdict on the measurements. ``ruled_out``: arms that cannot be launched."""
    measured = race.estimates(findings)
    # Sorted by goodput; arms that met the goals at no rate come last.
    order = sorted(measured, key=lambda a: (measured[a].bound == "less than", -measured[a].rate))
    by_name = {arm.name: arm for arm in race.arms}
    best: dict[str, str] = {}
    for name in order:
        best.setdefault(by_name[name].kind, name)
    limits = {name: _limit(findings.probes, name, race.attainment) for name in order}
    choice, text = _verdict(best, measured, limits)
    winner = best.get("split" if choice == "split" else "aggregated")
    if winner is not None and choice != "unknown" and limits[winner]:
        text += f" {winner} is limited by: {limits[winner]}."
    left = {arm.name: "the search ended earlier" for arm in race.arms if arm.name not in measured}
    rows = [_row(by_name[name], measured[name], race, findings, limits[name]) for name in order]
    out = {**left, **ruled_out, **race.ruled_out(findings), **findings.broken}
    winner = None if choice == "unknown" else winner
    note = _note(race, measured)
    return Verdict(choice=choice, text=text, winner=winner, rows=rows, ruled_out=out, note=note)


def _verdict(
    best: Mapping[str, str], measured: Mapping[str, search.Estimate], limits: Mapping[str, str]
) -> tuple[Choice, str]:
    said = {kind: f"{name} gives {measured[name]} requests/s" for kind, name in best.items()}
    if len(best) < 2:
        known = f"; {next(iter(said.values()))} within the SLO" if said else ""
        return "unknown", f"No verdict: both kinds must be measured{known}."
    together, split = measured[best["aggregated"]], measured[best["split"]]
    best_split = f"the best split, {best['split']}, gives {split}"
    if search.is_sure(together, split):
        return "aggregated", f"Stay aggregated: {said['aggregated']} within your SLO; {best_split}."
    if search.is_sure(split, together):
        other = f"the best aggregated, {best['aggregated']}, gives {together}"
        return "split", f"Split: {said['split']} within your SLO; {other}."
    failed = [name for name in best.values() if measured[name].bound == "less than"]
    if failed:
        lowest = min(failed, key=lambda name: measured[name].rate)
        return "unknown", (
            f"No verdict: no rate that was tried met the goals with {' or '.join(failed)}; the "
            f"lowest was {measured[lowest].rate:.3g} requests/s (limited by: {limits[lowest]})."
        )
    if together.bound and split.bound:
        both = f"{said['aggregated']}, and {said['split']}"
        why = f"every rate that was tried met the goals: {both}"
        return "unknown", f"No verdict: {why}. Set tighter goals, or give more --minutes."
    return "no difference", (
        f"No difference beyond the noise: {said['aggregated']} within your SLO, and {best_split}. "
        "Stay aggregated: that is simpler."
    )


def _row(
    arm: Arm, measured: search.Estimate, race: search.Race, findings: search.Findings, limit: str
) -> dict[str, Any]:
    # The figures of clients at the highest probed rate up to the goodput.
    mine = [probe for probe in findings.probes if probe.arm == arm.name]
    good = [probe for probe in mine if probe.rate <= measured.rate * 1.01]
    row = max(good, key=lambda probe: probe.rate).row if good else None
    error = race.error(arm.name, measured)
    return {
        "arm": arm.name,
        "bound": measured.bound or "-",
        "goodput": measured.rate,
        "at_least": None if measured.bound else measured.low,
        "at_most": None if measured.bound else measured.high,
        "a_device": measured.rate / arm.num_devices,
        **{name: getattr(row, name, None) for name in _OF_CLIENTS},
        "limited_by": limit or "-",
        "predicted": race.predictions.get(arm.name),
        "error_percent": None if error is None else round(100 * error),
    }


def _limit(probes: Sequence[search.Probe], name: str, attainment: float) -> str:
    """Return the cause of missed goals at the lowest rate that failed."""
    found = [probe for probe in probes if probe.arm == name and probe.limit]
    failed = [probe for probe in found if not probe.passes(attainment)] or found
    return min(failed, key=lambda probe: probe.rate).limit if failed else ""


def _note(race: search.Race, measured: Mapping[str, search.Estimate]) -> str:
    found = {name: race.error(name, value) for name, value in measured.items()}
    errors = {name: error for name, error in found.items() if error is not None}
    if not errors:
        return "No prediction could be compared with a measured goodput."
    name = max(errors, key=lambda each: abs(errors[each]))
    worst = f"its largest error is {errors[name]:+.0%}, for {name}"
    if abs(errors[name]) > search.MAX_ERROR:
        wrong = f"does not fit these engines: {worst}"
        return f"The queueing model {wrong}. It only chose which {search.MAX_ARMS} arms to measure."
    return f"The queueing model fits these engines: {worst}."
