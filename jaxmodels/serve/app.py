"""The application: its paths, and what happens around every request."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxmodels.serve import answers, asked, embeddings, inference, openai, openapi
from jaxmodels.serve.batches import Classifier
from jaxmodels.serve.errors import Refused, response
from jaxmodels.serve.openapi import Endpoint
from jaxmodels.serve.service import Service
from jaxmodels.serve.worker import Worker

log = logging.getLogger("jaxmodels")


def build(service: Service) -> ASGIApp:
    """Build the application of a service."""
    service.metrics.watch(
        lambda: [(each.opened.name, each.worker.engine) for each in service.served.values() if each.worker],
        lambda: [(each.opened.name, each.batches) for each in service.served.values() if each.batches],
    )
    routes = [Route(each.path, each.handler, methods=[each.method]) for each in ENDPOINTS]
    handlers: Any = {Refused: _refuse, HTTPException: _http, ClientDisconnect: _gone, Exception: _failed}
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.state.service, app.state.document = service, openapi.document(service, ENDPOINTS)
    return Around(app, service, routes)


async def health(request: Request) -> Response:
    """Whether the server takes requests."""
    service: Service = request.app.state.service
    said = "ready" if service.ready else "loading"
    said = "draining" if service.draining else _broken(service) or said
    return JSONResponse({"status": said}, 200 if said == "ready" else 503)


async def live(request: Request) -> Response:
    """Whether the process is of use; if not, a scheduler starts another one."""
    said = _broken(request.app.state.service)
    return JSONResponse({"status": said or "live"}, 503 if said else 200)


def _broken(service: Service) -> str:
    """Say whose engine has failed; empty if none has."""
    broken = [name for name, each in service.served.items() if each.error is not None]
    return f"failed: {', '.join(broken)}" if broken else ""


async def metrics(request: Request) -> Response:
    """All metrics, for Prometheus."""
    service: Service = request.app.state.service
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


ENDPOINTS = [
    Endpoint("GET", "/health", health, answers.Status, fails=answers.Status, open=True),
    Endpoint("GET", "/metrics", metrics, open=True),
    Endpoint("GET", "/openapi.json", openapi.described, dict[str, Any]),
    Endpoint("GET", "/v1/models", openai.models, answers.Models),
    Endpoint("GET", "/v1/models/{name:path}", openai.model, answers.Model),
    Endpoint(
        "POST", "/v1/completions", openai.completions, answers.CompletionAnswer, asked.Completion.schema, Worker,
        part=answers.CompletionAnswer,
    ),
    Endpoint(
        "POST", "/v1/chat/completions", openai.chats, answers.ChatAnswer, asked.Chat.schema, Worker,
        part=answers.ChatChunk,
    ),
    Endpoint(
        "POST", "/v1/embeddings", embeddings.embeddings, answers.Embeddings, asked.Embed.schema, embeddings.Embedder
    ),
    Endpoint("GET", "/v2", inference.server, answers.Server, fails=answers.InferenceFailure),
    Endpoint("GET", "/v2/health/live", live, answers.Status, fails=answers.Status, open=True),
    Endpoint("GET", "/v2/health/ready", health, answers.Status, fails=answers.Status, open=True),
    *(
        dataclasses.replace(
            each, path=path + each.path, fails=answers.InferenceFailure, values={"version": (inference.VERSION,)}
        )
        for path in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}")
        for each in (
            Endpoint("GET", "", inference.model, answers.InferenceModel, of=Classifier),
            Endpoint("GET", "/ready", inference.ready, answers.Readiness),
            Endpoint("POST", "/infer", inference.infer, answers.Inference, inference.schema, Classifier, openapi.BYTES),
        )
    ),
]  # fmt: skip
"""All paths, what answers them, and the forms of what they take and give."""
OPEN = [each.path for each in ENDPOINTS if each.open]


async def _refuse(request: Request, error: Any) -> Response:
    return response(request.url.path, error)


async def _http(request: Request, error: Any) -> Response:
    what = {404: "no such path", 405: f"method {request.method} for this path"}.get(error.status_code, error.detail)
    said = f"got {what}, expected one of those in /openapi.json"
    return response(request.url.path, Refused(error.status_code, said, headers=error.headers))


async def _failed(request: Request, _: Any) -> Response:
    return response(request.url.path, Refused(503, "the server has failed, and its log says how"))


async def _gone(_: Request, __: Any) -> Response:
    return Response(status_code=499)


class Around:
    """Around every request: keys, draining, counts, a line of the log, and an answer whatever goes wrong."""

    def __init__(self, app: ASGIApp, service: Service, routes: Sequence[Route]) -> None:
        self.app, self.service, self.routes = app, service, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        service, began, status = self.service, time.monotonic(), 499
        scope.setdefault("state", {})
        request = Request(scope, receive)
        path, inside = scope["path"], scope["path"] not in OPEN

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            service.inside += inside
            if inside and (refused := self._refusal(request)):
                await response(path, refused)(scope, receive, sent)
            else:
                await self.app(scope, receive, sent)
        except Exception:  # which the client has been told of, where it could be
            log.exception("a request has failed")
        finally:
            known = next((route.path for route in self.routes if route.matches(scope)[0] != Match.NONE), "other")
            service.metrics.request(known, status)
            if inside:
                service.log(request, status, time.monotonic() - began)
            service.inside -= inside

    def _refusal(self, request: Request) -> Refused | None:
        service = self.service
        if service.draining or not service.ready:
            said = "is stopping" if service.draining else "is not ready"
            return Refused(503, f"the server {said}", headers={"Retry-After": "5", "Connection": "close"})
        try:
            service.check_key(request)
        except Refused as refused:
            return refused
        return None
