"""`jaxmodels doctor` as one of several ranks, of which some are made sick: SICK is slow:1,wrong:2,short:3."""

from __future__ import annotations

import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodels import cli
from jaxmodels.launch import checks, collectives

multiply, memory, contribution = checks.multiply, checks.memory, collectives.contribution


def slow(a: Any, b: Any) -> Any:
    time.sleep(0.2)
    return multiply(a, b)


def wrong(a: Any, b: Any) -> Any:
    """One bit of one number."""
    out = np.array(multiply(a, b))
    out.view(np.uint32)[100, 3] ^= 1 << 22
    import jax

    return jax.device_put(out)


def wrong_to_others(place: int, count: int) -> np.ndarray:
    """What is sent has a wrong bit; what is expected, which the same function says, has not."""
    out = contribution(place, count)
    if sys._getframe(1).f_code.co_name == "piece":
        out.view(np.uint32)[7] ^= 1 << 22
    return out


def short(device: Any) -> Any:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    try:
        return memory(device)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def main() -> None:
    me = os.environ.get("JAXMODELS_PROCESS_ID", "0")
    for sickness, rank in (each.split(":") for each in os.environ.get("SICK", "").split(",") if each):
        if rank != me:
            continue
        if sickness == "slow":
            checks.multiply = slow
        elif sickness == "wrong":
            checks.multiply, collectives.contribution = wrong, wrong_to_others
        else:
            checks.memory = short
    sys.exit(cli.main(["doctor", *sys.argv[1:]]))


if __name__ == "__main__":
    main()
