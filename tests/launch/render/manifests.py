"""Renders deployments for tests, and judges the objects by rules that no schema knows."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import kubernetes_validate
import kubernetes_validate.utils
import yaml

from pdlaunch.router.app import OPEN_PATHS
from tests.command_line import invoke

ROOT = Path(__file__).parents[3]
NAMES = ("demo", "two_by_two", "tensor_parallel")
EXAMPLES = [ROOT / "examples" / f"{name}.yaml" for name in NAMES]
TRUSTED = {"PDLAUNCH_KV_TRANSFER__TRUSTED_NETWORK": "true"}
KUBERNETES = "1.37"

Object = dict[str, Any]

# The library reads megabytes for each object.
_schema_contents = functools.cache(kubernetes_validate.utils.schema_contents)


def run(*arguments: str, trusted: bool = True) -> Any:
    """Run ``pdlaunch render`` in this process."""
    words = ["render", *arguments]
    return invoke(words, env=TRUSTED if trusted else {})


def render(kind: str, *arguments: str) -> list[Object]:
    """Return the documents that ``pdlaunch render`` prints, for a machine without GPUs unless told
    otherwise.
    """
    assumed = () if "--assume" in arguments else ("--assume", "cpu")
    result = run(kind, *arguments, *assumed)
    assert result.exit_code == 0, result.output
    return list(yaml.safe_load_all(result.stdout))


def named(objects: list[Object], kind: str, name: str) -> Object:
    (found,) = (o for o in objects if o["kind"] == kind and o["metadata"]["name"] == name)
    return found


def templates(objects: list[Object]) -> Iterator[tuple[Object, Object]]:
    """Yield every workload with the template of its pods."""
    for found in objects:
        match found["kind"]:
            case "Deployment" | "StatefulSet":
                yield found, found["spec"]["template"]


def check_schema(objects: list[Object]) -> None:
    """Judge types and unknown fields."""
    for found in objects:
        with patch.object(kubernetes_validate.utils, "schema_contents", _schema_contents):
            kubernetes_validate.validate(found, KUBERNETES, strict=True)


def problems(objects: list[Object]) -> list[str]:
    """Return what is wrong between objects."""
    return [*_of_names(objects), *_of_references(objects), *_of_ports(objects), *_of_pods(objects)]


def _of_names(objects: list[Object]) -> Iterator[str]:
    seen: set[tuple[str, str]] = set()
    for found in objects:
        key = (found["kind"], found["metadata"]["name"])
        if key in seen:
            yield f"{key} twice"
        seen.add(key)
    if any(found["kind"] == "Secret" for found in objects):
        yield "a secret is printed"


def _selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    terms = selector.get("matchExpressions", [])
    assert all(term["operator"] == "In" for term in terms)
    return selector.get("matchLabels", {}).items() <= labels.items() and all(
        labels.get(term["key"]) in term["values"] for term in terms
    )


def _of_references(objects: list[Object]) -> Iterator[str]:
    names = {(found["kind"], found["metadata"]["name"]): found for found in objects}
    all_pods = [pods for _, pods in templates(objects)]
    for workload, pods in templates(objects):
        where = workload["metadata"]["name"]
        labels = pods["metadata"]["labels"]
        if "selector" in workload["spec"] and not _selects(workload["spec"]["selector"], labels):
            yield f"{where} does not select its own pods"
        service = workload["spec"].get("serviceName")
        if service is not None and ("Service", service) not in names:
            yield f"{where}: there is no service {service}"
        volumes = {volume["name"]: volume for volume in pods["spec"]["volumes"]}
        for volume in volumes.values():
            config = volume.get("configMap", {}).get("name")
            if config is not None and ("ConfigMap", config) not in names:
                yield f"{where}: there is no ConfigMap {config}"
            claim = volume.get("persistentVolumeClaim", {}).get("claimName")
            if claim == f"{where}-cache" and ("PersistentVolumeClaim", claim) not in names:
                yield f"{where}: there is no claim {claim}"
        for container in pods["spec"]["containers"]:
            for mount in container["volumeMounts"]:
                if mount["name"] not in volumes:
                    yield f"{where}: there is no volume {mount['name']}"
            yield from _of_variables(where, container)
    for found in objects:
        selector = {
            "Service": {"matchLabels": found.get("spec", {}).get("selector")},
            "NetworkPolicy": found.get("spec", {}).get("podSelector"),
            "PodDisruptionBudget": found.get("spec", {}).get("selector"),
        }.get(found["kind"])
        if selector is not None and not any(
            _selects(selector, pods["metadata"]["labels"]) for pods in all_pods
        ):
            yield f"{found['kind']} {found['metadata']['name']} selects no pod"


def _of_variables(where: str, container: Object) -> Iterator[str]:
    """Kubernetes replaces $(NAME) in variables that come later, and in the command."""
    known: set[str] = set()
    texts = []
    for variable in container.get("env", []):
        texts.append((variable.get("value", ""), set(known)))
        known.add(variable["name"])
    texts += [(word, known) for word in container["command"]]
    for text, there in texts:
        for part in text.split("$(")[1:]:
            if part.partition(")")[0] not in there:
                yield f"{where}: $({part} is not known there"


def _container_ports(pods: Object) -> dict[str, int]:
    return {
        port["name"]: port["containerPort"]
        for container in pods["spec"]["containers"]
        for port in container.get("ports", [])
    }


def _of_ports(objects: list[Object]) -> Iterator[str]:
    policies = [found["spec"] for found in objects if found["kind"] == "NetworkPolicy"]
    for found in objects:
        if found["kind"] != "Service":
            continue
        for pods in (pods for _, pods in templates(objects)):
            labels, ports = pods["metadata"]["labels"], _container_ports(pods)
            if not _selects({"matchLabels": found["spec"]["selector"]}, labels):
                continue
            for port in found["spec"].get("ports", []):
                target = ports.get(port["targetPort"])
                if target is None:
                    yield f"{found['metadata']['name']}: no port {port['targetPort']}"
                elif not any(
                    _selects(policy["podSelector"], labels) and _allows(policy, target)
                    for policy in policies
                ):
                    yield f"{found['metadata']['name']}: no policy opens {target}"
    for _, pods in templates(objects):
        if not any(_selects(p["podSelector"], pods["metadata"]["labels"]) for p in policies):
            yield f"no policy closes {pods['metadata']['labels']}"


def _allows(policy: Object, port: int) -> bool:
    return any(
        each["port"] <= port <= each.get("endPort", each["port"])
        for rule in policy["ingress"]
        for each in rule["ports"]
    )


def lets_in(
    objects: list[Object], to: Mapping[str, str], sender: Mapping[str, str], port: int
) -> bool:
    """Tell whether the policies let pods with the labels of ``sender`` connect to others there."""
    return any(
        "from" not in rule or any(_selects(each["podSelector"], sender) for each in rule["from"])
        for found in objects
        if found["kind"] == "NetworkPolicy" and _selects(found["spec"]["podSelector"], to)
        for rule in found["spec"]["ingress"]
        if _allows({"ingress": [rule]}, port)
    )


def _of_pods(objects: list[Object]) -> Iterator[str]:
    for workload, pods in templates(objects):
        where, spec = workload["metadata"]["name"], pods["spec"]
        if not spec["securityContext"]["runAsNonRoot"] or not spec["securityContext"]["runAsUser"]:
            yield f"{where} runs as root"
        if spec["automountServiceAccountToken"]:
            yield f"{where} can speak to the cluster"
        ports = _container_ports(pods)
        for container in spec["containers"]:
            security = container["securityContext"]
            if (
                security["allowPrivilegeEscalation"]
                or "ALL" not in security["capabilities"]["drop"]
            ):
                yield f"{where}: {container['name']} may become more than it is"
            for name in ("startupProbe", "readinessProbe", "livenessProbe"):
                probe = container.get(name, {}).get("httpGet")
                if probe is None:
                    continue
                if probe["path"] not in OPEN_PATHS:
                    yield f"{where}: {name} asks for {probe['path']}, which needs a key"
                if probe["port"] not in ports:
                    yield f"{where}: {name} asks at {probe['port']}"
