from dataclasses import replace
from pathlib import Path

import pytest

from pdlaunch.checks.probed import PairTransport, Probes, SeenDeployment
from pdlaunch.checks.run import all_rules, run_checks
from pdlaunch.config.models import LaunchConfig
from pdlaunch.config.sources import load_config
from pdlaunch.errors import ConfigError
from pdlaunch.launch.places import findings_of, refuse_errors
from pdlaunch.machine.host import EngineCommand
from pdlaunch.machine.profiles import find_machine
from pdlaunch.planning.models import Model, read_models
from pdlaunch.planning.resolve import resolve
from tests.checks.contexts import CPU, GIB, NOTHING_WRONG, SHAPE, SMALL_SHAPE, gpus
from tools.pages import rules_page, settings_page

MODELS = {"prefill": Model("m", "/m", SMALL_SHAPE), "decode": Model("m", "/m", SMALL_SHAPE)}
BIG_MODELS = {"prefill": Model("m", "/m", SHAPE), "decode": Model("m", "/m", SHAPE)}
SLOW = PairTransport("decode-0/rank-0", "prefill-0/rank-0", "nixl/UCX", "cuda", 6.0)


def check(machine=CPU, environ=None, models=MODELS, flags=None, **probes):
    loaded = load_config(None, environ or {}, flags or {})
    launch = resolve(loaded.config, {"here": machine}, environ or {}, models)
    return run_checks(launch, loaded.origins, Probes(**probes), rules=all_rules().values())


def finding(report, rule):
    (found,) = [each for each in report.findings if each.rule == rule]
    return found


def test_a_clean_set_up():
    report = check(**NOTHING_WRONG, deployment=SeenDeployment((), ()), transport=())
    assert report.findings == ()
    assert report.not_checked == ()
    assert report.is_ok(strict=True)


def test_a_missing_vllm_is_told_alone():
    """What else is found follows from it, or is a guess about an engine that nobody knows."""
    flags = {"engine": "vllm", "generation_config": "vllm", "max_model_len": 9000}
    missing = {"host": EngineCommand(problem="it is not on PATH")}
    commands = {"prefill": missing, "decode": missing}
    assert len(check(flags=flags).findings) > 1
    assert {each.rule for each in check(flags=flags, engine_commands=commands).findings} == {
        "PD611"
    }


def test_a_finding_of_both_roles_is_told_once():
    found = finding(check(flags={"max_model_len": 9000}), "PD106")
    assert (found.where, found.origin) == ("max_model_len", "--max-model-len")


def test_advice_on_the_cache_is_about_lengths_of_the_model():
    limit = SMALL_SHAPE.max_position_embeddings
    small = {"kv_cache_memory": "64MiB"}
    told, expected = (
        [each for each in check(flags={"max_model_len": length} | small).errors if each.fix]
        for length in (100 * limit, limit)
    )
    said = [(each.message, each.fix) for each in told if each.rule == "PD208"]
    assert said == [(each.message, each.fix) for each in expected]
    enough = check(flags={"max_model_len": limit + 1, "kv_cache_memory": "1GiB"})
    assert [each.rule for each in enough.errors] == ["PD106"]


def test_memory_arithmetic_is_shown():
    report = check(machine=gpus(memory_bytes=16 * GIB), models=BIG_MODELS)
    (prefill, *_) = [each for each in report.findings if each.rule == "PD207"]
    assert "weights 15 GiB + activations" in prefill.message
    assert "0.9 x 16 GiB = 14.4 GiB" in prefill.message


STAGED = "UCX copies through the host"


@pytest.mark.parametrize(
    ("flags", "environ", "pair", "causes"),
    [
        ({}, {}, {}, ""),
        ({}, {}, {"other_paths": {"p2p": "not here"}}, "; p2p: not here"),
        (
            {"kv_transfer.nixl.path": "nixl"},
            {},
            {},
            "; kv_transfer.nixl.path is nixl: P2P was not tried",
        ),
        ({}, {"UCX_TLS": "tcp,cuda_copy"}, {}, "; UCX_TLS is tcp,cuda_copy"),
        ({}, {}, {"piece_bytes": 32768}, "; the pieces have 32 KiB: raise block_size"),
        ({}, {}, {"gigabytes_per_s": 0.6, "piece_bytes": 32768}, f"; {STAGED}"),
        (
            {},
            {},
            {"gigabytes_per_s": 0.6, "allocator": "cumem"},
            f"; {STAGED}: no peer can map cumem memory without fabric handles",
        ),
        ({}, {}, {"shares_gpu": True}, "; both ranks share a GPU"),
        ({}, {}, {"path": "mooncake/tcp"}, "; Mooncake uses TCP instead of shared memory"),
    ],
)
def test_a_slow_pair_comes_with_the_causes(flags, environ, pair, causes):
    report = check(flags=flags, environ=environ, transport=(replace(SLOW, **pair),))
    found = finding(report, "PD504").message
    assert found.partition("a tenth of 100")[2] == causes


def test_profiles_say_what_they_do_not_know():
    report = check(machine=find_machine("h100x8", 2, "--assume").machine, models=BIG_MODELS)
    assert report.findings == ()
    told = {item.rule for item in report.not_checked if "profile h100x8" in item.reason}
    assert told >= {"PD416"}
    assert not told & {"PD202", "PD207", "PD213", "PD412"}
    of_any = check(machine=find_machine("cuda", 2, "--assume").machine, models=BIG_MODELS)
    assert {item.rule for item in of_any.not_checked} >= {"PD207", "PD213", "PD412"}
    of_cpu = check(
        machine=find_machine("cpu", 2, "--assume").machine, flags={"enable_cumem_allocator": True}
    )
    assert "not supported on the current platform" in finding(of_cpu, "PD202").message
    assert "no CUDA device" in finding(of_cpu, "PD202").message


def test_a_model_that_is_not_converted_yet_is_not_checked():
    pending = Model("smollm2", "/cache", pending="smollm2 is converted at the first start")
    report = check(models={"prefill": pending, "decode": pending})
    assert ("PD104", pending.pending) in {(item.rule, item.reason) for item in report.not_checked}


def test_a_model_that_does_not_fit_is_refused_once_it_is_converted():
    config = LaunchConfig(max_model_len=10**6)
    refuse_errors(findings_of(resolve(LaunchConfig(), {"here": CPU}, {}, MODELS)))
    with pytest.raises(ConfigError, match=r"PD106 max_model_len: .* positions") as caught:
        refuse_errors(findings_of(resolve(config, {"here": CPU}, {}, MODELS)))
    assert caught.value.fix


def test_a_model_of_a_hub_is_fetched_before_it_is_read_or_is_pending():
    asked = []
    config = LaunchConfig(model="org/not-there", decode={"revision": "v2"})

    def fetch(name, revision, part):
        asked.append((name, revision, part))
        if revision:
            raise ConfigError("no such revision", field="revision")

    pending = read_models(config)["prefill"]
    assert (pending.error, pending.on_hub) == (None, True)
    assert "is downloaded" in pending.pending
    found = read_models(config, fetch)
    assert asked == [("org/not-there", revision, "description") for revision in (None, "v2")]
    assert "is not in the cache" in str(found["prefill"].error)
    assert str(found["decode"].error) == "no such revision"


@pytest.mark.parametrize(("name", "page"), [("rules", rules_page), ("settings", settings_page)])
def test_docs_are_current(name, page):
    document = Path(__file__).parents[2] / "docs" / f"{name}.md"
    assert document.read_text() == page(), f"run `make {name}`"
