"""Checks values against the parts of JSON Schema that /openapi.json uses."""

from __future__ import annotations

from typing import Any

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}


def misfits(value: object, schema: dict[str, Any], document: dict[str, Any]) -> list[str]:
    """What of ``value`` is not as ``schema`` says; members that it does not name are misfits."""
    if "$ref" in schema:
        target: Any = document
        for part in schema["$ref"].removeprefix("#/").split("/"):
            target = target[part]
        return misfits(value, target, document)
    for choice in ("anyOf", "oneOf"):
        if choice in schema:
            tries = [misfits(value, inner, document) for inner in schema[choice]]
            return min(tries, key=len)
    if "enum" in schema or "const" in schema:
        allowed = schema.get("enum", [schema.get("const")])
        return [] if value in allowed else [f"{value!r} is none of {allowed}"]
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(isinstance(value, _TYPES[kind]) for kind in kinds):
        return [f"{value!r} is no {kinds}"]
    found: list[str] = []
    if isinstance(value, dict):
        inner = schema.get("properties", {})
        found += [f"{name} is missing" for name in schema.get("required", ()) if name not in value]
        for name, member in value.items():
            if name in inner:
                found += [f"{name}: {text}" for text in misfits(member, inner[name], document)]
            elif inner:
                found.append(f"{name} is not described")
    elif isinstance(value, list) and "items" in schema:
        for item in value:
            found += misfits(item, schema["items"], document)
    return found
