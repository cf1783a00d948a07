"""Describes an application in OpenAPI's form: its routes, with pydantic's and msgspec's schemas."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import msgspec
from pydantic.json_schema import models_json_schema

from pdlaunch import __version__
from pdlaunch.protocol.openai.body import INTERNAL_FIELDS, RequestBody

_REFERENCE = "#/components/schemas/"
_PARAMETER = re.compile(r"\{(\w+)(:[^}]*)?\}")


class Operation(NamedTuple):
    """Describes what a route does, takes and answers."""

    summary: str
    requests: Sequence[type[RequestBody]] = ()
    """The body is one of these; without any there is none."""
    answer: type[msgspec.Struct] | None = None
    """None: JSON of a form that is not described."""
    chunk: type[msgspec.Struct] | None = None
    """The data of each event but the last one, ``[DONE]``, where the route can stream."""
    content_type: str = "application/json"


class DescribedRoute(NamedTuple):
    """Holds what the description needs of a route."""

    method: str
    path: str
    operation: Operation
    needs_key: bool


def describe(title: str, routes: Iterable[DescribedRoute], *, public: bool) -> dict[str, Any]:
    """Return the OpenAPI document. ``public``: clients may not send ``INTERNAL_FIELDS``."""
    paths: dict[str, Any] = {}
    requests: set[type[RequestBody]] = set()
    answers: list[type[msgspec.Struct]] = []
    for route in routes:
        operation = route.operation
        requests.update(operation.requests)
        answers += [kind for kind in (operation.answer, operation.chunk) if kind]
        place = paths.setdefault(_PARAMETER.sub(r"{\1}", route.path), {})
        for method in ("get", "post") if route.method == "*" else (route.method.lower(),):
            place[method] = _operation(route)
    ordered = sorted(requests, key=lambda kind: kind.__name__)
    template = _REFERENCE + "{model}"
    _, schemas = models_json_schema(
        [(kind, "validation") for kind in ordered], ref_template=template
    )
    components: dict[str, Any] = schemas.get("$defs", {})
    for schema in components.values():
        for name in INTERNAL_FIELDS if public else ():
            schema.get("properties", {}).pop(name, None)
    _, described = msgspec.json.schema_components(answers, ref_template=_REFERENCE + "{name}")
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": __version__},
        "paths": paths,
        "components": {
            "schemas": components | described,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(route: DescribedRoute) -> dict[str, Any]:
    operation = route.operation
    is_json = operation.content_type == "application/json"
    plain = {"type": "object" if is_json else "string"}
    answer = plain if operation.answer is None else _reference(operation.answer)
    content: dict[str, Any] = {operation.content_type: {"schema": answer}}
    if operation.chunk is not None:
        content["text/event-stream"] = {"schema": _reference(operation.chunk)}
    described: dict[str, Any] = {
        "summary": operation.summary,
        "responses": {"200": {"description": "The answer.", "content": content}},
    }
    if route.needs_key:
        described["security"] = [{"key": []}]
    if names := _PARAMETER.findall(route.path):
        described["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name, _ in names
        ]
    if operation.requests:
        schema = {"anyOf": [_reference(kind) for kind in operation.requests]}
        described["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": schema}},
        }
    return described


def _reference(kind: type) -> dict[str, str]:
    return {"$ref": _REFERENCE + kind.__name__}
