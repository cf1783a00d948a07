import json
from dataclasses import replace
from pathlib import Path

import pytest

from pdlaunch.checks.probed import PairTransport, Probes, SeenDeployment
from pdlaunch.checks.run import all_rules, run_checks
from pdlaunch.config.models import LaunchConfig
from pdlaunch.config.sources import load_config
from pdlaunch.errors import ConfigError
from pdlaunch.machine.profiles import find_profile
from pdlaunch.planning.models import Model, read_models
from pdlaunch.planning.resolve import resolve
from tests.checks.contexts import CPU, GIB, GPU, SHAPE, SMALL_SHAPE
from tools.pages import rules_page

MODELS = {"prefill": Model("m", "/m", SMALL_SHAPE), "decode": Model("m", "/m", SMALL_SHAPE)}
BIG_MODELS = {"prefill": Model("m", "/m", SHAPE), "decode": Model("m", "/m", SHAPE)}


def check(machine=CPU, environ=None, models=MODELS, path=None, flags=None, family="PD", **probes):
    loaded = load_config(path, environ or {}, flags or {})
    launch = resolve(loaded.config, {"here": machine}, environ or {}, models)
    return run_checks(
        launch, loaded.origins, Probes(**probes), rules=all_rules().values(), family=family
    )


def test_a_clean_set_up():
    report = check(
        ports={},
        nixl={},
        connector_errors={},
        missing_extras={},
        folder_problems={},
        weight_errors={},
        engine_commands={},
        engine_flags={},
        deployment=SeenDeployment((), ()),
        transport=(),
    )
    assert report.findings == ()
    assert report.not_checked == ()
    assert report.is_ok(strict=True)


def test_what_was_not_probed_is_listed():
    reasons = {item.rule: item.reason for item in check().not_checked}
    assert reasons["PD404"] == (
        "NIXL is asked with --probe, and by serve where variables of UCX are set"
    )
    assert {"PD420", "PD501"} <= set(reasons)


def test_errors_come_first():
    report = check(
        flags={
            "kv_transfer.verify": False,
            "load_format": "dummy",
            "prefill.tensor_parallel_size": 2,
        }
    )
    assert [finding.severity for finding in report.findings] == [
        "error",
        "error",
        "warning",
        "warning",
        "warning",
        "info",
    ]
    assert {finding.rule for finding in report.errors} == {"PD104", "PD105"}


def test_warnings_count_only_when_strict():
    report = check(flags={"kv_transfer.verify": False})
    assert report.is_ok()
    assert not report.is_ok(strict=True)


def test_infos_never_count():
    assert check(flags={"load_format": "dummy"}).is_ok(strict=True)


def test_a_finding_of_both_roles_is_told_once():
    report = check(flags={"max_model_len": 9000})
    (finding,) = [finding for finding in report.findings if finding.rule == "PD106"]
    assert (finding.where, finding.origin) == ("max_model_len", "--max-model-len")


def test_advice_on_the_cache_is_about_lengths_of_the_model():
    limit = SMALL_SHAPE.max_position_embeddings
    report = check(flags={"max_model_len": 100 * limit, "kv_cache_memory": "64MiB"})
    as_the_model = check(flags={"max_model_len": limit, "kv_cache_memory": "64MiB"})
    assert {finding.rule for finding in report.errors} == {"PD106", "PD208"}
    told, expected = (
        [found for found in each.errors if found.rule == "PD208"] for each in (report, as_the_model)
    )
    assert [(found.message, found.fix) for found in told] == [
        (found.message, found.fix) for found in expected
    ]
    enough = check(flags={"max_model_len": limit + 1, "kv_cache_memory": "1GiB"})
    assert [finding.rule for finding in enough.errors] == ["PD106"]


def test_findings_name_file_and_line(tmp_path):
    path = tmp_path / "deploy.yaml"
    path.write_text("decode:\n  max_model_len: 9000\n")
    (finding,) = [finding for finding in check(path=path).findings if finding.rule == "PD106"]
    assert (finding.where, finding.origin) == ("decode.max_model_len", f"{path}:2:18")


def test_memory_arithmetic_is_shown():
    small = replace(GPU, gpus=tuple(replace(gpu, memory_bytes=16 * GIB) for gpu in GPU.gpus))
    report = check(machine=small, models=BIG_MODELS)
    (prefill, *_) = [finding for finding in report.findings if finding.rule == "PD207"]
    assert "weights 15 GiB + activations" in prefill.message
    assert "0.9 x 16 GiB = 14.4 GiB" in prefill.message


