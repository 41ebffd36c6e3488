"""`benchmarks.faults` without a cluster: what it draws, how a rank obeys, and what the forecast is held to."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from benchmarks import faults, hosts, injury
from benchmarks.faults import Options, Trial, account, by_kind, draw, judge
from benchmarks.injured import EVERY
from benchmarks.strikes import KINDS
from jaxmodels.errors import UserError
from jaxmodels.train import phases


def test_every_round_has_each_kind_once_and_the_seed_decides_their_order() -> None:
    kinds = list(draw(Options(faults=2 * len(KINDS) + 3)))
    rounds = [kinds[: len(KINDS)], kinds[len(KINDS) : 2 * len(KINDS)]]
    assert [sorted(one) for one in rounds] == [sorted(KINDS)] * 2 and rounds[0] != rounds[1]
    assert len(kinds) == 2 * len(KINDS) + 3 and kinds != list(draw(Options(faults=len(kinds), seed=1)))


def test_a_kind_that_is_none_is_refused() -> None:
    with pytest.raises(UserError, match="got kind of fault 'kiled'.*killed"):
        faults.run(Options(kinds=("kiled",)))


def test_a_rank_obeys_an_order_once(tmp_path: Path) -> None:
    for kind, error in (("raised", KeyError), ("memory", MemoryError)):
        order = tmp_path / "order.0"
        order.write_text(kind)
        with pytest.raises(error):
            injury.obey(order)
        assert not order.exists()


def test_a_spoiled_step_has_a_loss_that_is_no_number_and_a_starved_one_waits(tmp_path: Path, monkeypatch) -> None:
    from jaxmodels.train.state import State

    monkeypatch.setattr(injury, "SLOWER", 0.0)
    state = State(jax.numpy.int32(0), {"a": jax.numpy.ones(3)}, {}, {}, None, jax.random.key(0))

    class Loader:
        def local(self, step):
            return step + 1

        def iterate(self, start, stop):
            return []

    loader = Loader()

    class Hooks:
        batches = loader.iterate

        def step(self, state, batch):
            return state.params["a"].sum()

    def run(hooks: Hooks) -> float:
        injury.spoil()
        injury.starve(tmp_path / "order.0")
        return float(hooks.step(state, None))

    loss = run(Hooks())
    assert loss != loss and loader.local(1) == 2 and "slowly" in repr(loader.local)


@pytest.mark.skipif(bool(hosts.missing()), reason=hosts.missing() or "none")
def test_a_cut_link_swallows_what_is_sent_and_a_mended_one_passes_it(tmp_path: Path) -> None:
    ask = "import socket; socket.create_connection(('h1', 9), timeout=0.5)"

    def says() -> str:
        asked = [*two.inside(1), sys.executable, "-SEc", ask]
        return subprocess.run(asked, capture_output=True, text=True).stderr.split("\n")[-2].split(":")[0]

    before = socket.gethostname()
    with hosts.two(tmp_path) as two:
        assert says() == "ConnectionRefusedError"
        two.cut()
        assert says() == "TimeoutError"
        two.mend()
        assert says() == "ConnectionRefusedError"
        assert subprocess.run([*two.inside(1), "hostname"], capture_output=True, text=True).stdout == "h2\n"
    assert socket.gethostname() == before


def fault(kind: str, **fields) -> dict:
    row = dict.fromkeys(("lost", "back", "down"))
    row |= {"fault": kind, "rank": 0, "named": kind, "of": 0, "seconds": 0.5, "lasted": 1.0, "began": 0.0}
    row |= {"other_warnings": 0, "left": 0, "right": True}
    return row | fields


def test_the_record_counts_each_kind_and_what_was_wrong() -> None:
    rows = [fault("killed", lost=12, back=9.0), fault("killed", named="died", right=False), fault("slow")]
    shown = {row["fault"]: row for row in by_kind(rows)}
    assert (shown["killed"]["count"], shown["killed"]["right"]) == (2, 1)
    assert shown["killed"]["wrong"] == "1 died of rank 0" and shown["slow"]["wrong"] is None
    notes = judge([Trial(rows, saved=90, same=True), Trial(saved=60, same=False)], Options(faults=5))
    assert notes[:2] == [
        "it ended after 3 of 5 faults",
        "2 of 3 faults were named rightly, by kind and rank, within 30 s",
    ]
    assert "after 90 steps the bits, after 60 steps NOT the bits" in notes[2]


def test_a_run_as_the_forecast_says_has_no_gap(tmp_path: Path) -> None:
    """Attempts of 10 s a step, a save of 30 s at once, and failures 100 s after the last save each."""
    step, blocked, restart, attempts = 10.0, 30.0, 500.0, 40
    rows, failures, now, first = [], [], 1e6, 0
    for attempt in range(attempts):
        began, seconds = now, dict.fromkeys(phases.PHASES, 0.0)
        line = {"began": began, "host": "h1", "first": first, "config": "c", "devices": 2, "mesh": "", "saved": first}
        for save in range(1, 4):
            now += EVERY * step
            seconds["step"] += EVERY * step
            rows.append({**line, "time": now, "step": first + save * EVERY, "open": 0.0, "seconds": dict(seconds)})
            now += blocked
            seconds["save"] += blocked
        last = attempt == attempts - 1
        lost = 0.0 if last else 150.0
        now += lost
        seconds["step"] += lost
        end = {"time": now, "step": first + 3 * EVERY + int(lost / step), "open": 0.0, "seconds": dict(seconds)}
        rows.append({**line, **end, **({"ended": "preempted"} if last else {})})
        first += 3 * EVERY
        if not last:
            failures.append(fault("killed", back=restart, down=restart, began=now))
            now += restart
    (tmp_path / "phases.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "checkpoints" / str(first)).mkdir(parents=True)
    saved = [{"step": EVERY * (i + 1), "time": 0.0} for i in range(3 * attempts)]
    job = SimpleNamespace(run=tmp_path, events=lambda *names: saved)
    notes = account(job, failures)  # type: ignore[arg-type]
    (found,) = [note for note in notes if note.startswith("forecast against that")]
    gap = float(found.split()[3].rstrip("%"))
    assert abs(gap) < 3, notes
