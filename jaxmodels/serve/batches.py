"""A classifier's requests, put together into batches of few sizes, which are compiled ahead of time."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxmodels.generate.classes import class_names, class_shares
from jaxmodels.generate.prepare import kind_of, reader
from jaxmodels.serve.errors import Broken
from jaxmodels.train.saved import Run

log = logging.getLogger("jaxmodels")

SIZES = (1, 8, 32, 128)
"""Numbers of rows that are compiled; a batch with fewer is padded."""
Row = dict[str, np.ndarray]


class Waiting(NamedTuple):
    """Rows of one request, and where their probabilities go."""

    rows: Sequence[Row]
    loop: asyncio.AbstractEventLoop
    found: asyncio.Future[np.ndarray]


class Batches:
    """Runs a classifier in a thread of its own: what has arrived while a batch was computed makes the next one."""

    def __init__(self, run: Run, sizes: Sequence[int] = SIZES) -> None:
        self.run, self.sizes = run, sorted(sizes)
        self.names, self.several = class_names(run), run.config.task.answers == "classes"
        self.kind, self.read = kind_of(run), reader(run)
        self.error: Exception | None = None
        self.rows = 0
        """Rows that were computed, without padding."""
        self.calls = 0
        self._compiled: dict[int, Any] = {}
        self._orders: queue.SimpleQueue[Waiting | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="batches", daemon=True)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one example; that of a text is ()."""
        return () if self.kind == "text" else tuple(self.run.model.inputs(1)[0].shape[1:])

    @property
    def waiting(self) -> int:
        return self._orders.qsize()

    def prepare(self, say: Callable[[str], None]) -> None:
        """Compile for all sizes; `say` is told each before."""
        example, shares = self._example(), class_shares(self.run)
        for size in self.sizes:
            say(f"batches of {size}")
            batch = {name: np.stack([x] * size) for name, x in example.items()}
            self._compiled[size] = jax.jit(shares).lower(self.run.params["model"], batch).compile()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its batch."""
        self._orders.put(None)
        self._thread.join(timeout=60)

    async def shares(self, rows: Sequence[Row]) -> np.ndarray:
        """The probabilities of rows, (B, classes).

        Raises:
            Broken: the model cannot be run.
        """
        loop = asyncio.get_running_loop()
        asked = Waiting(rows, loop, loop.create_future())
        self._orders.put(asked)
        return await asked.found

    def _example(self) -> Row:
        if self.kind == "text":
            return self.read("a")
        dtype = np.uint8 if self.kind == "image" else np.float32
        return {"inputs": np.zeros(self.shape, dtype)}

    def _work(self) -> None:
        while (first := self._orders.get()) is not None:
            asked = [first]
            while sum(len(each.rows) for each in asked) < self.sizes[-1]:
                try:
                    more = self._orders.get_nowait()
                except queue.Empty:
                    break
                if more is None:
                    self._orders.put(None)
                    break
                asked.append(more)
            asked = [each for each in asked if not each.found.cancelled()]
            try:
                found: Any = list(self._computed([row for each in asked for row in each.rows]))
            except Exception as error:  # whatever it is, nobody may wait for an answer that does not come
                log.exception("a batch has failed")
                self.error, found = error, None
            at = 0
            for each in asked:
                told = None if found is None else np.stack(found[at : at + len(each.rows)])
                at += len(each.rows)
                _tell(each, told)

    def _computed(self, rows: Sequence[Row]) -> Iterator[np.ndarray]:
        for first in range(0, len(rows), self.sizes[-1]):
            part = rows[first : first + self.sizes[-1]]
            size = next(size for size in self.sizes if size >= len(part))
            padded = [*part, *[part[0]] * (size - len(part))]
            batch = {name: np.stack([row[name] for row in padded]) for name in part[0]}
            yield from np.asarray(self._compiled[size](self.run.params["model"], batch))[: len(part)]
            self.rows, self.calls = self.rows + len(part), self.calls + 1


def _tell(asked: Waiting, found: np.ndarray | None) -> None:
    def tell() -> None:
        if asked.found.done():
            return
        if found is None:
            asked.found.set_exception(Broken("the model has failed"))
        else:
            asked.found.set_result(found)

    try:
        asked.loop.call_soon_threadsafe(tell)
    except RuntimeError:  # the loop has been closed: nobody listens there
        log.debug("nobody listens any more")
