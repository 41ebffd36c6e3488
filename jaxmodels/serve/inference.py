"""The Open Inference Protocol, version 2, for classifiers: images, arrays and texts in, classes by name out."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

import jaxmodels
from jaxmodels.data import pixels
from jaxmodels.errors import UserError
from jaxmodels.fields import shown
from jaxmodels.serve import tensors
from jaxmodels.serve.asked import objects
from jaxmodels.serve.batches import Classifier
from jaxmodels.serve.classes import Classes, Row
from jaxmodels.serve.errors import Refused
from jaxmodels.serve.forms import Schema, fits
from jaxmodels.serve.service import Service

HEADER = "inference-header-content-length"
VERSION = "1"
TENSORS = {"image": "UINT8", "array": "FP32", "text": "BYTES"}
_PARAMETERS: Schema = {"anyOf": [{"type": "object"}, {"type": "null"}]}
_INPUT: Schema = {
    "type": "object",
    "properties": {"name": {"enum": ["inputs"]}, **tensors.FORM, "data": {}, "parameters": _PARAMETERS},
    "required": ["name", "shape", "datatype"],
}
_OUTPUT: Schema = {
    "type": "object",
    "properties": {"name": {"enum": ["probabilities", "label", "labels"]}, "parameters": _PARAMETERS},
    "required": ["name"],
}
FORM: Schema = {
    "type": "object",
    "properties": {
        "id": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "inputs": {"type": "array", "items": _INPUT, "minItems": 1, "maxItems": 1},
        "outputs": {"anyOf": [{"type": "array", "items": _OUTPUT}, {"type": "null"}]},
        "parameters": _PARAMETERS,
    },
    "required": ["inputs"],
    "additionalProperties": False,
}
"""What a request to infer is."""
SAID = {
    "id": "a text",
    "outputs": "a list of objects, each one of the name probabilities or label",
    "parameters": "an object",
}


def schema(_: list[str]) -> Schema:
    """The JSON schema of a request, which has the model's name in its path."""
    return FORM


async def server(_: Request) -> Response:
    """The server, by the Open Inference Protocol."""
    return JSONResponse({"name": "jaxmodels", "version": jaxmodels.__version__, "extensions": ["binary_tensor_data"]})


async def model(request: Request) -> Response:
    """What a model takes and gives."""
    classes = _found(request).classes
    outputs = [
        {"name": "probabilities", "datatype": "FP32", "shape": [-1, len(classes.names)]},
        {"name": _labels(classes), "datatype": "BYTES", "shape": [-1]},
    ]
    takes = {"name": "inputs", "datatype": TENSORS[classes.kind], "shape": [-1, *classes.shape]}
    told = {"name": request.path_params["name"], "versions": [VERSION], "platform": "jax"}
    return JSONResponse({**told, "inputs": [takes], "outputs": outputs})


async def ready(request: Request) -> Response:
    """Whether a model takes requests."""
    service: Service = request.app.state.service
    _version(request)
    served = service.find(request.path_params["name"])
    return JSONResponse({"name": served.opened.name, "ready": served.error is None}, 503 if served.error else 200)


async def infer(request: Request) -> Response:
    """Classify the rows of a tensor."""
    service: Service = request.app.state.service
    batches = _found(request)
    classes = batches.classes
    asked, rest = _split(await service.body(request), request.headers.get(HEADER))
    wanted = _wanted(asked, classes)
    tensor = _input(asked, rest)
    service.admit(service.find(request.path_params["name"]), len(tensor))
    try:
        shares = await service.unless_gone(request, _computed(batches, tensor))
    finally:
        service.leave(len(tensor))
    if not np.isfinite(shares).all():
        raise Refused(422, "got inputs for which the model gives no finite numbers, expected others")
    given = {"probabilities": shares, _labels(classes): _named(classes, shares)}
    written = [tensors.write(name, given[name], binary) for name, binary in wanted.items()]
    told = {"model_name": request.path_params["name"], "model_version": VERSION, "outputs": [one for one, _ in written]}
    if isinstance(asked.get("id"), str):
        told["id"] = asked["id"]
    raw = b"".join(data for _, data in written)
    if not raw:
        return JSONResponse(told)
    head = json.dumps(told).encode()
    return Response(
        head + raw, media_type="application/octet-stream", headers={"Inference-Header-Content-Length": str(len(head))}
    )


def _found(request: Request) -> Classifier:
    service: Service = request.app.state.service
    _version(request)
    return service.batches(request.path_params["name"], Classifier)


