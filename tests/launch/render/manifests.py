"""Renders deployments for tests, and judges the objects by the schemas of Kubernetes."""

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import kubernetes_validate
import kubernetes_validate.utils
import yaml

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
    for found in objects:
        match found["kind"]:
            case "Deployment" | "StatefulSet":
                yield found, found["spec"]["template"]
            case "LeaderWorkerSet":
                yield found, found["spec"]["leaderWorkerTemplate"]["workerTemplate"]


def check_schema(objects: list[Object]) -> None:
    for found in objects:
        if found["kind"] == "LeaderWorkerSet":
            # Source: api/leaderworkerset/v1/leaderworkerset_types.go of kubernetes-sigs/lws
            assert found["apiVersion"] == "leaderworkerset.x-k8s.io/v1"
            assert found["spec"].keys() == {"replicas", "leaderWorkerTemplate"}
            group = found["spec"]["leaderWorkerTemplate"]
            assert group.keys() == {"size", "restartPolicy", "workerTemplate"}
            pods = {"apiVersion": "v1", "kind": "PodTemplate", "template": group["workerTemplate"]}
            found = pods | {"metadata": found["metadata"]}
        with patch.object(kubernetes_validate.utils, "schema_contents", _schema_contents):
            kubernetes_validate.validate(found, KUBERNETES, strict=True)


def _selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    terms = selector.get("matchExpressions", [])
    assert all(term["operator"] == "In" for term in terms)
    return selector.get("matchLabels", {}).items() <= labels.items() and all(
        labels.get(term["key"]) in term["values"] for term in terms
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
        if any(each["port"] <= port <= each.get("endPort", each["port"]) for each in rule["ports"])
    )
