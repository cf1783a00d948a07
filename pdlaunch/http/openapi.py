"""Describes an application in OpenAPI's form, from its routes and the types of what they take and
answer.
"""

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
_METHODS_OF_ANY = ("GET", "POST")

_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}


class Operation(NamedTuple):
    """Describes what a route does, takes and answers."""

    summary: str
    requests: Sequence[type[RequestBody]] = ()
    """The body is one of these; without any there is none."""
    answer: type[msgspec.Struct] | None = None
    """None: JSON of a form that is not described."""
    chunk: type[msgspec.Struct] | None = None
    """The data of each event, where the route can stream."""
    content_type: str = "application/json"


class DescribedRoute(NamedTuple):
    """Holds what the description needs of a route."""

    method: str
    path: str
    operation: Operation
    needs_key: bool


def describe(
    title: str, routes: Iterable[DescribedRoute], *, public: bool, strict_fields: bool
) -> dict[str, Any]:
    """Return the OpenAPI document.

    ``public``: clients may not send ``INTERNAL_FIELDS``. ``strict_fields``: unknown fields are
    refused.
    """
    routes = list(routes)
    operations = [route.operation for route in routes]
    requests = {kind for operation in operations for kind in operation.requests}
    answers = [kind for each in operations for kind in (each.answer, each.chunk) if kind]
    _, schemas = models_json_schema(
        [(kind, "validation") for kind in sorted(requests, key=lambda kind: kind.__name__)],
        ref_template=_REFERENCE + "{model}",
    )
    components: dict[str, Any] = schemas.get("$defs", {})
    for kind in _all_bodies(RequestBody):
        if kind.__name__ in components:
            _tell_all_fields(components[kind.__name__], kind, public, strict_fields)
    _, described = msgspec.json.schema_components(answers, ref_template=_REFERENCE + "{name}")
    paths: dict[str, Any] = {}
    for route in routes:
        path = _PARAMETER.sub(r"{\1}", route.path)
        for method in _METHODS_OF_ANY if route.method == "*" else (route.method,):
            paths.setdefault(path, {})[method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": __version__},
        "paths": paths,
        "components": {
            "schemas": components | described | {"Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _all_bodies(kind: type[RequestBody]) -> Iterable[type[RequestBody]]:
    for inner in kind.__subclasses__():
        yield inner
        yield from _all_bodies(inner)


def _tell_all_fields(
    schema: dict[str, Any], kind: type[RequestBody], public: bool, strict_fields: bool
) -> None:
    """Add what pydantic does not know: nulls, hints, fields of few values, and unknown ones."""
    required = schema.get("required", ())
    fields = {
        name: field if name in required else {"anyOf": [field, {"type": "null"}]}
        for name, field in schema.get("properties", {}).items()
        if not (public and name in INTERNAL_FIELDS)
    }
    neutral = {name: {"enum": [*values, None]} for name, values in kind.NEUTRAL.items()}
    hints = {name: {"description": "Accepted and not used."} for name in sorted(kind.HINTS)}
    schema["properties"] = fields | neutral | hints
    schema["additionalProperties"] = not strict_fields


def _operation(route: DescribedRoute) -> dict[str, Any]:
    operation = route.operation
    answer = {"type": "object"} if operation.answer is None else _reference(operation.answer)
    content: dict[str, Any] = (
        {operation.content_type: {"schema": answer}}
        if operation.content_type == "application/json"
        else {operation.content_type: {"schema": {"type": "string"}}}
    )
    if operation.chunk is not None:
        # OpenAPI has no form for events: this is the data of each but the last one, [DONE].
        content["text/event-stream"] = {"schema": _reference(operation.chunk)}
    described: dict[str, Any] = {
        "summary": operation.summary,
        "responses": {
            "200": {"description": "The answer.", "content": content},
            "default": {
                "description": "What is wrong, and with which field.",
                "content": {"application/json": {"schema": {"$ref": _REFERENCE + "Error"}}},
            },
        },
    }
    if route.needs_key:
        described["security"] = [{"key": []}]
    if names := _PARAMETER.findall(route.path):
        described["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name, _ in names
        ]
    if operation.requests:
        bodies = [_reference(kind) for kind in operation.requests]
        schema = bodies[0] if len(bodies) == 1 else {"anyOf": bodies}
        described["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": schema}},
        }
    return described


def _reference(kind: type) -> dict[str, str]:
    return {"$ref": _REFERENCE + kind.__name__}
