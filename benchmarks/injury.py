"""What a rank does to itself between two steps, as the file `order.RANK` in the folder JAXMODELS_FAULTS says."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

FOLDER, PACE = "JAXMODELS_FAULTS", "JAXMODELS_PACE"
"""Variables: the folder with the orders, and the seconds that each step is held back by."""
SLOWER = 0.4
"""Seconds by which a step, or a batch, takes longer."""


def begin() -> None:
    """Have this process, where it is a rank, look for an order at the end of each step."""
    if FOLDER not in os.environ or "JAXMODELS_PROCESS_ID" not in os.environ:
        return
    from jaxmodels.parallel import progress

    order = Path(os.environ[FOLDER]) / f"order.{os.environ['JAXMODELS_PROCESS_ID']}"
    pace, poll = float(os.environ.get(PACE, "0")), progress.poll

    def poll_and_obey() -> None:
        time.sleep(pace)
        if order.exists():
            obey(order)
        poll()

    progress.poll = poll_and_obey


def obey(order: Path) -> None:
    """Do what the order says; one that lasts does so as long as its file is there."""
    kind = order.read_text()
    if kind == "slow":
        time.sleep(SLOWER)
        return
    if kind == "starved":
        starve(order)
        return
    order.unlink()
    if kind == "raised":
        raise KeyError("a fault made on purpose")
    if kind == "memory":
        bytearray(2**60)
    if kind == "not-finite":
        spoil()
    if kind == "stuck":
        hang()


def hang() -> NoReturn:
    """Never come back, with this process alive."""
    while True:
        time.sleep(0.1)


def starve(order: Path) -> None:
    """Have each batch take longer to read."""
    loader = _of_the_loop("hooks").batches.__self__
    if "local" in vars(loader):
        return
    read = loader.local

    def slowly(step: int) -> Any:
        if order.exists():
            time.sleep(SLOWER)
        return read(step)

    loader.local = slowly


def spoil() -> None:
    """Let the next step begin with a parameter of this rank's devices that is no number."""
    import jax
    import numpy as np

    hooks = _of_the_loop("hooks")
    step = hooks.step

    def spoiled(state: Any, batch: Any) -> Any:
        leaves, tree = jax.tree.flatten(state.params)
        first = leaves[0]
        shards = [jax.device_put(np.asarray(one.data) * np.nan, one.device) for one in first.addressable_shards]
        leaves[0] = jax.make_array_from_single_device_arrays(first.shape, first.sharding, shards)
        return step(dataclasses.replace(state, params=jax.tree.unflatten(tree, leaves)), batch)

    object.__setattr__(hooks, "step", spoiled)


def _of_the_loop(name: str) -> Any:
    """A variable of the training loop, which has called what has called this."""
    frame = sys._getframe()
    while frame.f_code.co_name != "run" or name not in frame.f_locals:
        frame = frame.f_back
        assert frame is not None, "no training loop here"
    return frame.f_locals[name]
