"""A LeaderWorkerSet's pods and the services of a compose file run as they stand, each on a host of
its own; the controller that makes pods of a set, and docker, are played by these tests.
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

from tests.launch.render.manifests import EXAMPLES, lets_in, named, render, run
from tests.netns.hosts import Host, new_network
from tests.netns.test_pods import (
    QUESTION,
    STARTED_S,
    accepted,
    ask,
    fill_etc,
    prepare,
    running,
    surroundings,
)

pytestmark = pytest.mark.hosts_long
NAME = "wide"
GROUP = (f"{NAME}-both-0", f"{NAME}-both-0-1", f"{NAME}-both-0-2")
"""The leader and the workers of the first group, as the controller of LeaderWorkerSets names them.
"""


def until_ready(is_ready: Any, processes: Sequence[subprocess.Popen[bytes]]) -> None:
    ends_at = time.monotonic() + STARTED_S
    while not is_ready():
        assert time.monotonic() < ends_at
        assert [process.poll() for process in processes] == [None] * len(processes)
        time.sleep(0.5)


def test_the_pods_of_a_group_are_one_engine(tmp_path: Path) -> None:
    deployment = tmp_path / "wide.yaml"
    settings = {
        "model": "smollm2",
        "both": {"replicas": 1, "tensor_parallel_size": 3, "hosts_per_engine": 3},
        "kv_cache_memory": "64MiB",
    }
    deployment.write_text(json.dumps(settings))
    arguments = (str(deployment), "--name", NAME)
    objects = render("kubernetes", *arguments)
    objects += render("kubernetes", *arguments, "--print-secret")
    group = named(objects, "LeaderWorkerSet", f"{NAME}-both")["spec"]["leaderWorkerTemplate"]
    assert group["size"] == len(GROUP)
    pods = dict.fromkeys(GROUP, group["workerTemplate"])
    pods["router"] = named(objects, "Deployment", NAME)["spec"]["template"]
    with new_network(*pods) as network, contextlib.ExitStack() as stack:
        router = network["router"]
        names = f"127.0.0.1 localhost\n{router.address} {NAME} {NAME}.serving.svc {NAME}-control\n"
        for name, pod in pods.items():
            prepare(network[name], pod, objects, names)
        processes = [
            stack.enter_context(running(network[name], pod, name)) for name, pod in pods.items()
        ]
        probe = pods["router"]["spec"]["containers"][0]["readinessProbe"]["httpGet"]
        url = f"http://{router.address}:8000{probe['path']}"
        outside = network[GROUP[0]]
        until_ready(lambda: ask(outside, url)[0] == 200, processes)
        service = f"http://{NAME}.serving.svc:8000"
        status, answer = ask(outside, f"{service}/v1/completions", json.dumps(QUESTION))
        assert status == 200, answer
        assert json.loads(answer)["usage"]["completion_tokens"] == QUESTION["max_tokens"]
        joined = {(sender, name, port) for name in pods for sender, port in accepted(network, name)}
        labels = {name: pod["metadata"]["labels"] for name, pod in pods.items()}
        assert [
            (sender, name, port)
            for sender, name, port in joined
            if not lets_in(objects, labels[name], labels[sender], port)
        ] == []
        # Each pod has a rank, which the first one speaks to.
        for worker in GROUP[1:]:
            assert any({sender, name} == {GROUP[0], worker} for sender, name, _ in joined)


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