def test_one_family_alone():
    slow = PairTransport(
        "decode-0/rank-0",
        "prefill-0/rank-0",
        "nixl/UCX",
        "cumem",
        0.6,
        392.0,
        other_paths={"p2p": "not here"},
    )
    report = check(flags={"max_model_len": 9000}, transport=(slow,), family="PD5")
    (finding,) = (found for found in report.findings if found.severity != "info")
    assert finding.rule == "PD503"
    assert "0.6 GB/s cliff; p2p: not here" in finding.message


@pytest.mark.parametrize(
    ("flags", "environ", "others", "reasons"),
    [
        ({}, {}, {"p2p": "not here"}, "; p2p: not here"),
        (
            {"kv_transfer.nixl.path": "nixl"},
            {},
            {},
            "; kv_transfer.nixl.path is nixl: P2P was not tried",
        ),
        (
            {"kv_transfer.nixl.path": "p2p"},
            {},
            {},
            "; kv_transfer.nixl.path is p2p: NIXL was not tried",
        ),
        ({}, {"UCX_TLS": "tcp,cuda_copy"}, {}, "; UCX_TLS is tcp,cuda_copy"),
        ({}, {}, {}, ""),
    ],
)
def test_a_slow_pair_comes_with_its_link_and_the_reasons(flags, environ, others, reasons):
    slow = PairTransport(
        "decode-0/rank-0",
        "prefill-0/rank-0",
        "nixl/UCX",
        "cuda",
        60.0,
        359.0,
        link="18 NVLinks with 478 GB/s",
        other_paths=others,
    )
    report = check(flags=flags, environ=environ, transport=(slow,), family="PD5")
    (finding,) = (found for found in report.findings if found.severity != "info")
    assert finding.rule == "PD504"
    message = (
        "nixl/UCX moves 60 GB/s where 359 GB/s are expected of 18 NVLinks with 478 GB/s (cuda "
        "memory)"
    )
    assert finding.message == message + reasons


def test_a_profile():
    report = check(machine=find_profile("h100x8", 2).machine, models=BIG_MODELS)
    assert report.findings == ()
    told = {item.rule for item in report.not_checked if "profile h100x8" in item.reason}
    assert told >= {"PD405", "PD416"}
    assert not told & {"PD215", "PD207", "PD213", "PD412"}
    of_any = check(machine=find_profile("cuda", 2).machine, models=BIG_MODELS)
    assert {item.rule for item in of_any.not_checked} >= {"PD215", "PD207", "PD213", "PD412"}


def test_an_assumed_cpu_has_no_cumem_allocator():
    report = check(machine=find_profile("cpu", 2).machine, flags={"enable_cumem_allocator": True})
    (finding,) = report.errors
    assert finding.rule == "PD202"
    assert "cumem allocator is not supported on the current platform" in finding.message
    assert "no CUDA device" in finding.message


def test_a_model_that_is_not_converted_yet_is_not_checked():
    pending = Model("smollm2", "/cache", pending="smollm2 is converted at the first start")
    report = check(models={"prefill": pending, "decode": pending})
    assert ("PD104", pending.pending) in {(item.rule, item.reason) for item in report.not_checked}


def test_resolved_is_plain_json_without_secrets():
    environ = {
        "PDLAUNCH_API_KEY": "hunter2",
        "PDLAUNCH_ENV__HF_TOKEN": "hunter2",
        "PDLAUNCH_ENV__UCX_TLS": "sm",
    }
    report = check(environ=environ, flags={"enable_sleep_mode": True})
    text = json.dumps(report.resolved)
    assert "hunter2" not in text + repr(report)
    assert report.resolved["config"]["env"] == {"HF_TOKEN": "**********", "UCX_TLS": "sm"}
    assert report.resolved["engines"]["decode"]["enable_cumem_allocator"] is True
    assert (
        report.resolved["engines"]["decode"]["memory_of_a_rank"]["blocks_for_longest_request"]
        == 512
    )


@pytest.mark.parametrize(
    "model", ["/nonexistent", "~nobody-has-this-name/x", "a" * 5000, "a\0b", "org/name/x"]
)
def test_models_that_cannot_be_read_say_so(model):
    (prefill, decode) = read_models(LaunchConfig(model=model)).values()
    assert prefill is decode
    assert prefill.error is not None
    assert prefill.error.field == "model"


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


def test_unsupported_models_are_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mamba2", "hidden_size": 8}')
    report = check(models=None, flags={"model": str(tmp_path)})
    (finding,) = report.errors
    assert finding.rule == "PD103"
    assert "mamba2" in finding.message


def test_docs_are_current():
    document = Path(__file__).parents[2] / "docs" / "rules.md"
    assert document.read_text() == rules_page(), "run `make rules`"
