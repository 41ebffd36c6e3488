"""Which rank failed first, and how, from how all of them ended."""

from __future__ import annotations

import pytest

from jaxmodels.launch.seen import Seen
from jaxmodels.launch.watch import first_failure

GLOO = "ValueError: UNKNOWN: Gloo all-reduce failed: pair.cc:538 Connection reset by peer"
COORDINATOR = ["The following tasks are unhealthy (stopped sending heartbeats):", "1", "The tasks have crashed."]


def ranks(*ends: tuple[int | None, float], tails: tuple[list[str], ...] = ()) -> list[Seen]:
    """Ranks that ended with a code so many seconds ago."""
    seen = [Seen(index, "host", "cpu", code, ago) for index, (code, ago) in enumerate(ends)]
    for one, tail in zip(seen, tails, strict=False):
        one.tail = tail
    return seen


@pytest.mark.parametrize(
    ("ends", "tails", "rank", "kind", "said"),
    [
        # A peer's broken connection is no cause, even when it was noticed first.
        ([(1, 2.0), (-9, 1.0)], ([GLOO], []), 1, "killed", "killed by SIGKILL"),
        ([(1, 2.0), (1, 1.0)], ([GLOO], ["OSError: full"]), 1, "raised", "exit code 1: OSError: full"),
        ([(2, 2.0), (-6, 1.9)], ([], COORDINATOR), 0, "died", "exit code 2"),
        # Where /proc does not tell who is frozen, JAX's coordinator does.
        ([(-6, 2.0), (None, 0.0)], (COORDINATOR, []), 1, "link", "silent"),
        ([(1, 2.0), (None, 0.0)], ([GLOO], []), 0, "raised", "exit code 1"),
        ([(-11, 2.0), (-6, 1.0)], ([], COORDINATOR), 0, "died", "died of SIGSEGV"),
        ([(1, 2.0), (1, 1.0)], (["RESOURCE_EXHAUSTED: Out of memory allocating"], [GLOO]), 0, "memory", "exit code 1"),
        ([(-15, 2.0), (1, 1.0)], ([], [GLOO]), 0, "killed", "killed by SIGTERM before it could save"),
        ([(-35, 2.0), (1, 1.0)], ([], [GLOO]), 0, "killed", "killed by"),
        ([(7, 2.0), (1, 1.0)], ([], [GLOO]), 0, "died", "exit code 7"),
    ],
)
def test_the_first_cause_is_told_from_its_consequences(
    ends: list[tuple[int | None, float]], tails: tuple[list[str], ...], rank: int, kind: str, said: str
) -> None:
    found = first_failure(ranks(*ends, tails=tails), {})
    assert found is not None and found.rank is not None
    assert (found.rank.rank, found.kind, found.why[: len(said)]) == (rank, kind, said)


@pytest.mark.parametrize("ends", [[(0, 1.0), (0, 2.0)], [(75, 1.0), (0, 2.0)], [(75, 1.0), (75, 2.0)]])
def test_ranks_that_are_done_or_saved_have_not_failed(ends: list[tuple[int, float]]) -> None:
    assert first_failure(ranks(*ends), {}) is None


def test_one_that_runs_too_long_is_the_failure() -> None:
    found = first_failure(ranks((75, 1.0), (None, 0.0)), {}, late="too late")
    assert found is not None and found.rank is not None
    assert (found.rank.rank, found.why[:8]) == (1, "too late")


def test_what_a_rank_says_of_its_end_counts_and_so_does_the_kernel() -> None:
    seen = ranks((1, 2.0), (-9, 1.0), tails=([GLOO], []))
    seen[1].memory_killed = True
    found = first_failure(seen, {})
    assert found is not None and found.kind == "memory" and "out of memory" in found.why
    seen = ranks((1, 2.0), (1, 1.0))
    seen[0].error = {"kind": "NotFinite", "message": "got loss nan at step 7"}
    found = first_failure(seen, {})
    assert found is not None and (found.kind, found.why) == ("not-finite", "exit code 1: got loss nan at step 7")


def test_the_message_says_where_it_was_and_its_last_lines() -> None:
    seen = ranks((-9, 1.0), (1, 0.5), tails=(["step 6", "step 7"], [GLOO]))
    seen[0].phase, seen[0].step = "save", 7
    found = first_failure(seen, {})
    assert found is not None
    assert found.message(3.2).startswith(
        "rank 0 failed first, 3.2 s after the start in save after step 7, on host (cpu):"
    )
    assert found.message(3.2).endswith("its last lines:\n    step 6\n    step 7")
