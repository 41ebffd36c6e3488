"""Requests for a model's outputs, put together into batches of few shapes, which are compiled ahead of time."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import numpy as np

from jaxmodels.serve.classes import Classes, Row
from jaxmodels.serve.errors import Broken

if TYPE_CHECKING:  # it draws pictures too, with what takes a second to import
    from jaxmodels.serve.watch import Watch

log = logging.getLogger("jaxmodels")

SIZES = (1, 8, 32, 128)
"""Numbers of rows that are compiled; a batch with fewer is padded."""
Shapes = tuple[tuple[int, ...], ...]


class Waiting(NamedTuple):
    """Rows of one request, and where their outputs go."""

    rows: Sequence[Row]
    loop: asyncio.AbstractEventLoop
    found: asyncio.Future[np.ndarray]


class Batches:
    """Runs a function in a thread of its own: what has arrived while a batch was computed makes the next one."""

    what: ClassVar[str]
    """What it serves, in words."""
    path: ClassVar[str]
    """Where requests for it go."""

    def __init__(
        self, function: Callable[[Any, Any], jax.Array], params: Any, examples: Sequence[Row], sizes: Sequence[int]
    ) -> None:
        """`function` takes parameters and a batch to an array with a row for each of it; `examples` have the shapes
        that rows may have."""
        self.sizes = sorted(sizes)
        self.error: Exception | None = None
        self.rows = 0
        """Rows that were computed, without padding."""
        self.calls = 0
        self._function, self._params, self._examples = function, params, examples
        self._compiled: dict[tuple[int, Shapes], Any] = {}
        self._orders: queue.SimpleQueue[Waiting | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="batches", daemon=True)

    @property
    def waiting(self) -> int:
        return self._orders.qsize()

    def prepare(self, say: Callable[[str], None]) -> None:
        """Compile for all shapes and sizes; `say` is called with each before."""
        for example in self._examples:
            for size in self.sizes:
                shapes = _shapes(example)
                say(f"batches of {size}, {' and '.join(map(str, shapes))} each")
                batch = {name: np.stack([x] * size) for name, x in example.items()}
                self._compiled[size, shapes] = jax.jit(self._function).lower(self._params, batch).compile()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its batch."""
        self._orders.put(None)
        self._thread.join(timeout=60)

    async def compute(self, rows: Sequence[Row]) -> np.ndarray:
        """The outputs of rows, (B, …).

        Raises:
            Broken: the model cannot be run.
        """
        loop = asyncio.get_running_loop()
        asked = Waiting(rows, loop, loop.create_future())
        self._orders.put(asked)
        return await asked.found

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
            rows = [row for each in asked for row in each.rows]
            try:
                found: Any = self._computed(rows)
            except Exception as error:  # whatever it is, nobody may wait for an answer that does not come
                log.exception("a batch has failed")
                self.error, found = error, None
            at = 0
            for each in asked:
                told = None if found is None else np.stack(found[at : at + len(each.rows)])
                at += len(each.rows)
                _tell(each, told)
            if found:
                self.note(rows, np.stack(found))

    def note(self, rows: Sequence[Row], found: np.ndarray) -> None:
        """Take note of rows and their outputs, after they have been answered."""

    def _computed(self, rows: Sequence[Row]) -> list[np.ndarray]:
        """The outputs of rows, in their order; those of one shape make batches."""
        found: list[Any] = [None] * len(rows)
        alike: dict[Shapes, list[int]] = defaultdict(list)
        for i, row in enumerate(rows):
            alike[_shapes(row)].append(i)
        for shapes, numbers in alike.items():
            for first in range(0, len(numbers), self.sizes[-1]):
                part = numbers[first : first + self.sizes[-1]]
                size = next(size for size in self.sizes if size >= len(part))
                padded = [rows[i] for i in (*part, *[part[0]] * (size - len(part)))]
                batch = {name: np.stack([row[name] for row in padded]) for name in padded[0]}
                for i, out in zip(part, np.asarray(self._compiled[size, shapes](self._params, batch)), strict=False):
                    found[i] = out
                self.rows, self.calls = self.rows + len(part), self.calls + 1
        return found


class Classifier(Batches):
    """A classifier, whose outputs are the probabilities of classes, (B, classes)."""

    what, path = "a classifier", "/v2/models/{name}/infer"

    def __init__(self, classes: Classes, sizes: Sequence[int] = SIZES, watch: Watch | None = None) -> None:
        self.classes, self.watch = classes, watch
        dtype = np.uint8 if classes.kind == "image" else np.float32
        example = classes.read("a") if classes.kind == "text" else {"inputs": np.zeros(classes.shape, dtype)}
        super().__init__(classes.shares, classes.params, [example], sizes)

    def start(self) -> None:
        if self.watch is not None:
            self.watch.start()
        super().start()

    def stop(self) -> None:
        super().stop()
        if self.watch is not None:
            self.watch.stop()

    def note(self, rows: Sequence[Row], found: np.ndarray) -> None:
        if self.watch is not None:
            self.watch.see(rows, found)


def _shapes(row: Row) -> Shapes:
    return tuple(x.shape for x in row.values())


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
