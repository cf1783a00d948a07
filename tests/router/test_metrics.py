"""The router's own metrics, and those of every engine beside them."""

import re
from collections import Counter
from pathlib import Path

import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from pdlaunch.http.engine_calls import MAX_PAGE_BYTES
from pdlaunch.protocol.control import EndReason, Registry
from pdlaunch.protocol.engine import EngineStats
from pdlaunch.router.metrics import Families, RouterMetrics, add_page, render_families
from tests.router.conftest import Stand, pairs, proof, samples
from tests.router.test_life_of_a_request import completion

PAIR = "prefill-0/rank-0", "decode-0/rank-0"


def test_every_metric_of_the_router_stands_in_the_docs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "operating.md").read_text()
    names = re.findall(r"^# TYPE (\S+)", RouterMetrics("m").text().decode(), re.MULTILINE)
    assert len(names) > 20
    for name in names:
        short = name.removeprefix("pdlaunch_router_").removesuffix("_total")
        assert re.search(rf"`(pdlaunch_router_)?{short}(_total)?[`{{]", page), name


async def test_failures_that_have_not_happened_are_there_with_0(stand: Stand) -> None:
    await stand.start_pair()
    metrics = stand.metrics
    ends: dict[str, dict[EndReason, int]] = {"router": {"died": 0, "hung": 0}}
    shown = [proof(*PAIR, gigabytes_per_s=9.5)]
    metrics.show_registry(Registry(version=1, entries=[], pairs=shown, ends=ends))
    metrics.show(stand.pool.engines, 0)
    for sample in (
        'pdlaunch_router_request_errors_total{model_name="tiny",status="503"}',
        'pdlaunch_router_request_success_total{finished_reason="error",model_name="tiny"}',
        'pdlaunch_router_engine_failures_total{engine="decode-0",hop="prefill"}',
        'pdlaunch_router_retries_total{hop="decode"}',
        'pdlaunch_router_canaries_total{outcome="failed"}',
        'pdlaunch_router_silent_recomputes_total{decode="decode-0",prefill="prefill-0"}',
        'pdlaunch_process_ends_total{process="router",reason="hung"}',
    ):
        assert samples(metrics)[sample] == 0, sample
    for sample in ('pdlaunch_router_engines{state="ready"}', "pdlaunch_router_engines_ready"):
        assert samples(metrics)[sample] == 2


def test_a_pair_below_a_tenth_of_its_link_s_speed_is_slow() -> None:
    metrics = RouterMetrics("m")
    labels = 'decode="decode-0",holder="prefill-0/rank-0",path="nixl/UCX",prefill="prefill-0",'
    for slow in ("", "PD504 connector nixl moves 0.6 GB/s"):
        slowed = proof(*PAIR, path="nixl/UCX", gigabytes_per_s=0.6, slow=slow)
        metrics.show_registry(Registry(version=1, entries=[], pairs=[slowed]))
        sample = f'pdlaunch_pair_slow{{{labels}puller="decode-0/rank-0"}}'
        assert samples(metrics)[sample] == bool(slow)


async def scraped(stand: Stand) -> str:
    async with stand.session.get("/metrics") as response:
        assert response.status == 200
        return await response.text()


def families_of(text: str) -> dict[str, Metric]:
    """By name; there is one of a name, and no two samples are the same."""
    families = list(text_string_to_metric_families(text))
    assert max(Counter(family.name for family in families).values()) == 1
    samples = Counter(
        (sample.name, *sorted(sample.labels.items()))
        for family in families
        for sample in family.samples
    )
    assert max(samples.values()) == 1
    headers = Counter(
        " ".join(line.split()[:3]) for line in text.splitlines() if line.startswith("#")
    )
    assert max(headers.values()) == 1
    return {family.name: family for family in families}


def values(family: Metric, suffix: str = "", **labels: str) -> dict[str | None, float]:
    """By engine, None for the router; of the samples with ``labels``."""
    return {
        sample.labels.get("engine"): sample.value
        for sample in family.samples
        if sample.name == family.name + suffix and labels.items() <= sample.labels.items()
    }


