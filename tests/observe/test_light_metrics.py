from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram

from pdlaunch.observe.metrics import LightCounter, LightHistogram, render_metrics

BOUNDS = (0.002, 0.01, 0.5, 1.0)


@given(st.lists(st.one_of(st.floats(0, 5), st.sampled_from(BOUNDS)), max_size=30))
def test_it_shows_what_a_histogram_of_the_library_shows(values: list[float]) -> None:
    registries = CollectorRegistry(), CollectorRegistry()
    light = LightHistogram("gaps", "Gaps.", {"model": 'a"b'}, BOUNDS, registries[0])
    usual = Histogram("gaps", "Gaps.", ["model"], buckets=BOUNDS, registry=registries[1])
    labelled = usual.labels('a"b')
    for value in values:
        light.observe(value)
        labelled.observe(value)
    assert render_metrics(registries[0]) == render_metrics(registries[1])
    found = [
        [
            (sample.name, sample.value)
            for metric in registry.restricted_registry(["gaps_count"]).collect()
            for sample in metric.samples
        ]
        for registry in registries
    ]
    assert found == [[("gaps_count", len(values))]] * 2


def test_so_does_the_counter() -> None:
    registries = CollectorRegistry(), CollectorRegistry()
    light = LightCounter("tokens", "Tokens.", {"model": "m"}, registries[0])
    usual = Counter("tokens", "Tokens.", ["model"], registry=registries[1]).labels("m")
    for number in (1, 5):
        light.inc(number)
        usual.inc(number)
    assert render_metrics(registries[0]) == render_metrics(registries[1])
    names = ["tokens_total"]
    assert [
        sample.value
        for metric in registries[0].restricted_registry(names).collect()
        for sample in metric.samples
    ] == [6.0]
