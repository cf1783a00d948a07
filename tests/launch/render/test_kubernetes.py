"""Objects for Kubernetes fit their schemas and each other."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from pdlaunch.config.sources import load_config
from pdlaunch.launch.state import Timing
from pdlaunch.planning.roles import place_engines
from tests.launch.render.manifests import (
    EXAMPLES,
    ROOT,
    check_schema,
    named,
    render,
    run,
    templates,
)

DEMO = str(EXAMPLES[0])


@pytest.fixture(scope="module")
def demo() -> list[dict[str, Any]]:
    return render("kubernetes", DEMO)


@pytest.mark.processes
def test_rendered_examples_are_up_to_date() -> None:
    # Memory is requested of a model whose shape is known.
    command = [sys.executable, "-m", "pdlaunch.engine.models.convert", "smollm2", "--if-needed"]
    subprocess.run(command, check=True, timeout=240)
    folder = ROOT / "examples" / "kubernetes"
    result = run("kubernetes", str(folder / "deployment.yaml"), "--assume", "cpu", trusted=False)
    assert result.exit_code == 0, result.output
    assert (folder / "objects.yaml").read_text() == result.stdout
    check_schema(list(yaml.safe_load_all(result.stdout)))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_objects_of_all_examples_fit(path: Path) -> None:
    objects = render("kubernetes", str(path), "--namespace", "serving", "--name", "mine")
    check_schema(objects)
    assert {found["metadata"]["namespace"] for found in objects} == {"serving"}


def router_pod(objects: list[dict[str, Any]]) -> dict[str, Any]:
    pod: dict[str, Any] = named(objects, "Deployment", "pdlaunch")["spec"]["template"]
    return pod


def test_pods_outlive_the_drain_and_probes_the_start(demo: list[dict[str, Any]]) -> None:
    timing = Timing()
    longest_s = timing.drain_s + timing.router_stop_s + timing.stop_s + timing.kill_s
    for _, pods in templates(demo):
        assert pods["spec"]["terminationGracePeriodSeconds"] >= longest_s
    times = ("--drain-timeout", "100.5", "--startup-timeout", "1000", "--join-timeout", "200")
    router = router_pod(render("kubernetes", DEMO, *times))["spec"]
    assert router["terminationGracePeriodSeconds"] >= longest_s - timing.drain_s + 100.5
    (container,) = router["containers"]
    probe = container["startupProbe"]
    assert probe["failureThreshold"] * probe["periodSeconds"] >= 1200
    assert container["readinessProbe"]["httpGet"]["path"] == "/health"


def test_there_is_one_supervisor_and_a_changed_configuration_starts_it_anew(
    demo: list[dict[str, Any]],
) -> None:
    router = named(demo, "Deployment", "pdlaunch")["spec"]
    assert (router["replicas"], router["strategy"]) == (1, {"type": "Recreate"})
    other = render("kubernetes", DEMO, "--block-size", "32")
    first, second = (router_pod(each)["metadata"]["annotations"] for each in (demo, other))
    assert first["checksum/config"] != second["checksum/config"]


def test_only_pods_of_the_launch_reach_its_engines(demo: list[dict[str, Any]]) -> None:
    opened = {
        found["metadata"]["name"]: found["spec"]["ingress"][0]
        for found in demo
        if found["kind"] == "NetworkPolicy"
    }
    assert "from" not in opened.pop("pdlaunch-http")
    for rule in opened.values():
        (sender,) = rule["from"]
        labels = sender["podSelector"]["matchLabels"]
        assert labels["app.kubernetes.io/instance"] == "pdlaunch"
    (data,) = opened["pdlaunch-kv"]["ports"]
    assert (data["port"], data["endPort"]) == (21000, 21999)
    (chosen,) = opened["pdlaunch-ranks"]["ports"]
    for _, pods in templates(demo):
        (sysctl,) = pods["spec"]["securityContext"]["sysctls"]
        assert sysctl["value"] == f"{chosen['port']} {chosen['endPort']}"


def test_ports_of_kv_blocks_open_only_where_the_deployment_trusts_its_network(
    tmp_path: Path,
) -> None:
    result = run("kubernetes", DEMO, "--assume", "cpu", trusted=False)
    assert result.exit_code == 1
    assert "PD428" in result.stderr
    path = tmp_path / "deploy.yaml"
    path.write_text("kv_transfer: {connector: file, file: {directory: /cache/kv}}\n")
    objects = render("kubernetes", str(path))
    assert "pdlaunch-kv" not in {found["metadata"]["name"] for found in objects}


def test_pods_of_vllm_are_joined_by_the_ports_of_its_kv_blocks(tmp_path: Path) -> None:
    path = tmp_path / "deploy.yaml"
    path.write_text("engine: vllm\nengine_command: /opt/vllm/bin/vllm\n")
    refused = run("kubernetes", str(path), "--assume", "cpu", trusted=False)
    assert "PD428" in refused.stderr
    objects = render("kubernetes", str(path))
    check_schema(objects)
    opened = {found["metadata"]["name"] for found in objects}
    assert {"pdlaunch-kv", "pdlaunch-ranks"} <= opened
    for _, pod in templates(objects):
        words = pod["spec"]["containers"][0]["command"]
        allowed = [name for flag, name in pairwise(words) if flag == "--allow-executable"]
        assert allowed == ([] if "agent" not in words else ["/opt/vllm/bin/vllm"])


def test_each_host_of_an_engine_is_a_pod(tmp_path: Path) -> None:
    path = tmp_path / "deploy.yaml"
    path.write_text("engine: vllm\nprefill: {tensor_parallel_size: 3, nnodes: 3}\n")
    objects = render("kubernetes", str(path), "--assume", "h100x8")
    check_schema(objects)
    prefill = named(objects, "StatefulSet", "pdlaunch-prefill")["spec"]
    assert prefill["replicas"] == 3
    (container,) = prefill["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "1"}


def test_each_engine_over_hosts_is_a_group_of_a_leader_worker_set(tmp_path: Path) -> None:
    path = tmp_path / "deploy.yaml"
    path.write_text("engine: vllm\nprefill: {replicas: 2, tensor_parallel_size: 3, nnodes: 3}\n")
    topology = ("--exclusive-topology", "example.com/rack")
    objects = render("kubernetes", str(path), "--assume", "h100x8", *topology)
    check_schema(objects)
    prefill = named(objects, "LeaderWorkerSet", "pdlaunch-prefill")
    annotations = {"leaderworkerset.sigs.k8s.io/exclusive-topology": "example.com/rack"}
    assert prefill["metadata"]["annotations"] == annotations
    assert prefill["spec"]["replicas"] == 2
    group = prefill["spec"]["leaderWorkerTemplate"]
    assert (group["size"], group["restartPolicy"]) == (3, "None")
    decode = named(objects, "StatefulSet", "pdlaunch-decode")["spec"]
    assert decode["replicas"] == 1
    assert decode["template"]["metadata"]["labels"]["llm-d.ai/role"] == "decode"
    path.write_text(named(objects, "ConfigMap", "pdlaunch-config")["data"]["deployment.yaml"])
    config = load_config(path, {}, {}).config
    assert (config.placement, config.placement_strategy) == ("hosts", "spread")
    hosts = [(host.name, host.roles) for host in config.hosts]
    pods = [f"pdlaunch-prefill-{pod}" for pod in ("0", "0-1", "0-2", "1", "1-1", "1-2")]
    assert hosts == [*((pod, ("prefill",)) for pod in pods), ("pdlaunch-decode-0", ("decode",))]
    rooms = {pod: {"prefill": ("cuda", 1)} for pod in pods}
    placed = place_engines({"prefill": 2}, {"prefill": 1}, rooms, "spread", {"prefill": 3})
    assert [[node.host for node in nodes] for nodes in placed.values()] == [
        pods[:3],
        pods[3:],
    ]


def test_gpus_and_rdma_are_requested_by_their_resources() -> None:
    objects = render(
        "kubernetes",
        DEMO,
        *("--assume", "h100x8", "--tensor-parallel-size", "3", "--rdma-resource", "rdma/hca"),
    )
    check_schema(objects)
    (container,) = named(objects, "StatefulSet", "pdlaunch-decode")["spec"]["template"]["spec"][
        "containers"
    ]
    resources = container["resources"]
    assert resources["limits"] == {"nvidia.com/gpu": "3", "rdma/hca": "1"}
    assert resources["limits"].items() <= resources["requests"].items()
    assert container["securityContext"]["capabilities"]["add"] == ["IPC_LOCK"]


SECRET_FILE = """\
api_key: of-the-clients
env: {HF_TOKEN: of-the-hub, UCX_LOG_LEVEL: warn}
decode: {env: {MY_PASSWORD: of-decode}}
"""


def test_secrets_are_printed_only_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "deploy.yaml"
    path.write_text(SECRET_FILE)
    result = run("kubernetes", str(path), "--assume", "cpu")
    assert result.exit_code == 0, result.output
    assert not any(word in result.output for word in ("of-the-", "of-decode"))
    objects = list(yaml.safe_load_all(result.stdout))
    check_schema(objects)
    (secret,) = render("kubernetes", str(path), "--print-secret")
    check_schema([secret])
    assert secret["kind"] == "Secret"
    values = secret["stringData"]
    assert values["PDLAUNCH_API_KEY"] == "of-the-clients"
    assert values["decode.MY_PASSWORD"] == "of-decode"
    # Every key that pods refer to is there.
    for _, pods in templates(objects):
        spec = pods["spec"]
        wanted = {
            each["valueFrom"]["secretKeyRef"]["key"]
            for container in spec["containers"]
            for each in container["env"]
            if "secretKeyRef" in each.get("valueFrom", {})
        }
        wanted |= {
            item["key"]
            for volume in spec["volumes"]
            if volume.get("secret", {}).get("secretName") == secret["metadata"]["name"]
            for item in volume["secret"]["items"]
        }
        assert wanted <= values.keys()
    variables = {each["name"] for each in spec["containers"][0]["env"]}
    assert "PDLAUNCH_API_KEY" in variables  # the router's pod comes last


@pytest.mark.parametrize(
    ("arguments", "field", "code"),
    [
        (("--name", "Not_A_Name"), "--name", 2),
        (("--namespace", "x" * 50), "--namespace", 2),
        (("--volume", "models"), "--volume", 2),
        (("--model", "/models/llama"), "model", 2),
        (("--placement", "hosts", "--hosts", "a,b"), "placement", 2),
        # What check-config finds stops it.
        (("--kv-cache-memory", "1KiB"), "not rendered", 1),
    ],
)
def test_what_cannot_be_rendered_is_refused(
    arguments: tuple[str, ...], field: str, code: int
) -> None:
    result = run("kubernetes", DEMO, "--assume", "cpu", *arguments)
    assert result.exit_code == code, result.output
    assert field in result.stderr
    assert result.stdout == ""
