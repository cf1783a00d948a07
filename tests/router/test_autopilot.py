"""When the autopilot changes a role, and that it does no harm; engines are simulated."""

import asyncio
import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.autopilot import ONE_TWO, TWO_ONE, Phase, Simulation, Speeds, goodput, simulate
from pdlaunch.config.roles import Role
from pdlaunch.config.shared_settings import AutopilotMode
from pdlaunch.errors import OverloadedError
from pdlaunch.protocol.bottleneck import HOLD_S, MAX_GAP_S, Look, decide
from pdlaunch.protocol.control import Answered, ChangeEngines
from pdlaunch.protocol.status import Bottleneck, DeploymentStatus
from pdlaunch.router.main import LOOK_EVERY_S, REFUSED_S, run_autopilot
from tests.cli import deployment_server
from tests.clock import FakeClock

NOTHING = Bottleneck(kind="nothing", why="w")
TO_PREFILL = Bottleneck(kind="prefill", why="w", engine="decode-1", role="prefill")
TO_DECODE = Bottleneck(kind="decode", why="w", engine="prefill-1", role="decode")
ENGINES = [("decode-0", "ready"), ("decode-1", "ready"), ("prefill-0", "ready")]


def looks(*found: Bottleneck) -> list[Look]:
    """Return looks every two seconds, the last one at 0."""
    first = (1 - len(found)) * LOOK_EVERY_S
    return [Look(first + number * LOOK_EVERY_S, each, ENGINES) for number, each in enumerate(found)]


def test_a_change_is_due_when_it_was_wanted_for_a_while() -> None:
    calm, num = [NOTHING] * 10, int(HOLD_S / LOOK_EVERY_S) + 1
    assert decide(looks(*calm, *[TO_PREFILL] * num), 0.0) == TO_PREFILL
    assert decide(looks(*calm, *[TO_PREFILL] * (num - 1)), 0.0) is None
    assert decide(looks(*calm, *[TO_DECODE] * num, TO_PREFILL), 0.0) is None
    assert decide(looks(*calm, *[TO_PREFILL] * num, NOTHING, TO_PREFILL), 0.0) is None
    assert decide(looks(*calm, *[NOTHING] * num), 0.0) is None
    assert decide([], 0.0) is None


@pytest.mark.parametrize("changed", range(16))
def test_no_change_is_due_soon_after_engines_have_changed(changed: int) -> None:
    seen = looks(*[TO_PREFILL] * 16)
    seen[changed] = seen[changed]._replace(engines=[("decode-0", "starting"), *ENGINES[1:]])
    assert decide(seen, 0.0) is None


def test_a_router_that_did_not_look_for_a_while_begins_anew() -> None:
    seen = looks(*[TO_PREFILL] * 16)
    assert decide(seen, MAX_GAP_S + 0.1) is None
    assert decide(seen[-14:], 0.0) == TO_PREFILL
    assert decide(seen[-12:], 0.0) is None
    assert decide([*seen[:5], *seen[8:]], 0.0) is None


@given(st.lists(st.sampled_from([NOTHING, TO_PREFILL, TO_DECODE]), min_size=16, max_size=40))
def test_noise_changes_nothing(found: list[Bottleneck]) -> None:
    due = decide(looks(*found), 0.0)
    if due is not None:
        assert {each.role for each in found[-int(HOLD_S / LOOK_EVERY_S) :]} == {due.role}


class Stage:
    """Always wants a change; only ``sleep`` moves its clock."""

    def __init__(self, error: str = "", *, raises: bool = False) -> None:
        self.clock = FakeClock(0.0)
        self.asked: list[tuple[float, ChangeEngines]] = []
        self.said: list[str] = []
        self._error, self._raises = error, raises

    async def sleep(self, seconds: float) -> None:
        self.clock.now += seconds
        if self.clock.now > 2 * REFUSED_S:
            raise asyncio.CancelledError

    async def look(self) -> DeploymentStatus:
        return deployment_server.deployment(bottleneck=TO_PREFILL)

    async def ask(self, command: ChangeEngines) -> Answered:
        self.asked.append((self.clock.now, command))
        if self._raises:
            raise OverloadedError("no answer", status=503)
        if not self._error:
            self.clock.now += 20.0
        return Answered(question=0, error=self._error)

    def run(self, mode: AutopilotMode) -> None:
        work = run_autopilot(
            mode, self.look, self.ask, self.said.append, clock=self.clock, sleep=self.sleep
        )
        with contextlib.suppress(asyncio.CancelledError):
            asyncio.run(work)


