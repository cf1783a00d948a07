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


def answer(*output, errors=(), returncode=0):
    return read_nixl_answer(ProcessOutcome(returncode, output, errors))


class TestReading:
    def test_nothing_to_say(self):
        assert answer("imported", "ok") == NixlAnswer()

    def test_an_import_that_fails(self):
        assert answer("import: ImportError: libcudart.so.12: cannot open") == NixlAnswer(
            import_error="ImportError: libcudart.so.12: cannot open"
        )

    def test_a_refusal_in_the_words_of_ucx_each_once(self):
        error = f"{STAMP}ERROR Invalid value for BW: 'foo'"
        found = answer("imported", error, error, f"{STAMP}ERROR   no interface", REFUSED)
        assert found == NixlAnswer(refusal="Invalid value for BW: 'foo'; no interface")

    def test_a_refusal_in_the_words_of_nixl(self):
        place = "E1122 18:31:52.255282    2212 config.cpp:84] "
        said = (f"{place}Invalid UCX_TLS=self: GPUs are present", f"{place}createBackend: failed")
        found = answer("imported", REFUSED, errors=said)
        assert found.refusal == "Invalid UCX_TLS=self: GPUs are present"

    def test_a_refusal_without_words(self):
        assert answer("imported", REFUSED).refusal == "nixlBackendError: NIXL_ERR_BACKEND"

    def test_errors_of_a_backend_that_works_are_no_refusal(self):
        assert answer("imported", f"{STAMP}ERROR could not stat /x", "ok") == NixlAnswer()

    def test_warnings(self):
        found = answer(
            "imported",
            f"{STAMP}WARN  transport 'cma' is not available, please use one or more of: mm",
            f"{STAMP}WARN  allocated zero-size block 0x55b5dc43aad0 for string_set",
            f"{STAMP}WARN  unused environment variables: UCX_A (maybe: UCX_B?); UCX_C",
            f"{STAMP}WARN  (set UCX_WARN_UNUSED_ENV_VARS=n to suppress this warning)",
            "ok",
        )
        assert found == NixlAnswer(
            warnings=(
                "transport 'cma' is not available, please use one or more of: mm",
                "unused environment variables: UCX_A (maybe: UCX_B?); UCX_C",
            )
        )

    def test_a_crash_before_and_after_the_import(self):
        assert answer(returncode=-11) == NixlAnswer(import_error="exit code -11")
        assert answer("imported", returncode=-11) == NixlAnswer(refusal="exit code -11")

    def test_a_deadline(self):
        outcome = ProcessOutcome(None, errors=("not done after 60 s",))
        assert read_nixl_answer(outcome).import_error == "not done after 60 s"


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
