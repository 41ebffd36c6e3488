"""The server's description of itself in OpenAPI's format, made from what its endpoints accept and answer."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

import jaxmodels
from jaxmodels.serve import answers
from jaxmodels.serve.batches import Batches
from jaxmodels.serve.forms import Schema, schema
from jaxmodels.serve.service import Service
from jaxmodels.serve.worker import Worker

BYTES = "application/octet-stream"
EVENTS = "text/event-stream"


@dataclass(frozen=True)
class Endpoint:
    """A path with what answers it, and the forms of requests and answers."""

    method: str
    path: str
    """As starlette has it."""
    handler: Callable[..., Any]
    """Its docstring is the endpoint's."""
    answer: Any = None
    """The type of an answer in JSON; None: it is text."""
    body: Callable[[list[str]], Schema] | None = None
    """The schema of a request's body for models of these names."""
    of: type[Worker] | type[Batches] | None = None
    """What runs the models that it is for; None: all of them, or none."""
    media: str = "text/plain"
    """The form of an answer that is not JSON."""
    part: Any = None
    """The type of an event, if an answer may be a stream of them."""
    fails: Any = answers.Failure
    """The type of a refusal."""
    values: Mapping[str, tuple[str, ...]] | None = None
    """What may stand for parts of the path other than a model's name."""
    open: bool = False
    """Whether it needs no key, and is answered while the server loads or drains."""


def document(service: Service, endpoints: list[Endpoint]) -> dict[str, Any]:
    """The description of a server: the paths that its models answer, with their names."""
    paths: dict[str, Any] = {}
    named: dict[str, Schema] = {}
    for endpoint in endpoints:
        names = [name for name, each in service.served.items() if _runs(endpoint, each.worker or each.batches)]
        if names:
            path = re.sub(r":\w+}", "}", endpoint.path)
            paths.setdefault(path, {})[endpoint.method.lower()] = _operation(endpoint, names, named)
    made = {"openapi": "3.1.0", "info": {"title": "jaxmodels", "version": jaxmodels.__version__}, "paths": paths}
    components: dict[str, Any] = {"schemas": named}
    if service.limits.keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        made["security"] = [{"key": []}]
    return {**made, "components": components}


def _runs(endpoint: Endpoint, runs: Any) -> bool:
    return endpoint.of is None or isinstance(runs, endpoint.of)


def _operation(endpoint: Endpoint, names: list[str], named: dict[str, Schema]) -> dict[str, Any]:
    refused = {"description": "Refused: got …, expected …", "content": _json(schema(endpoint.fails, named))}
    told: dict[str, Any] = {
        "summary": (endpoint.handler.__doc__ or "").strip().splitlines()[0],
        "responses": {
            "200": {"description": HTTPStatus.OK.phrase, "content": _content(endpoint, named)},
            "default": refused,
        },
    }
    if endpoint.open:
        told["security"] = []
    known = {"name": names, **(endpoint.values or {})}
    if parts := re.findall(r"{(\w+)", endpoint.path):
        told["parameters"] = [
            {"name": part, "in": "path", "required": True, "schema": {"type": "string", "enum": list(known[part])}}
            for part in parts
        ]
    if endpoint.body is not None:
        told["requestBody"] = {"required": True, "content": _json(endpoint.body(names))}
    return told


def _content(endpoint: Endpoint, named: dict[str, Schema]) -> dict[str, Any]:
    if endpoint.answer is None:
        return {endpoint.media: {"schema": {"type": "string"}}}
    content = _json(schema(endpoint.answer, named))
    if endpoint.part is not None:
        event = schema(endpoint.part, named)["$ref"].rpartition("/")[2]
        said = f"Events `data: …` with a {event} each, or a {endpoint.fails.__name__}; the last one is `data: [DONE]`."
        content[EVENTS] = {"schema": {"type": "string", "description": said}}
    if endpoint.media == BYTES:
        content[BYTES] = {"schema": {"type": "string", "format": "binary"}}
    return content


def _json(form: Schema) -> dict[str, Any]:
    return {"application/json": {"schema": form}}


async def described(request: Request) -> Response:
    """This description."""
    return JSONResponse(request.app.state.document)
