from __future__ import annotations

import subprocess
import sys
import time
from typing import Any, cast

import pytest

from jaxmodels.launch.watch import Events, Rank, judge, watch

GLOO = "ValueError: UNKNOWN: Gloo all-reduce failed: pair.cc:538 Connection reset by peer"
COORDINATOR = ["The following tasks are unhealthy (stopped sending heartbeats):", "1", "The tasks have crashed."]


def ranks(*ends: tuple[int | None, float]) -> list[Rank]:
    """Ranks that ended with a code at a moment, by processes that are none."""
    gone = cast(Any, type("Process", (), {"pid": 2**30}))
    return [Rank(index, gone, code, ended) for index, (code, ended) in enumerate(ends)]


@pytest.mark.parametrize(
    ("ends", "tails", "code", "said"),
    [
        ([(0, 1.0), (0, 2.0)], [[], []], 0, ""),
        ([(75, 1.0), (75, 2.0)], [[], []], 75, "saved and stopped"),
        ([(75, 1.0), (0, 2.0)], [[], []], 75, "saved and stopped"),
        # A peer's broken connection is no cause, even when it was noticed first.
        ([(1, 1.0), (-9, 2.0)], [[GLOO], []], 1, "rank 1 failed first, 2.0 s after the start: killed by SIGKILL"),
        ([(1, 1.0), (1, 2.0)], [[GLOO], ["OSError: full"]], 1, "rank 1 failed first, 2.0 s after the start: exit"),
        ([(2, 1.0), (-6, 1.1)], [[], COORDINATOR], 2, "rank 0 ended with exit code 2"),
        # Where /proc does not tell who is frozen, JAX's coordinator does.
        ([(-6, 1.0), (None, 2.0)], [COORDINATOR, []], 1, "rank 1 failed first, 2.0 s after the start: silent"),
        ([(1, 1.0), (None, 2.0)], [[GLOO], []], 1, "rank 0 failed first, 1.0 s after the start: exit code 1"),
        ([(75, 1.0), (None, 2.0)], [[], []], 1, "rank 1 failed first, 2.0 s after the start: too late"),
    ],
)
def test_the_first_cause_is_told_from_its_consequences(
    ends: list[tuple[int | None, float]], tails: list[list[str]], code: int, said: str
) -> None:
    got, message = judge(ranks(*ends), tails, "too late", began=0.0)
    assert (got, message[: len(said)]) == (code, said)


def test_one_that_does_not_stop_in_time_is_reported() -> None:
    stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)"
    process = subprocess.Popen(
        [sys.executable, "-c", stubborn], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, start_new_session=True
    )
    rank = Rank(0, process)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        events: Events[Rank | int] = Events()
        events.put(15)
        began = time.monotonic()
        late = watch([rank], events, grace_seconds=0.3)
        assert late == "still running 0 s after it was told to stop"
        assert time.monotonic() - began < 5
        assert judge([rank], [[]], late, began)[0] == 1
    finally:
        rank.kill()
        process.communicate()
