import stat
import subprocess
import sys
from pathlib import Path

import pytest

import pdlaunch
from pdlaunch.launch.sidecar.connector import (
    Failures,
    connector_environment,
    statements_folder,
    statements_socket,
)
from pdlaunch.vllm.far_statements import STATEMENTS_SOCKET
from pdlaunch.vllm.worker import FAILURES_FILE, report_failure


def test_engines_of_a_launch_get_one_folder_of_their_user(tmp_path: Path) -> None:
    first, second = (connector_environment(tmp_path, name, "") for name in ("first", "second"))
    assert first | {"PDLAUNCH_FAILURES_FILE": ""} == second | {"PDLAUNCH_FAILURES_FILE": ""}
    folder = Path(first["PDLAUNCH_STATEMENTS_DIR"])
    assert folder.parent == tmp_path
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_engines_of_several_hosts_ask_their_sidecars(tmp_path: Path) -> None:
    far = connector_environment(tmp_path, "decode-0", "", is_far=True)
    assert far.pop(STATEMENTS_SOCKET) == str(statements_socket(tmp_path, "decode-0"))
    assert far == connector_environment(tmp_path, "decode-0", "")
    assert statements_folder(tmp_path) == Path(far["PDLAUNCH_STATEMENTS_DIR"])


def test_of_what_is_installed_here_vllm_sees_pdlaunch_alone(tmp_path: Path) -> None:
    paths = connector_environment(tmp_path, "decode-0", "/first:/second")["PYTHONPATH"].split(":")
    assert paths[1:] == ["/first", "/second"]
    (package,) = Path(paths[0]).iterdir()
    assert package.name == "pdlaunch"
    assert package.resolve() == Path(pdlaunch.__file__).parent.resolve()


def test_failures_are_read_once_by_whole_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "decode-0.failures").write_text("of-the-last-start\n")
    failures = Failures(tmp_path, "decode-0")
    assert failures.latest() == []
    environment = connector_environment(tmp_path, "decode-0", "")
    monkeypatch.setenv(FAILURES_FILE, environment[FAILURES_FILE])
    for engine_id in ("first", "second", "first"):
        report_failure(engine_id)
    with Path(environment[FAILURES_FILE]).open("a") as file:
        file.write("half")
    assert failures.latest() == ["first", "second", "first"]
    with Path(environment[FAILURES_FILE]).open("a") as file:
        file.write(" a line\n")
    assert failures.latest() == ["half a line"]
    assert failures.latest() == []


@pytest.mark.processes
def test_the_room_is_imported_without_pdlaunchs_dependencies(tmp_path: Path) -> None:
    """What vLLM's environment need not have is not imported; ``connector`` needs vLLM itself."""
    program = (
        "import sys, pdlaunch.vllm.worker, pdlaunch.vllm.support, pdlaunch.vllm.agent\n"
        "import pdlaunch\n"
        "print(pdlaunch.__file__)\n"
        "missing = {'msgspec', 'pydantic', 'xxhash', 'aiohttp', 'zmq', 'typer', 'vllm'}\n"
        "print(sorted(missing & set(sys.modules)))\n"
    )
    environment = connector_environment(tmp_path, "decode-0", "")
    found = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": environment["PYTHONPATH"], "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    path, missing = found.stdout.splitlines()
    assert path.startswith(str(tmp_path))
    assert missing == "[]"
