"""The process: it opens models, compiles, listens, and at SIGTERM answers what it has taken before it ends."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from jaxmodels.errors import UserError
from jaxmodels.generate.engine import Engine
from jaxmodels.serve.app import build
from jaxmodels.serve.batches import Classifier
from jaxmodels.serve.embeddings import Embedder
from jaxmodels.serve.opened import Opened, Writer
from jaxmodels.serve.service import Served, Service
from jaxmodels.serve.worker import Worker

if TYPE_CHECKING:
    from jaxmodels.serve.watch import Watch

log = logging.getLogger("jaxmodels")


def make_served(opened: Opened, make: Callable[[Writer], Engine], watch: Watch | None = None) -> Served:
    """A model and what runs it, not yet compiled; `make` makes a language model's engine, `watch` is a classifier's."""
    if opened.writer is not None:
        return Served(opened, worker=Worker(make(opened.writer)))
    if opened.encoder is not None:
        return Served(opened, batches=Embedder(opened.encoder))
    assert opened.classes is not None
    return Served(opened, batches=Classifier(opened.classes, watch=watch))


def prepare(service: Service, say: Callable[[str], None]) -> None:
    """Compile all that will run, and start the threads."""
    for served in service.served.values():
        served.prepare(say)
    service.ready = True


class Stopped(Exception):
    """The server was stopped while it was compiling."""


class Server(uvicorn.Server):
    """Uvicorn, which at the first signal stops taking requests, answers those it has, and ends."""

    def __init__(self, service: Service, drain: float) -> None:
        super().__init__(
            uvicorn.Config(
                build(service),
                log_config=None,
                access_log=False,
                server_header=False,
                lifespan="off",
                timeout_graceful_shutdown=1,
            )
        )
        self.service, self._drain = service, drain
        self._tasks: set[asyncio.Task[None]] = set()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.service.draining:
            self.force_exit = self.should_exit = True  # a second signal waits for nobody
            return
        self.service.draining = True
        if self._loop is None:
            self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self._begin_to_leave)

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    _loop: asyncio.AbstractEventLoop | None = None

    def _begin_to_leave(self) -> None:
        self._tasks.add(asyncio.ensure_future(self._leave()))

    async def _leave(self) -> None:
        if self.service.inside:
            say(f"stopping: {self.service.inside} requests to answer")
        if not await self.service.drained(self._drain):
            say(f"stopping: {self.service.inside} requests were not answered in {self._drain:g} s")
        self.should_exit = True


def say(text: str) -> None:
    """Tell whoever watches the server."""
    print(text, file=sys.stderr, flush=True)


def bound(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to an address.

    Raises:
        UserError: it cannot be.
    """
    try:
        kind, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        made = socket.socket(kind)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as error:
        raise UserError(
            f"got --host {host} --port {port}, which cannot be listened at ({error.strerror}), expected an address of "
            "this machine and a free port, try --port 0 for any"
        ) from error
    return made


def serve(service: Service, listening: socket.socket, drain: float, ready: Callable[[], None] = lambda: None) -> None:
    """Listen at once, be ready once everything is compiled, and return after a signal.

    Raises:
        Exception: what went wrong while programs were compiled.
    """
    failed: list[BaseException] = []
    server = Server(service, drain)

    def compiling(name: str) -> None:
        log.info("compiling %s", name)
        if service.draining or server.should_exit:
            raise Stopped

    def compile_all() -> None:
        try:
            prepare(service, compiling)
            ready()
        except Stopped:
            pass
        except BaseException as error:  # which is raised where the command waits
            failed.append(error)
            server.should_exit = True

    preparing = threading.Thread(target=compile_all, name="prepare", daemon=True)
    preparing.start()
    asyncio.run(server.serve([listening]))
    preparing.join()
    if service.ready:
        for served in service.served.values():
            served.stop()
    if failed:
        raise failed[0]
