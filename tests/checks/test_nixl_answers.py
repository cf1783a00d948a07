"""NIXL is asked about the ranks' settings; what it prints is read."""

import os

import pytest

from pdlaunch.checks.probed import NixlAnswer, Probes
from pdlaunch.checks.probes import ask_nixl, read_nixl_answer, sets_ucx
from pdlaunch.checks.run import run_checks
from pdlaunch.launch.engines.plan import kind_of
from pdlaunch.machine.availability import ProcessOutcome
from tests.checks.contexts import CPU, on

STAMP = "[1795368928.410906] [vm:7796 :0]     ucp_context.c:1508 UCX  "
REFUSED = "refused: nixlBackendError: NIXL_ERR_BACKEND"


NO_CMA = "transport 'cma' is not available, please use one or more of: mm"
UNUSED = "unused environment variables: UCX_A (maybe: UCX_B?); UCX_C"
PLACE = "E1122 18:31:52.255282    2212 config.cpp:84] "
BW = f"{STAMP}ERROR Invalid value for BW: 'foo'"


@pytest.mark.parametrize(
    ("output", "errors", "expected"),
    [
        (("imported", "ok"), (), NixlAnswer()),
        (("import: ImportError: no lib",), (), NixlAnswer(import_error="ImportError: no lib")),
        # In the words of UCX, each once; else of NIXL; else of the exception.
        (
            ("imported", BW, BW, f"{STAMP}ERROR   no interface", REFUSED),
            (),
            NixlAnswer(refusal="Invalid value for BW: 'foo'; no interface"),
        ),
        (
            ("imported", REFUSED),
            (f"{PLACE}Invalid UCX_TLS=self", f"{PLACE}createBackend: failed"),
            NixlAnswer(refusal="Invalid UCX_TLS=self"),
        ),
        (("imported", REFUSED), (), NixlAnswer(refusal="nixlBackendError: NIXL_ERR_BACKEND")),
        # Errors of a backend that works are no refusal.
        (("imported", f"{STAMP}ERROR could not stat /x", "ok"), (), NixlAnswer()),
        (
            (
                "imported",
                f"{STAMP}WARN  {NO_CMA}",
                f"{STAMP}WARN  allocated zero-size block 0x55b5dc43aad0 for string_set",
                f"{STAMP}WARN  {UNUSED}",
                f"{STAMP}WARN  (set UCX_WARN_UNUSED_ENV_VARS=n to suppress this warning)",
                "ok",
            ),
            (),
            NixlAnswer(warnings=(NO_CMA, UNUSED)),
        ),
        # It crashed, or was killed at its deadline.
        ((), (), NixlAnswer(import_error="exit code -11")),
        (("imported",), (), NixlAnswer(refusal="exit code -11")),
        ((), ("not done after 60 s",), NixlAnswer(import_error="not done after 60 s")),
    ],
)
def test_what_nixl_says_is_read(output, errors, expected):
    assert read_nixl_answer(ProcessOutcome(-11, output, errors)) == expected


@pytest.mark.parametrize(
    ("variables", "sets"),
    [
        ({}, False),
        ({"PATH": "/bin"}, False),
        ({"UCX_VERSION": "1.19", "UCX_HOME": "/opt/ucx"}, False),
        ({"UCX_TLS": "sm"}, True),
        ({"UCX_IB_GID_INDEX": "3"}, True),
        ({"NIXL_PLUGIN_DIR": "/x"}, True),
    ],
)
def test_serve_asks_where_the_user_has_set_variables(variables, sets):
    assert sets_ucx(on(CPU, environ=variables).launch) is sets
    assert sets_ucx(on(CPU, decode__env=variables).launch) is sets


@pytest.mark.parametrize(
    "config",
    [
        {"kv_transfer__nixl__path": "p2p"},
        {"kv_transfer__connector": "mooncake"},
        {"decode__replicas": 0},
        {"both__replicas": 2},
    ],
)
def test_nobody_is_asked_without_ucx(config):
    assert ask_nixl(on(CPU, **config).launch) == {}


@pytest.mark.processes
def test_each_role_is_asked_with_its_own_settings_whatever_the_logs_are_set_to():
    quiet = {"UCX_LOG_LEVEL": "fatal", "UCX_LOG_FILE": "/nonexistent/ucx.log"}
    launch = on(
        CPU,
        environ={**os.environ, **quiet},
        prefill__env={"UCX_CMA_BWW": "1"},
        decode__env={"UCX_CMA_BW": "fast"},
    ).launch
    answers = ask_nixl(launch)
    assert "UCX_CMA_BWW (maybe: UCX_CMA_BW?)" in answers["prefill"].warnings[0]
    assert answers["decode"].refusal.startswith("Invalid value for BW: 'fast'")
    report = run_checks(launch, {}, Probes(nixl=answers), rules=kind_of(launch).rules())
    found = {item.rule: item for item in report.findings}
    assert "UCX_CMA_BW" in found["PD440"].where
    assert "UCX_CMA_BWW" in found["PD442"].where
