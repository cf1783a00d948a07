"""The router's /metrics has those of every engine."""

from __future__ import annotations

from collections import Counter

import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from pdlaunch.http.engine_calls import MAX_PAGE_BYTES
from pdlaunch.protocol.engine import EngineStats
from pdlaunch.router.metrics import MetricFamilies
from tests.router.conftest import Stand, pairs
from tests.router.test_life_of_a_request import completion


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
        engine.metrics.engine.stats = EngineStats(
            num_waiting=number, num_blocks=10, num_free_blocks=5, transfer_bytes=10**number
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
    assert first_tokens.type == "histogram"
    assert values(first_tokens, "_count") == dict.fromkeys(names, 1)
    buckets = {
        sample.labels["le"]: sample.value
        for sample in first_tokens.samples
        if sample.labels.get("engine") == names[0] and sample.name.endswith("_bucket")
    }
    assert (buckets["0.02"], buckets["0.04"], buckets["+Inf"]) == (0, 1, 1)
    labels = 'engine="prefill-0",model_name="tiny",role="prefill"'
    assert f"pdlaunch_kv_transfer_bytes_total{{{labels}}} 1.0" in text.splitlines()


async def test_engines_that_cannot_be_read_are_missing(stand: Stand) -> None:
    """They are dead, silent, say too much or what is no page; labels of others are replaced."""
    dead, silent, broken, long, strange, well = engines = pairs(3)
    await stand.start(engines, metrics_s=0.5)
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
def test_what_is_no_sample_spoils_its_page(line: str) -> None:
    families = MetricFamilies()
    with pytest.raises(ValueError, match=r"not a sample|could not convert"):
        families.add(f"# TYPE y gauge\ny 1\n{line}\n", engine="e")
    assert families.page() == "\n"


def test_labels_may_hold_whatever_text() -> None:
    """Also what looks like a label, in a value."""
    value = r"a,engine=\"x\",} \\"
    families = MetricFamilies()
    families.add(f'# TYPE y gauge\ny{{engine="0",path="{value}"}} 1 17\ny 2\n', engine='e"\\')
    assert families.page().splitlines()[2:] == [
        f'y{{engine="e\\"\\\\",path="{value}"}} 1 17',
        'y{engine="e\\"\\\\"} 2',
    ]
