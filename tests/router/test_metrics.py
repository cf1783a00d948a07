from __future__ import annotations

import re
from pathlib import Path

from pdlaunch.protocol.control import EndReason, PairReady, Registry
from pdlaunch.router.metrics import RouterMetrics
from tests.router.conftest import Stand
from tests.router.conftest import pair as pair_of_engines

NAME = "pdlaunch_pair_bytes_per_second"


def pair(local: str, path: str, speed: float) -> PairReady:
    return PairReady(
        local=local,
        peer="prefill-0/rank-0",
        peer_incarnation=1,
        seconds=0.1,
        path=path,
        gigabytes_per_s=speed,
    )


def value(metrics: RouterMetrics, sample: str) -> float | None:
    """The value of one sample of the page; None when it is not there."""
    for text in metrics.text().decode().splitlines():
        name, _, number = text.rpartition(" ")
        if name == sample:
            return float(number)
    return None


def test_every_metric_of_the_router_stands_in_the_docs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "operating.md").read_text()
    names = re.findall(r"^# TYPE (\S+)", RouterMetrics("m").text().decode(), re.MULTILINE)
    assert len(names) > 25
    for name in names:
        short = name.removeprefix("pdlaunch_router_").removesuffix("_total")
        assert re.search(rf"`(pdlaunch_router_)?{short}(_total)?[`{{]", page), name


def show(metrics: RouterMetrics, *pairs: PairReady, **ends: dict[EndReason, int]) -> list[str]:
    """Show a registry; return the lines of the pairs' speeds."""
    metrics.show_registry(Registry(version=1, entries=[], pairs=list(pairs), ends=ends))
    return [line for line in metrics.text().decode().splitlines() if line.startswith(NAME)]


async def test_failures_that_have_not_happened_are_there_with_0(stand: Stand) -> None:
    await stand.start(pair_of_engines())
    metrics = stand.metrics
    show(metrics, pair("decode-0/rank-0", "p2p/memfd", 9.5), router={"died": 0, "hung": 0})
    metrics.show(stand.pool, 0)
    for sample in (
        'pdlaunch_router_request_errors_total{model_name="tiny",status="503"}',
        'pdlaunch_router_request_success_total{finished_reason="error",model_name="tiny"}',
        'pdlaunch_router_engine_failures_total{engine="decode-0",hop="prefill"}',
        'pdlaunch_router_retries_total{hop="decode"}',
        'pdlaunch_router_canaries_total{outcome="failed"}',
        'pdlaunch_router_silent_recomputes_total{decode="decode-0",prefill="prefill-0"}',
        'pdlaunch_process_ends_total{process="router",reason="hung"}',
    ):
        assert value(metrics, sample) == 0, sample
    for sample in (
        'pdlaunch_router_engines{state="ready"}',
        "pdlaunch_router_engines_ready",
    ):
        assert value(metrics, sample) == 2
    assert value(metrics, 'pdlaunch_router_engine_health{engine="decode-0",state="closed"}') == 1


def test_second_tokens_are_counted_by_pair_and_by_the_paths_of_its_ranks() -> None:
    metrics = RouterMetrics("m")
    show(
        metrics,
        pair("decode-0/rank-0", "p2p/memfd", 9.5),
        pair("decode-0/rank-1", "nixl/UCX", 9.5),
        pair("decode-0/rank-2", "nixl/UCX", 9.5),
    )
    metrics.second_token("prefill-0", "decode-0", 0.02)
    metrics.second_token("prefill-1", "decode-0", 0.02)
    count = "pdlaunch_pair_second_token_seconds_count"
    for prefill, path in (("prefill-0", "nixl/UCX + p2p/memfd"), ("prefill-1", "unknown")):
        labels = f'{{decode="decode-0",path="{path}",prefill="{prefill}"}}'
        assert value(metrics, count + labels) == 1
