"""The whole search on simulated arms: verdicts, predictions and its end."""

import asyncio
from collections.abc import Sequence

import msgspec
import pytest

from pdlaunch.bench.serve import TraceRequest
from pdlaunch.bench.timed_completion import Goals
from pdlaunch.bench.verdict.arms import Arm, all_arms
from pdlaunch.bench.verdict.measure import Load
from pdlaunch.bench.verdict.queueing import predict
from pdlaunch.bench.verdict.search import Findings, Race
from pdlaunch.bench.verdict.verdict import Verdict, answer, find_verdict
from tests.bench.verdict.simulated_arms import HAND_OVER_S, SimulatedLaunches, play

# A prompt of 96 tokens takes 0.27 s, a step 40 ms: a prompt beside streams breaks the first ITL.
TIGHT, LOOSE = Goals(ttft_ms=1000, itl_ms=130), Goals(ttft_ms=1000, itl_ms=1000)
ARMS, ARMS_OF_FOUR = ([arm for arm in all_arms(n) if arm.tp_size == 1] for n in (2, 4))


def load_of(seed: int = 0, probe_s: float = 12.0) -> Load:
    return Load(requests=[TraceRequest(96, 16, 0.0)], probe_s=probe_s, seed=seed)


def run(
    launches: SimulatedLaunches,
    arms: Sequence[Arm] = ARMS,
    budget_s: float = 120.0,
    findings: Findings | None = None,
    ruled_out: dict[str, str] | None = None,
) -> tuple[Verdict, Findings]:
    race = Race(arms, 0.9, budget_s, launches.load.probe_s, 1.5 * budget_s)
    findings = findings or Findings()
    spent_s = findings.spent_s
    shown: list[str] = []
    find_verdict(race, findings, launches, lambda _: None, shown.append, launches.clock)
    told = [arm.name for arm in arms if f"{arm.name}: predicting its goodput" in shown]
    assert told == list(race.predictions), "it takes seconds"
    left = [int(line.split()[-3]) for line in shown if line.endswith(" min left")]
    assert left == sorted(left, reverse=True)
    assert left[0] == round((budget_s - spent_s) / 60)
    return answer(race, findings, ruled_out or {}), findings


@pytest.mark.parametrize(("goals", "right"), [(TIGHT, "split"), (LOOSE, "aggregated")])
def test_the_verdict_is_right_in_two_minutes_on_a_machine_that_slows_down(
    goals: Goals, right: str
) -> None:
    choices = []
    for seed in range(5):
        launches = SimulatedLaunches(load_of(seed), goals, seed, drift=0.03)
        choices.append(run(launches)[0].choice)
        assert launches.now_at < 180
    assert choices == [right] * 5


@pytest.mark.parametrize(
    ("arm", "goals"),
    [
        (Arm(1, num_both=2), LOOSE),
        (Arm(1, num_both=3), LOOSE),
        (Arm(1, num_prefill=1, num_decode=1), TIGHT),
        (Arm(1, num_prefill=2, num_decode=1), TIGHT),
        (Arm(1, num_prefill=2, num_decode=2), LOOSE),
    ],
)
def test_a_prediction_is_within_a_fifth_of_an_arm_that_was_not_measured(
    arm: Arm, goals: Goals
) -> None:
    launches = SimulatedLaunches(load_of(probe_s=60.0), goals, 0)
    figures = asyncio.run(launches.figures(arm))
    told = predict(arm, figures, HAND_OVER_S, launches.load.jobs_at, goals, 0.9)
    good = []
    for rate in (0.8 * told, 1.25 * told):
        done = [
            each
            for seed in range(4)
            for each in play(arm, launches.load.jobs_at(rate, seed), seed, 1.0)
        ]
        good.append(sum(map(goals.met_by, done)) / len(done))
    assert good[0] >= 0.9 > good[1], (told, good)


