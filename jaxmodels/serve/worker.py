"""The thread that runs an engine, and the way to it from the server's event loop."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import NamedTuple

from jaxmodels.generate.engine import Engine, Step, Text
from jaxmodels.serve.errors import Broken

log = logging.getLogger("jaxmodels")


class Owner(NamedTuple):
    """Where the steps of a text go."""

    loop: asyncio.AbstractEventLoop
    steps: asyncio.Queue[Step | Exception]


class Worker:
    """Runs an engine in a thread of its own, which alone touches it."""

    what, path = "a language model", "/v1/completions"

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.error: Exception | None = None
        self._orders: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._texts: set[Text] = set()

    def prepare(self, say: Callable[[str], None]) -> None:
        """Compile all that will run; `say` is told each program before."""
        self.engine.prepare(say)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its turn; texts under way are left."""
        self._orders.put(None)
        self._thread.join(timeout=60)

    @property
    def waiting(self) -> int:
        """Texts that wait for a row or for pages, those included that the engine has not been told of yet."""
        return len(self.engine.waiting) + self._orders.qsize()

    async def follow(self, text: Text) -> AsyncGenerator[Step]:
        """Have a text continued, and yield each step; whoever leaves early cancels it."""
        owner = text.owner = Owner(asyncio.get_running_loop(), asyncio.Queue())
        self._orders.put(lambda: self._take(text))
        try:
            while True:
                step = await owner.steps.get()
                if isinstance(step, Exception):
                    raise step
                yield step
                if step.finish:
                    return
        finally:
            if text.finish is None:
                self._orders.put(lambda: self._cancel(text))

    def _take(self, text: Text) -> None:
        try:
            self.engine.submit(text)
            self._texts.add(text)
        except Exception as error:
            self._send([text], error)

    def _cancel(self, text: Text) -> None:
        self.engine.cancel(text)
        self._texts.discard(text)

    def _run(self) -> None:
        while True:
            if not self._obey():
                return
            if self.error is not None:
                self._send(list(self._texts), Broken(str(self.error)))
                self._texts.clear()
                continue
            try:
                steps = self.engine.advance()
            except Exception as error:  # whatever it is, nobody may wait for an answer that does not come
                log.exception("the engine has failed")
                self.error = error
                self._send(list(self._texts), Broken(str(error)))
                self._texts.clear()
                continue
            self._deliver(steps)

    def _obey(self) -> bool:
        """Carry out the orders; wait for one where there is nothing else to do. False: to end."""
        wait = self.engine.idle or self.error is not None
        while True:
            try:
                order = self._orders.get(block=wait)
            except queue.Empty:
                return True
            if order is None:
                return False
            order()
            wait = False

    def _deliver(self, steps: Sequence[Step]) -> None:
        """Hand steps to their owners: one call into each loop for all of them."""
        loops: dict[asyncio.AbstractEventLoop, list[Step]] = defaultdict(list)
        for step in steps:
            if step.finish:
                self._texts.discard(step.text)
            loops[step.text.owner.loop].append(step)
        for loop, own in loops.items():
            _call(loop, lambda own=own: [step.text.owner.steps.put_nowait(step) for step in own])

    def _send(self, texts: Sequence[Text], error: Exception) -> None:
        for text in texts:
            _call(text.owner.loop, lambda text=text: text.owner.steps.put_nowait(error))


def _call(loop: asyncio.AbstractEventLoop, function: Callable[[], object]) -> None:
    try:
        loop.call_soon_threadsafe(function)
    except RuntimeError:  # the loop has been closed: nobody listens there
        log.debug("nobody listens any more")
