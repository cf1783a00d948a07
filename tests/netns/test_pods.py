"""Rendered pods run as they stand: commands, variables, secrets and probes, each on a host of its
own. The user, the image and its read-only folders are this machine's.
"""

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from pdlaunch.config.model_files.find import cache_root
from tests.launch.render.manifests import EXAMPLES, ROOT, lets_in, named, render
from tests.netns.hosts import Host, Network, new_network

NAME = "pods"
STARTED_S = 300.0
CONNECTIONS = """
import json, psutil
found = psutil.net_connections("tcp")
ports = {each.laddr.port for each in found if each.status == psutil.CONN_LISTEN}
print(json.dumps([
    (each.raddr.ip, each.laddr.port)
    for each in found
    if each.status == psutil.CONN_ESTABLISHED and each.laddr.port in ports
]))
"""
QUESTION = {"prompt": "Hello, my name is" * 20, "max_tokens": 8, "temperature": 0}


def prepare(host: Host, pod: dict[str, Any], objects: list[dict[str, Any]], names: str) -> None:
    """Mount the pod's volumes, and give names to Services, as a cluster's DNS does."""
    (container,) = pod["spec"]["containers"]
    fill_etc(host, names)
    volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    for mount in container["volumeMounts"]:
        volume, folder = volumes[mount["name"]], mount["mountPath"]
        if folder in ("/cache", "/tmp", "/dev/shm"):
            continue  # the host's own, and this machine's cache
        host.run("mkdir", "-p", folder)
        if secret := volume.get("secret"):
            data = named(objects, "Secret", secret["secretName"])["stringData"]
            for item in secret["items"]:
                host.file(f"{folder}/{item['path']}").write_text(data[item["key"]])
        if config := volume.get("configMap"):
            for file, text in named(objects, "ConfigMap", config["name"])["data"].items():
                host.file(f"{folder}/{file}").write_text(text)


def fill_etc(host: Host, names: str) -> None:
    """Give a host folders and a command that stand for those of the image, and names of others."""
    host.run("sh", "-c", "cp -a /etc /tmp/etc && mount --bind /tmp/etc /etc")
    host.run("mount", "-t", "tmpfs", "tmpfs", "/run")
    host.file("/etc/hosts").write_text(names)
    host.run("mkdir", "/tmp/bin")
    host.file("/tmp/bin/pdlaunch").write_text(
        f'#!/bin/sh\nexec {sys.executable} -m pdlaunch "$@"\n'
    )
    host.file("/tmp/bin/pdlaunch").chmod(0o755)


def surroundings() -> dict[str, str]:
    """Variables that stand for the image and the volume of models."""
    return {
        "PATH": f"/tmp/bin:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "PDLAUNCH_CACHE": str(cache_root()),
        "OMP_NUM_THREADS": "1",
    }


