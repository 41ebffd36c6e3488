"""What all endpoints share: the models and their engines, limits, admission, keys, and the log of requests."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import secrets
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.types import Receive

from jaxmodels.generate.engine import Engine, Step, Text
from jaxmodels.serve.batches import Batches
from jaxmodels.serve.errors import Broken, Refused
from jaxmodels.serve.metrics import Metrics
from jaxmodels.serve.opened import Opened, Writer
from jaxmodels.serve.worker import Worker

T = TypeVar("T")
B = TypeVar("B", bound=Batches)
BODY = 60
"""Seconds within which a request's body must be there."""
log = logging.getLogger("jaxmodels")


@dataclass(frozen=True)
class Limits:
    """What a request may ask for, and how many may wait."""

    body: int = 4 << 20
    """Bytes of a request's body."""
    seconds: float = 600.0
    """How long an answer may take."""
    queue: int = 256
    """Answers that may wait for a row; beyond that, requests are refused with 429."""
    keys: tuple[str, ...] = ()
    """With keys, a request must have one of them."""


@dataclass(frozen=True)
class Served:
    """A model beside the thread that runs it."""

    opened: Opened
    worker: Worker | None = None
    """That of a language model."""
    batches: Batches | None = None
    """That of any other."""

    @property
    def engine(self) -> Engine:
        assert self.worker is not None
        return self.worker.engine

    @property
    def error(self) -> Exception | None:
        """What has gone wrong for good."""
        return next((each.error for each in (self.worker, self.batches) if each and each.error), None)

    @property
    def rows(self) -> int:
        """How many answers are made at once."""
        return self.batches.sizes[-1] if self.batches else self.engine.shape.rows

    def prepare(self, say: Callable[[str], None]) -> None:
        """Compile, and start the thread."""
        for each in (self.worker, self.batches):
            if each is not None:
                each.prepare(say)
                each.start()

    def stop(self) -> None:
        """End the thread."""
        for each in (self.worker, self.batches):
            if each is not None:
                each.stop()

    @property
    def writer(self) -> Writer:
        assert self.opened.writer is not None
        return self.opened.writer


