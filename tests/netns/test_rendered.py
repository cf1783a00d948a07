"""The services of a compose file run as they stand, each on a host of its own; docker is played by
these tests.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.launch.render.manifests import EXAMPLES, render, run
from tests.netns.hosts import Host, new_network
from tests.netns.test_pods import (
    QUESTION,
    STARTED_S,
    accepted,
    ask,
    fill_etc,
    surroundings,
)

pytestmark = pytest.mark.hosts_long
NAME = "wide"


def until_ready(is_ready: Any, processes: Sequence[subprocess.Popen[bytes]]) -> None:
    ends_at = time.monotonic() + STARTED_S
    while not is_ready():
        assert time.monotonic() < ends_at
        assert [process.poll() for process in processes] == [None] * len(processes)
        time.sleep(0.5)


def test_the_services_of_a_compose_file_find_each_other(tmp_path: Path) -> None:
    arguments = (str(EXAMPLES[0]), "--kv-cache-memory", "64MiB", "--routing", "pairs")
    (file,) = render("compose", *arguments)
    result = run("compose", *arguments, "--assume", "cpu", "--secrets", str(tmp_path))
    assert result.exit_code == 0, result.output
    services = file["services"]
    with new_network(*services) as network, contextlib.ExitStack() as stack:
        names = "127.0.0.1 localhost\n" + "".join(f"{h.address} {h.name}\n" for h in network.hosts)
        processes = []
        for name, service in services.items():
            assert service["hostname"] == name
            prepare_service(network[name], file, service, names, tmp_path)
            processes.append(stack.enter_context(running_service(network[name], service)))
        router, check = network["router"], services["router"]["healthcheck"]
        assert check["test"][:2] == ["CMD", "python"]
        words = router.command(sys.executable, *plain(check["test"][2:]))
        until_ready(
            lambda: subprocess.run(words, capture_output=True, check=False).returncode == 0,
            processes,
        )
        url = "http://router:8000/v1/completions"
        status, answer = ask(network["decode-0"], url, json.dumps(QUESTION))
        assert status == 200, answer
        assert json.loads(answer)["usage"]["completion_tokens"] == QUESTION["max_tokens"]
        assert any(
            sender == "decode-0" and 21000 <= port <= 21999
            for sender, port in accepted(network, "prefill-0")
        ), "KV blocks went over the network"


def plain(words: Sequence[str]) -> list[str]:
    """Words as compose reads them: two dollars are one, and no variable is left to replace."""
    parts = [word.split("$$") for word in words]
    assert not [part for each in parts for part in each if "$" in part]
    return ["$".join(each) for each in parts]


def prepare_service(
    host: Host, file: Mapping[str, Any], service: Mapping[str, Any], names: str, secrets: Path
) -> None:
    """Mount what the service asks for, as docker does."""
    fill_etc(host, names)
    for mount in service["tmpfs"]:
        folder, _, mode = mount.partition(":")
        if folder != "/tmp":
            host.run("mkdir", "-p", folder)
            host.run("mount", "-t", "tmpfs", "-o", mode or "rw", "tmpfs", folder)
    host.run("mkdir", "-p", "/run/secrets")
    for key in service["secrets"]:
        assert file["secrets"][key] == {"file": f"./{key}"}
        host.file(f"/run/secrets/{key}").write_bytes((secrets / key).read_bytes())
    for config in service.get("configs", []):
        (content,) = plain([file["configs"][config["source"]]["content"]])
        host.run("mkdir", "-p", str(Path(config["target"]).parent))
        host.file(config["target"]).write_text(content)


@contextlib.contextmanager
def running_service(host: Host, service: Mapping[str, Any]) -> Iterator[Any]:
    own = {name: plain([value])[0] for name, value in service["environment"].items()}
    command = plain([*service["entrypoint"], *service["command"]])
    with host.running(*command, env={**os.environ, **own, **surroundings()}) as process:
        yield process