def test_it_asks_as_pdlaunch_role_does_and_pauses_five_times_as_long() -> None:
    stage = Stage()
    stage.run("on")
    (first_at, command), (second_at, _) = stage.asked[:2]
    assert (command.engine, command.role) == ("decode-1", "prefill")
    assert first_at <= HOLD_S
    assert 120.0 <= second_at - first_at <= 120.0 + HOLD_S
    assert stage.said[0] == "autopilot: w; "


@pytest.mark.parametrize("stage", [Stage("a command is under way"), Stage(raises=True)])
def test_after_a_refusal_it_waits_for_long(stage: Stage) -> None:
    stage.run("on")
    assert len(stage.asked) == 2
    assert stage.said[1].startswith("autopilot: decode-1: ")


def test_a_dry_run_only_speaks() -> None:
    stage = Stage()
    stage.run("dry-run")
    assert not stage.asked
    assert "would act" in stage.said[0]
    stage = Stage()
    stage.run("off")
    assert not stage.said


# With engines

SPEEDS = Speeds(
    prompt_tokens_per_s=2_000.0, token_s=0.02, stream_s=0.002, start_s=6.0, max_running=64
)
TTFT_S, ITL_S = 3.0, 0.08


def phase(seconds: float, prompts: float, tokens: float, rate: float = 2.0) -> Phase:
    """Return a load that needs so many engines for its prompts and its tokens."""
    num_tokens = prompts * SPEEDS.prompt_tokens_per_s / rate, tokens / SPEEDS.stream_s / rate
    return Phase(seconds, rate, *map(int, num_tokens))


def play(roles: tuple[Role, ...], phases: list[Phase], mode: AutopilotMode = "on") -> Simulation:
    played = simulate(roles, phases, mode, speeds=SPEEDS, tick_s=0.02)
    early = [each for each in played.requests if each.arrived_at < played.ends_at - 90]
    assert all(each.first_at for each in early) or mode == "off"
    return played


def good(played: Simulation) -> float:
    return goodput(played, TTFT_S, ITL_S)


@settings(max_examples=4)
@given(prompts=st.floats(0.1, 0.6), tokens=st.floats(0.1, 0.7))
def test_under_a_steady_load_that_fits_nothing_changes(prompts: float, tokens: float) -> None:
    assert play(ONE_TWO, [phase(120.0, prompts, tokens)]).changes == []


PREFILL_HEAVY, DECODE_HEAVY = phase(200.0, 1.5, 0.15), phase(200.0, 0.3, 1.1)


def test_it_corrects_a_split_with_too_few_decode_engines() -> None:
    turning = [PREFILL_HEAVY, DECODE_HEAVY] * 2
    piloted = play(TWO_ONE, turning)
    assert [role for *_, role in piloted.changes] == ["decode"]
    assert good(piloted) >= 1.15 * good(play(TWO_ONE, turning, "off"))
    # Decode engines compute the prompts that are too many for prefill.
    assert play(ONE_TWO, turning).changes == []


def test_a_load_that_turns_faster_than_engines_does_no_harm() -> None:
    turning = [phase(20.0, 1.5, 0.15), phase(20.0, 0.3, 1.1)] * 6
    for roles in ONE_TWO, TWO_ONE:
        piloted = play(roles, turning)
        assert len(piloted.changes) <= 2
        assert good(piloted) >= 0.95 * good(play(roles, turning, "off"))