def _version(request: Request) -> None:
    if (version := request.path_params.get("version", VERSION)) != VERSION:
        raise Refused(404, f"got version {version[:20]!r}, expected {VERSION}")


def _split(body: bytes, size: str | None) -> tuple[dict[str, Any], memoryview]:
    """The JSON of a request, and the bytes behind it."""
    if size is None:
        return objects(body), memoryview(b"")
    if not size.isdecimal() or len(size) > 12 or int(size) > len(body):
        raise Refused(400, f"got {HEADER} {shown(size)}, expected at most the body's {len(body)} bytes")
    return objects(body[: int(size)]), memoryview(body)[int(size) :]


def _input(asked: dict[str, Any], rest: memoryview) -> np.ndarray:
    inputs = asked.get("inputs")
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        raise Refused(400, f"got inputs {shown(inputs)}, expected a list of one tensor")
    told = inputs[0]
    if told.get("name") != "inputs" or not fits(_PARAMETERS, told.get("parameters")):
        raise Refused(400, f"got an input {shown(told.get('name'))}, expected one of the name inputs")
    tensor, used = tensors.read(told, rest)
    if used != len(rest):
        raise Refused(400, f"got {len(rest) - used} bytes more than the input has, expected none")
    return tensor


def _wanted(asked: dict[str, Any], classes: Classes) -> dict[str, bool]:
    """The outputs to give, and whether each goes behind the JSON as bytes; checks all that is asked but the input."""
    if unknown := [name for name in asked if name not in ("id", "inputs", "outputs", "parameters")]:
        raise Refused(400, f"got field {shown(unknown[0])}, expected id, inputs, outputs or parameters")
    for name, form in FORM["properties"].items():
        if name in asked and name != "inputs" and not fits(form, asked[name]):
            raise Refused(400, f"got {name} {shown(asked[name])}, expected {SAID[name]}")
    known, outputs = ("probabilities", _labels(classes)), asked.get("outputs")
    usual = (asked.get("parameters") or {}).get("binary_data_output") is True
    if not outputs:
        return dict.fromkeys(known, usual)
    wanted = {}
    for each in outputs:
        if each["name"] not in known:
            raise Refused(400, f"got output {shown(each)}, expected one of the name {' or '.join(known)}")
        wanted[each["name"]] = bool((each.get("parameters") or {}).get("binary_data", usual))
    return wanted


async def _computed(batches: Classifier, tensor: np.ndarray) -> np.ndarray:
    rows = await asyncio.to_thread(_rows, batches.classes, tensor)
    return await batches.compute(rows)


def _rows(classes: Classes, tensor: np.ndarray) -> list[Row]:
    """The rows of a tensor, as the model reads records in training.

    Raises:
        Refused: one of them is not what the model reads.
    """
    if tensor.dtype == object:
        if tensor.ndim != 1:
            raise Refused(400, f"got BYTES of shape {list(tensor.shape)}, expected one for each record, [N]")
        return [_record(classes, i, _value(classes, value)) for i, value in enumerate(tensor)]
    if classes.kind == "text":
        raise Refused(400, "got numbers for a model of texts, expected BYTES of shape [N]")
    if tensor.shape[1:] != classes.shape:
        raise Refused(400, f"got shape {list(tensor.shape)}, expected {[-1, *classes.shape]}")
    if classes.kind == "array":
        return [_record(classes, i, row) for i, row in enumerate(tensor)]
    if tensor.dtype != np.uint8:
        raise Refused(400, f"got images of {tensor.dtype}, expected UINT8, or BYTES that are files of images")
    return [{"inputs": row} for row in tensor]


def _value(classes: Classes, value: bytes) -> Any:
    if classes.kind == "image":
        return value
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise Refused(400, "got BYTES that are no UTF-8, expected texts") from None


def _record(classes: Classes, number: int, value: Any) -> Row:
    try:
        return classes.read(value)
    except (UserError, pixels.Unreadable) as error:
        raise Refused(400, f"got record {number}, which {error}".partition(", try --")[0]) from None


def _labels(classes: Classes) -> str:
    return "labels" if classes.several else "label"


def _named(classes: Classes, shares: np.ndarray) -> np.ndarray:
    """The name of each row's class; with classes that do not exclude each other, a JSON list of those above 1/2."""
    found = np.empty(len(shares), object)
    for i, row in enumerate(shares):
        several = json.dumps([classes.names[k] for k in np.flatnonzero(row > 0.5)], ensure_ascii=False)
        found[i] = several if classes.several else classes.names[int(row.argmax())]
    return found
