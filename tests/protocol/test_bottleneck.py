"""Which role limits a deployment, and which change would help."""

from typing import Any

import msgspec
import pytest

from pdlaunch.protocol.bottleneck import bottleneck_line, find_bottleneck
from pdlaunch.protocol.status import (
    Bottleneck,
    DeploymentStatus,
    EngineStatus,
    Percentiles,
    Pulls,
    Rates,
)
from tests.cli import deployment_server


def rates(token_ms: float | None = 10.0, streams: float = 1.0) -> Rates:
    first_ms = Percentiles(p50=100.0, p95=100.0)
    fields = {"first_token_ms": first_ms, "mean_inter_token_ms": token_ms, "streams": streams}
    return msgspec.structs.replace(deployment_server.rates(1.0), **fields)


LONE, SLOW = rates(10.0, streams=1.0), rates(50.0, streams=40.0)
READING = {"running": 1, "waiting": 0, "kv_usage": 0.1, "pulls": Pulls()}


def engine(name: str, reading: dict[str, Any] | None = None, **fields: Any) -> EngineStatus:
    """Return an engine that does little; its name begins with its role."""
    found = deployment_server.engine(name, name.partition("-")[0], prompt_tokens_per_s=1000.0)
    told = msgspec.structs.replace(found.reading, **(READING | (reading or {})))
    return msgspec.structs.replace(found, reading=told, **fields)


DEFAULTS = {"rates": LONE, "fastest": LONE, "routing": "pairs"}


def status(*engines: EngineStatus, **fields: Any) -> DeploymentStatus:
    return deployment_server.deployment(*engines, **(DEFAULTS | fields))


PREFILL, DECODE, BOTH = (engine(f"{role}-0") for role in ("prefill", "decode", "both"))
BUSY = {"computing": 1.0, "waiting_prompt_tokens": 3200.0}
FULL = engine("decode-0", {"running": 8}, max_running=8)
NO_MEMORY = engine("decode-0", {"kv_usage": 0.97, "waiting": 2})
SLOW_PULLS = engine("decode-0", {"pulls": Pulls(mean_s=0.4)})
HALF_BUSY = status(engine("prefill-0", computing=0.5), DECODE, queued_prompt_tokens=5000)


@pytest.mark.parametrize(
    ("seen", "limit"),
    [
        (status(PREFILL, DECODE), "nothing: prefill load 0%"),
        (
            status(engine("prefill-0", **BUSY), DECODE),
            "prefill: prompts wait 3.2 s, prefill load 132%",
        ),
        (HALF_BUSY, "prefill: prompts wait 5.0 s, prefill load 100%"),
        (
            status(PREFILL, DECODE, rates=SLOW),
            "decode: a token takes 50.0 ms, 10.0 ms with few streams",
        ),
        (status(PREFILL, FULL), "decode: 8 of at most 8 requests run, 0 wait"),
        (status(PREFILL, NO_MEMORY), "kv_memory: the decode KV caches are 100% full, 2 wait"),
        (status(PREFILL, SLOW_PULLS), "transfer: a pull takes 400 ms, the first token 100 ms"),
        (status(engine("both-0", **BUSY)), "prefill: prompts wait 3.2 s"),
        (status(BOTH, rates=SLOW), "decode: a token takes 50.0 ms"),
        (status(engine("prefill-0", {"age_s": 11.0}), DECODE), "unknown: no metrics of prefill-0"),
        (status(engine("prefill-0", state="starting")), "unknown: no pair of engines is ready"),
    ],
)
def test_what_limits(seen: DeploymentStatus, limit: str) -> None:
    found, (kind, why) = find_bottleneck(seen), limit.split(": ")
    assert found.kind == kind
    assert why in found.why
    assert why in bottleneck_line(found)
    assert not found.engine


PREFILL_HEAVY = (engine("prefill-0", **BUSY), engine("decode-0"), engine("decode-1", load=0))
DECODE_HEAVY = (engine("prefill-0", load=0), engine("prefill-1", computing=0.3), engine("decode-0"))


def test_a_role_that_can_spare_an_engine_gives_one() -> None:
    found = find_bottleneck(status(*PREFILL_HEAVY))
    assert (found.engine, found.role) == ("decode-1", "prefill")
    assert found.advice == (
        "after `pdlaunch role decode-1 prefill`: prefill load 66%, decode load 20%"
    )
    found = find_bottleneck(status(*DECODE_HEAVY, rates=SLOW))
    assert (found.engine, found.role) == ("prefill-0", "decode")


@pytest.mark.parametrize(
    ("seen", "reason"),
    [
        (status(*PREFILL_HEAVY[:2]), "the only decode engine must stay"),
        (status(*DECODE_HEAVY[1:], rates=SLOW), "the only prefill engine must stay"),
        # 40 streams of two engines, and the speed of a lone stream is unknown
        (status(*PREFILL_HEAVY, rates=SLOW, fastest=None), "decode load 190%"),
        (status(*PREFILL_HEAVY, rates=SLOW, fastest=SLOW), "decode load 190%"),
        (status(*PREFILL_HEAVY, rates=rates(18.0, streams=9)), "decode load 89%"),
        (status(*PREFILL_HEAVY, engine("decode-2", state="sleeping")), "decode-2 is not ready"),
        (status(*PREFILL_HEAVY[:2], engine("decode-1", health="open")), "decode-1 is not ready"),
        (status(*PREFILL_HEAVY[:2], engine("decode-1", num_devices=2)), "differ in size"),
    ],
)
def test_an_engine_that_cannot_be_spared_stays(seen: DeploymentStatus, reason: str) -> None:
    found = find_bottleneck(seen)
    assert not found.engine
    assert reason in found.advice
    assert "`pdlaunch scale " in found.advice


def test_prompts_that_spill_over_to_decode_limit_only_when_decode_is_busy() -> None:
    def found(computing: float) -> Bottleneck:
        engines = (engine(f"decode-{number}", computing=computing) for number in range(2))
        return find_bottleneck(status(PREFILL_HEAVY[0], *engines, routing="load"))

    assert "decode load 10%, streams wait 30% of the time" in found(0.3).why
    assert found(0.6).kind == "prefill"
    # Another prefill engine would leave as much to a single decode engine.
    assert not found(0.6).engine


def test_few_streams_are_never_much_however_slow_the_machine_is() -> None:
    slow = rates(500.0, streams=2.0)
    found = find_bottleneck(status(*PREFILL_HEAVY, rates=slow, fastest=LONE))
    assert found.engine == "decode-1"