@dataclass
class Service:
    """What all endpoints share: models by name, and the state of the process."""

    served: dict[str, Served]
    limits: Limits = Limits()
    metrics: Metrics = field(default_factory=Metrics)
    began: int = field(default_factory=lambda: int(time.time()))
    ready: bool = False
    """Whether everything is compiled."""
    draining: bool = False
    """Whether no new request is taken any more."""
    inside: int = 0
    """Requests that were taken and are not answered."""
    answers: int = 0
    """Answers that are under way or wait."""
    prompts: bool = False
    """Whether logs have the bodies of requests."""

    def find(self, name: str) -> Served:
        """The model of that name.

        Raises:
            Refused: there is none.
        """
        if name not in self.served:
            known = ", ".join(self.served)
            raise Refused(404, f"got model {name[:100]!r}, expected one of {known}", "model_not_found")
        return self.served[name]

    def writer(self, name: str) -> Served:
        """The language model of that name.

        Raises:
            Refused: there is none.
        """
        served = self.find(name)
        if served.worker is None:
            raise _other(served, Worker.what)
        return served

    def batches(self, name: str, kind: type[B]) -> B:
        """What runs the model of that name, which is of a kind.

        Raises:
            Refused: there is none.
        """
        served = self.find(name)
        if not isinstance(served.batches, kind):
            raise _other(served, kind.what)
        return served.batches

    async def body(self, request: Request) -> bytes:
        """Read a request's body.

        Raises:
            Refused: it is longer than allowed.
        """
        parts, size, stream = [], 0, aiter(request.stream())
        said = request.headers.get("content-length", "")
        if said.isdecimal() and len(said) < 20:
            size = int(said) if int(said) > self.limits.body else 0
        try:
            async with asyncio.timeout(BODY):
                while size <= self.limits.body and (part := await anext(stream, None)) is not None:
                    parts.append(part)
                    size += len(part)
        except TimeoutError:
            raise Refused(408, f"got no whole body within {BODY} s, expected it sooner") from None
        if size > self.limits.body:
            raise Refused(413, f"got a body of more than {self.limits.body:,} bytes, expected a shorter one")
        whole = b"".join(parts)
        if self.prompts:
            request.state.noted = {**_noted(request), "body": whole.decode("utf-8", "replace")}
        return whole

    def admit(self, served: Served, count: int) -> None:
        """Let so many answers in, or refuse them all.

        Raises:
            Refused: too many wait already.
        """
        room = served.rows + self.limits.queue
        if self.answers + count > room:
            seconds = str(max(1, round(self.answers / served.rows)))
            raise Refused(
                429, f"got {count} more answers to make, expected at most {room} at once, try again in {seconds} s",
                "overloaded", {"Retry-After": seconds},
            )  # fmt: skip
        self.answers += count

    def leave(self, count: int) -> None:
        """Say that so many answers have ended, in whatever way."""
        self.answers -= count

    async def follow(self, served: Served, text: Text) -> AsyncGenerator[Step]:
        """Follow a text through its engine, and note how long its tokens take."""
        before, first = time.monotonic(), True
        assert served.worker is not None
        async with contextlib.aclosing(served.worker.follow(text)) as steps:
            async for step in steps:
                now = time.monotonic()
                (self.metrics.first if first else self.metrics.between).observe(now - before)
                before, first = now, False
                yield step

    async def unless_gone(self, request: Request, work: Awaitable[T]) -> T:
        """Wait for an answer, but no longer than allowed, nor than the client.

        Raises:
            Refused: neither waits any longer.
        """
        task, left = asyncio.ensure_future(work), asyncio.create_task(gone(request.receive))
        try:
            await asyncio.wait({task, left}, timeout=self.limits.seconds, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            if left.done():
                raise Refused(499, "the client has gone")
            raise Refused(503, f"the answer took longer than {self.limits.seconds:g} s")
        except Broken:
            raise Refused(503, "the model cannot be run any more") from None
        finally:
            for each in (task, left):
                each.cancel()
            await asyncio.gather(task, left, return_exceptions=True)

    def check_key(self, request: Request) -> None:
        """Refuse a request without one of the keys, where there are any.

        Raises:
            Refused: it has none of them.
        """
        if not self.limits.keys:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        given = key.strip().encode() if scheme.lower() == "bearer" else b""
        if not any([hmac.compare_digest(given, known.encode()) for known in self.limits.keys]):
            raise Refused(401, "got no valid API key, expected one as Authorization: Bearer KEY", "invalid_api_key")

    def note(self, request: Request, usage: Mapping[str, Any]) -> None:
        """Add counts of tokens to what the log says of a request."""
        counts = {name: usage[name] for name in ("prompt_tokens", "completion_tokens")}
        request.state.noted = {**_noted(request), **counts}

    def log(self, request: Request, status: int, seconds: float) -> None:
        """Write a line of JSON about a request; prompts are in none unless asked for."""
        path = request.scope.get("path", "")[:200]
        line = {"time": round(time.time(), 3), "event": "request", "id": secrets.token_hex(4), "method": request.method}
        line |= {"path": path, "status": status, "seconds": round(seconds, 4), **_noted(request)}
        print(json.dumps(line), file=sys.stderr, flush=True)

    async def drained(self, seconds: float) -> bool:
        """Take no new requests, and wait until those inside are answered; False if some are not by then."""
        self.draining = True
        end = time.monotonic() + seconds
        while self.inside and time.monotonic() < end:
            await asyncio.sleep(0.02)
        return not self.inside


def _other(served: Served, wanted: str) -> Refused:
    """The refusal of a request for a model of another kind."""
    name, runs = served.opened.name, served.worker or served.batches
    assert runs is not None
    return Refused(400, f"got model {name}, {runs.what}, expected {wanted}, try {runs.path.format(name=name)}")


def _noted(request: Request) -> dict[str, Any]:
    return getattr(request.state, "noted", {})


async def gone(receive: Receive) -> None:
    """Return when the client has hung up."""
    while (await receive())["type"] != "http.disconnect":
        pass