def test_of_four_devices_the_best_split_is_found_and_the_hopeless_one_is_not_started() -> None:
    launches = SimulatedLaunches(load_of(), TIGHT, 1)
    found, findings = run(launches, ARMS_OF_FOUR, 300.0, ruled_out={"4 x TP2": "no"})
    assert found.choice == "split"
    assert found.winner == "2P2D"
    assert "below the best" in found.ruled_out["1P3D"]
    assert found.ruled_out["4 x TP2"] == "no"
    assert "1P3D" not in {probe.arm for probe in findings.probes}
    assert {"4 x TP1", "2P2D"} <= {probe.arm for probe in findings.probes}
    assert launches.now_at < 400


def test_without_right_predictions_no_arm_is_ruled_out() -> None:
    launches = SimulatedLaunches(load_of(), TIGHT, 1, misjudged=3.0)
    found, findings = run(launches, ARMS_OF_FOUR, 300.0)
    assert {probe.arm for probe in findings.probes} == {arm.name for arm in ARMS_OF_FOUR}
    assert not found.ruled_out
    assert "does not fit" in found.note


def test_an_arm_that_does_not_start_is_named_and_the_others_are_measured() -> None:
    launches = SimulatedLaunches(load_of(), TIGHT, 1, broken=["2P2D"])
    found, _ = run(launches, ARMS_OF_FOUR, 300.0)
    assert found.ruled_out["2P2D"] == "a rank died"
    assert found.winner == "3P1D"


def test_goals_that_no_rate_meets_give_no_verdict_in_little_more_than_the_time() -> None:
    launches = SimulatedLaunches(load_of(), Goals(ttft_ms=1), 1)
    found, findings = run(launches)
    last_s = [probe.seconds + launches.start_s for probe in findings.probes[-2:]]
    assert max(last_s) < 120
    assert launches.now_at - sum(last_s) < 1.5 * 120, "the last probe of each kind may be late"
    assert (found.choice, found.winner) == ("unknown", None)
    assert "no rate that was tried met the goals with " in found.text
    lowest = min(probe.rate for probe in findings.probes)
    assert f"the lowest was {lowest:.3g} requests/s (limited by: p" in found.text
    assert {row["bound"] for row in found.rows} == {"less than"}
    assert {row["error_percent"] for row in found.rows} == {None}
    assert found.note.startswith("No prediction")


def test_goals_that_every_rate_meets_bound_the_goodput_from_below() -> None:
    found, _ = run(SimulatedLaunches(load_of(), Goals(ttft_ms=1e8), 1))
    assert (found.choice, found.winner) == ("unknown", None)
    assert found.text.count(" gives at least ") == 2
    assert "every rate that was tried met the goals" in found.text


def test_an_arm_that_breaks_later_does_not_win() -> None:
    _, findings = run(SimulatedLaunches(load_of(), TIGHT, 1))
    findings.broken["1P1D"] = "a rank died"
    found = answer(Race(ARMS, 0.9, 120.0, 12.0), findings, {})
    assert (found.choice, found.winner) == ("unknown", None)
    assert found.ruled_out["1P1D"] == "a rank died"
    race = Race(ARMS, 0.9, 120.0, 12.0)
    assert race.next_step(findings) is None, "nothing is left to compare"


def test_measuring_goes_on_after_any_step_as_if_it_had_not_been_interrupted() -> None:
    whole, findings = run(SimulatedLaunches(load_of(), TIGHT, 1))
    for num_steps in (1, 4):
        launches = SimulatedLaunches(load_of(), TIGHT, 1, num_steps=num_steps)
        race, partly = Race(ARMS, 0.9, 120.0, 12.0), Findings()
        with pytest.raises(KeyboardInterrupt):
            find_verdict(race, partly, launches, lambda _: None, lambda _: None, launches.clock)
        assert answer(race, partly, {}).text
        kept = msgspec.json.decode(msgspec.json.encode(partly), type=Findings)
        resumed, after = run(SimulatedLaunches(load_of(), TIGHT, 1), findings=kept)
        assert resumed.choice == whole.choice
        rates = [(probe.arm, probe.visit, probe.rate) for probe in findings.probes]
        again = [(probe.arm, probe.visit, probe.rate) for probe in after.probes]
        assert again[:3] == rates[:3]
