"""Forms of JSON values: schemas made from types, and whether a value is of a form."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)  # fmt: skip

from jaxmodels.fields import Range

Schema = Mapping[str, Any]
KINDS: Mapping[Any, str] = {
    bool: "boolean", int: "integer", float: "number", str: "string", types.NoneType: "null",
}  # fmt: skip
"""Types of Python, and their names in JSON Schema."""


@dataclass(frozen=True, eq=False)  # types have hashes, and so do their notes
class Form:
    """What a field accepts that no type of Python says: as a JSON schema, and in words for who got it wrong."""

    said: str
    schema: Schema


def schema(hint: Any, named: dict[str, Schema]) -> dict[str, Any]:
    """The JSON schema of a type; that of a TypedDict is a reference to its name, under which `named` gets it."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        found = schema(args[0], named)
        for note in args[1:]:
            found |= note.schema if isinstance(note, Form) else _bounds(note) if isinstance(note, Range) else {}
        return found
    if origin is NotRequired:
        return schema(args[0], named)
    if origin in (Union, types.UnionType):
        return {"anyOf": [schema(each, named) for each in args]}
    if origin is Literal:
        return {"enum": list(args)}
    if origin is list:
        return {"type": "array", "items": schema(args[0], named)}
    if origin is dict:
        return {"type": "object", "additionalProperties": schema(args[1], named)}
    if is_typeddict(hint):
        if hint.__name__ not in named:
            named[hint.__name__] = {}  # which ends the recursion of one that has itself inside
            named[hint.__name__] = _fields(hint, named)
        return {"$ref": f"#/components/schemas/{hint.__name__}"}
    if hint is Any:
        return {}
    return {"type": KINDS[hint]}


def _fields(kind: Any, named: dict[str, Schema]) -> Schema:
    hints = get_type_hints(kind, include_extras=True)
    return {
        "type": "object",
        "description": (kind.__doc__ or "").strip(),
        "properties": {name: schema(hint, named) for name, hint in hints.items()},
        "required": [name for name, hint in hints.items() if get_origin(hint) is not NotRequired],
        "additionalProperties": False,
    }


def _bounds(within: Range) -> dict[str, Any]:
    names = {"least": "minimum", "most": "maximum", "above": "exclusiveMinimum", "below": "exclusiveMaximum"}
    bounds = dataclasses.asdict(within)
    return {name: bounds[bound] for bound, name in names.items() if bounds[bound] is not None}


def fits(form: Schema, value: Any) -> bool:
    """Whether a value, read from JSON, is of a form, which has no references."""
    if "anyOf" in form and not any(fits(each, value) for each in form["anyOf"]):
        return False
    if "enum" in form and not any(type(value) is type(one) and value == one for one in form["enum"]):
        return False
    match form.get("type"):
        case None:
            return True
        case "array":
            return isinstance(value, list) and _sized(form, value, "Items") and _all_fit(form["items"], value)
        case "object":
            return isinstance(value, dict) and _members_fit(form, value)
        case "string":
            return isinstance(value, str) and _sized(form, value, "Length")
        case "integer":
            return type(value) is int and _between(form, value)
        case kind:
            return KINDS.get(type(value)) == kind


def _sized(form: Schema, value: Any, what: str) -> bool:
    return form.get(f"min{what}", 0) <= len(value) <= form.get(f"max{what}", len(value))


def _between(form: Schema, value: Any) -> bool:
    return form.get("minimum", value) <= value <= form.get("maximum", value)


def _all_fit(form: Schema, values: list[Any]) -> bool:
    if form.get("type") == "integer":  # there may be a million tokens
        least, most = form.get("minimum", float("-inf")), form.get("maximum", float("inf"))
        return all(type(value) is int and least <= value <= most for value in values)
    return all(fits(form, value) for value in values)


def _members_fit(form: Schema, value: dict[str, Any]) -> bool:
    known, rest = form.get("properties", {}), form.get("additionalProperties", {})
    if any(name not in value for name in form.get("required", ())):
        return False
    return all(
        fits(known[name], each) if name in known else rest is not False and fits(rest, each)
        for name, each in value.items()
    )