def variables(container: dict[str, Any], fields: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of a container as the kubelet sets them."""
    found: dict[str, str] = {}
    for each in container["env"]:
        source = each.get("valueFrom")
        value = fields[source["fieldRef"]["fieldPath"]] if source else each["value"]
        found[each["name"]] = expanded(value, found)
    return found


def expanded(text: str, known: Mapping[str, str]) -> str:
    return re.sub(r"\$\((\w+)\)", lambda match: known[match[1]], text)


@contextlib.contextmanager
def running(host: Host, pod: dict[str, Any], pod_name: str) -> Iterator[Any]:
    (container,) = pod["spec"]["containers"]
    fields = {
        "status.podIP": host.address,
        "metadata.name": pod_name,
        "metadata.namespace": "serving",
    }
    own = variables(container, fields)
    command = [expanded(word, own) for word in container["command"]]
    environment = {**os.environ, **own, **surroundings()}
    with host.running(*command, env=environment) as process:
        yield process


@pytest.fixture
def pods() -> Iterator[Network]:
    with new_network("router", f"{NAME}-prefill-0", f"{NAME}-decode-0") as network:
        yield network


def accepted(pods: Network, name: str) -> set[tuple[str, int]]:
    """Who is connected to a pod, and at which of its ports, from other pods."""
    names = {host.address: host.name for host in pods.hosts}
    found = json.loads(pods[name].run(sys.executable, "-c", CONNECTIONS))
    return {(names[ip], port) for ip, port in found if names.get(ip, name) != name}


def test_pods_find_each_other_and_answer_when_the_probe_says_so(pods: Network) -> None:
    arguments = (str(EXAMPLES[0]), "--name", NAME, "--kv-cache-memory", "64MiB")
    arguments += ("--routing", "pairs")
    objects = render("kubernetes", *arguments)
    objects += render("kubernetes", *arguments, "--print-secret")
    templates = {
        "router": named(objects, "Deployment", NAME)["spec"]["template"],
        f"{NAME}-prefill-0": named(objects, "StatefulSet", f"{NAME}-prefill")["spec"]["template"],
        f"{NAME}-decode-0": named(objects, "StatefulSet", f"{NAME}-decode")["spec"]["template"],
    }
    router = pods["router"]
    names = f"127.0.0.1 localhost\n{router.address} {NAME} {NAME}.serving.svc {NAME}-control\n"
    for name, pod in templates.items():
        prepare(pods[name], pod, objects, names)
    probe = templates["router"]["spec"]["containers"][0]["readinessProbe"]["httpGet"]
    url = f"http://{router.address}:8000{probe['path']}"
    outside = pods[f"{NAME}-decode-0"]
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(running(pods[name], pod, name)) for name, pod in templates.items()
        ]
        statuses, answer = [0], {}
        ends_at = time.monotonic() + STARTED_S
        while statuses[-1] != 200:
            assert time.monotonic() < ends_at, answer
            # An agent that has not joined keeps the supervisor from starting anything.
            assert [process.poll() for process in processes] == [None] * 3
            time.sleep(0.5)
            status, answer = outside.get(url)
            statuses.append(status)
        assert set(statuses) == {0, 503, 200}, "nobody answers, it starts, it is ready"
        assert answer["engines"].keys() == {"prefill-0", "decode-0"}
        service = f"http://{NAME}.serving.svc:8000"
        # What the pods have done needs no more than the policies let in, and each is of use.
        labels = {name: pod["metadata"]["labels"] for name, pod in templates.items()}
        of_use = {
            (f"{NAME}-prefill-0", "router"),
            (f"{NAME}-decode-0", "router"),
            ("router", f"{NAME}-prefill-0"),
            ("router", f"{NAME}-decode-0"),
            (f"{NAME}-decode-0", f"{NAME}-prefill-0"),
        }
        asked = ("--json", json.dumps(QUESTION))
        status, answer = outside.get(f"{service}/v1/completions", *asked)
        assert status == 200, answer
        assert answer["usage"]["completion_tokens"] == QUESTION["max_tokens"]
        joined: set[tuple[str, str, int]] = set()
        # A connection that rests is closed after two seconds, maybe before this looks.
        asks = 'while curl -s -o /dev/null --json "$1" "$0"; do :; done'
        words = ("sh", "-c", asks, f"{service}/v1/completions", json.dumps(QUESTION))
        with outside.running(*words):
            while not {(sender, name) for sender, name, _ in joined} >= of_use:
                assert time.monotonic() < ends_at + STARTED_S, joined
                for name in templates:
                    joined |= {(sender, name, port) for sender, port in accepted(pods, name)}
        assert [
            (sender, name, port)
            for sender, name, port in joined
            if not lets_in(objects, labels[name], labels[sender], port)
        ] == []
        data_ports = range(21000, 22000)
        assert any(port in data_ports for _, _, port in joined), "KV blocks went over the network"
        # A page whose name was made to resolve to the pod is refused, the Service's name is not.
        evil = ("--header", "Host: evil.example")
        assert outside.get(f"http://{NAME}:8000/v1/models", *evil)[0] == 421
        assert outside.get(f"{service}/v1/models")[0] != 421