async def test_engines_are_beside_the_router(stand: Stand) -> None:
    engines = pairs(2)
    for number, engine in enumerate(engines):
        engine.metrics.stats = EngineStats(
            num_waiting=number,
            num_blocks=10,
            num_free_blocks=5,
            counts={"kv_transfer_bytes": 10**number},
        )
        engine.metrics.requests.finished("length")
        engine.metrics.requests.time_to_first_token.observe(0.03)
    await stand.start(engines)
    await stand.post(completion(stream=True))
    text = await scraped(stand)
    families = families_of(text)
    names = [engine.name for engine in engines]
    assert values(families["pdlaunch_num_requests_waiting"]) == dict(
        zip(names, range(4), strict=True)
    )
    assert values(families["pdlaunch_kv_cache_usage_perc"]) == dict.fromkeys(names, 0.5)
    assert values(families["pdlaunch_kv_transfer_bytes"], "_total") == {
        name: 10**i for i, name in enumerate(names)
    }
    assert families["pdlaunch_kv_transfer_bytes"].type == "counter"
    finished = {"finished_reason": "length"}
    of_engines = values(families["pdlaunch_request_success"], "_total", **finished)
    assert of_engines == dict.fromkeys(names, 1)
    of_router = values(families["pdlaunch_router_request_success"], "_total", **finished)
    assert of_router == {None: 1}
    first_tokens = families["pdlaunch_time_to_first_token_seconds"]
    assert values(first_tokens, "_count") == dict.fromkeys(names, 1)
    assert values(first_tokens, "_bucket", le="0.04") == dict.fromkeys(names, 1)
    labels = 'engine="prefill-0",model_name="tiny",role="prefill"'
    assert f"pdlaunch_kv_transfer_bytes_total{{{labels}}} 1.0" in text.splitlines()


async def test_engines_that_cannot_be_read_are_missing(stand: Stand) -> None:
    """They are dead, silent, say too much or what is no page; labels of others are replaced."""
    dead, silent, broken, long, strange, well = engines = pairs(3)
    await stand.start(engines, metrics_s=2.0)
    await dead.stop()
    silent.tells_metrics.clear()
    broken.metrics_page = "# TYPE x gauge\nx{"
    long.metrics_page = "long 7\n#".ljust(MAX_PAGE_BYTES + 1, "-")
    strange.metrics_page = (
        "# TYPE pdlaunch_router_engines_ready histogram\npdlaunch_router_engines_ready_sum 1\n"
        '# TYPE own gauge\nown{engine="0"} 7\n'
    )
    families = families_of(await scraped(stand))
    silent.tells_metrics.set()
    assert values(families["pdlaunch_router_engines_ready"]) == {None: 6}
    assert values(families["own"]) == {strange.name: 7}
    assert not {"x", "long"} & families.keys()
    assert set(values(families["pdlaunch_num_requests_waiting"])) == {well.name}


@pytest.mark.parametrize("line", ["x{", "x", 'x{a="b} 1', "x{} one", 'x{a="b"c="d"}e 1', "1x 2"])
def test_what_is_no_sample_is_left_out(line: str) -> None:
    families: Families = {}
    add_page(families, f"# TYPE y gauge\n{line}\ny 1\n", engine="e")
    assert render_families(families) == '# HELP y \n# TYPE y gauge\ny{engine="e"} 1\n'


def test_labels_may_hold_whatever_text() -> None:
    """Also what looks like a label, in a value."""
    value = r"a,engine=\"x\",} \\"
    families: Families = {}
    add_page(families, f'# TYPE y gauge\ny{{engine="0",path="{value}"}} 1 17\ny 2\n', engine='e"\\')
    assert render_families(families).splitlines()[2:] == [
        f'y{{engine="e\\"\\\\",path="{value}"}} 1 17',
        'y{engine="e\\"\\\\"} 2',
    ]
