"""The loop's order, with small fakes: a "state" is the number of steps it has seen."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxmodels.config import Checkpoint, Config, Eval, Metrics, Profile, Train
from jaxmodels.errors import UserError
from jaxmodels.models.mlp import MLPConfig
from jaxmodels.train import loop
from jaxmodels.train.display import Display
from jaxmodels.train.loggers import Report
from jaxmodels.train.loop import Hooks, NotFinite, Progress, Result, Start, record_evaluation
from jaxmodels.train.metrics import Clock, Record


class Value:
    """A metric that is on the device until somebody asks for it."""

    def __init__(self, world: World, step: int, value: float):
        self.world, self.step, self.value = world, step, value

    def __float__(self) -> float:
        self.world.events.append(f"read {self.step}")
        return self.value


class World:
    """What the loop touches, noting in which order; a checkpoint outlives a loop."""

    def __init__(self, run: Path, cfg: Config):
        self.run, self.cfg = run, cfg
        self.events: list[str] = []
        self.saved: dict[int, tuple[int, Progress, bool]] = {}
        self.losses: dict[int, float] = {}
        self.evals: dict[int, float] = {}
        self.empty: set[int] = set()
        self.damaged: set[int] = set()
        self.stop_after: int | None = None
        self.stop_in_evaluation: int | None = None

    def batches(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        for step in range(start, stop):
            self.events.append(f"batch {step}")
            yield {"step": step}

    def step(self, state: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
        assert batch["step"] == state
        self.events.append(f"dispatch {state + 1}")
        metrics = {"loss": Value(self, state + 1, self.losses.get(state + 1, 1 / (state + 1)))}
        if state + 1 in self.empty:
            metrics = {"loss": Value(self, state + 1, float("nan")), "weight": Value(self, state + 1, 0.0)}
        return state + 1, metrics

    def evaluate(self, state: Any) -> dict[str, float] | None:
        if self.stop_in_evaluation == state:
            self.events.append(f"evaluation of {state} interrupted")
            return None
        self.events.append(f"evaluate {state}")
        return {"loss": self.evals.get(state, 1 / state)}

    def save(self, now: int, state: Any, progress: Progress, best: bool) -> None:
        assert state == now
        self.events.append(f"save {now}" + (" best" if best else ""))
        self.saved[now] = (state, dataclasses.replace(progress), best)

    def stop(self, now: int) -> bool:
        return self.stop_after is not None and now >= self.stop_after

    def train(self) -> Result:
        """The loop, from the newest good checkpoint if there is one."""
        self.events.clear()
        start = max(self.saved.keys() - self.damaged, default=0)
        state, progress, _ = self.saved.get(start, (0, Progress(), False))
        report = Report(Record(self.run, start), Display("none", self.cfg.train.steps, "tokens"))
        hooks = Hooks(
            step=self.step,
            batches=self.batches,
            evaluate=self.evaluate,
            save=self.save,
            stop=self.stop,
            examples=lambda step: np.arange(step, step + 20),
            last_good=lambda step: max((s for s in self.saved if s < step), default=None),
            learning_rate=lambda step: 0.1,
            report=report,
            clock=Clock(8, "tokens", None, None),
            traces=self.run / "profile",
        )
        try:
            return loop.run(self.cfg, Start(state, start, dataclasses.replace(progress)), hooks)
        finally:
            report.close()

    def rows(self) -> list[dict[str, float]]:
        return [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]


Make = Callable[..., World]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    monkeypatch.setattr(jax, "device_get", lambda values: values)

    def build(
        steps: int = 6,
        eval_: Eval | None = None,
        checkpoint: Checkpoint | None = None,
        every: int = 1,
        profile: str = "",
    ) -> World:
        return World(
            tmp_path,
            Config(
                model=MLPConfig(),
                train=Train(steps=steps),
                eval=eval_ or Eval(every=3),
                checkpoint=checkpoint or Checkpoint(every=2),
                profile=Profile(steps=profile),
                metrics=Metrics(every=every, loggers=()),
            ),
        )

    return build


def test_the_order_is_evaluate_save_batch_dispatch_read_the_step_before(make: Make) -> None:
    world = make(steps=4, eval_=Eval(every=2))
    result = world.train()
    assert world.events == [
        "batch 0",
        "dispatch 1",
        "batch 1",
        "dispatch 2",
        "read 1",
        "read 2",
        "evaluate 2",
        "save 2",
        "batch 2",
        "dispatch 3",
        "batch 3",
        "dispatch 4",
        "read 3",
        "read 4",
        "evaluate 4",
        "save 4",
    ]
    assert (result.step, result.ended, result.metrics) == (4, "done", {"eval/loss": 0.25})


def test_each_step_has_one_line_and_an_evaluation_shares_it(make: Make) -> None:
    world = make(steps=7, every=2)
    world.train()
    assert [(row["step"], "train/loss" in row, "eval/loss" in row) for row in world.rows()] == [
        (2, True, False),
        (3, False, True),
        (4, True, False),
        (6, True, True),
        (7, True, True),
    ]


def test_a_checkpoint_never_lacks_the_line_of_its_step(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    world, save = make(), World.save

    def check(self: World, now: int, *rest: Any) -> None:
        assert self.rows()[-1]["step"] == now
        save(self, now, *rest)

    monkeypatch.setattr(World, "save", check)
    world.train()
    assert sorted(world.saved) == [2, 4, 6]


@pytest.mark.parametrize("at", range(1, 7))
def test_a_run_stopped_after_any_step_goes_on_as_if_it_had_not(make: Make, at: int) -> None:
    whole = make()
    whole.train()
    expected = [{k: v for k, v in row.items() if "perf" not in k} for row in whole.rows()]
    world = make()
    world.stop_after = at
    (world.run / "metrics.jsonl").unlink()
    stopped = world.train()
    assert (stopped.ended, stopped.step) == ("preempted", at) and max(world.saved) == at
    world.stop_after = None
    went_on = world.train()
    assert (went_on.ended, went_on.state) == ("done", 6)
    assert world.events.count("evaluate 3") == (1 if at <= 3 else 0)
    assert [{k: v for k, v in row.items() if "perf" not in k} for row in world.rows()] == expected
    assert world.saved[6] == whole.saved[6]


@pytest.mark.parametrize("at", [3, 6])
def test_an_evaluation_cut_short_is_made_after_the_restart(make: Make, at: int) -> None:
    world = make(checkpoint=Checkpoint(every=0, best=True))
    world.stop_in_evaluation = at
    result = world.train()
    assert (result.ended, result.step) == ("preempted", at)
    assert world.events[-2:] == [f"evaluation of {at} interrupted", f"save {at}"]
    assert "eval/loss" not in world.rows()[-1]
    world.stop_in_evaluation = None
    result = world.train()
    assert world.events[:2] == [f"evaluate {at}", f"save {at} best"]
    assert [row["step"] for row in world.rows()] == list(range(1, 7))
    assert [row["step"] for row in world.rows() if {"train/loss", "eval/loss"} <= row.keys()] == [3, 6]
    assert result.ended == "done" and world.saved[6][1] == Progress(1 / 6, 6, 0, 6)
    world.train()
    assert world.events == []  # the evaluation that was made up for is remembered


def test_a_kill_between_the_evaluation_and_its_line_keeps_the_line_of_the_step(make: Make) -> None:
    world = make(checkpoint=Checkpoint(every=0))
    world.stop_after = 3
    world.train()
    before = world.rows()
    record = Record(world.run, 3)
    record.scalars(3, {"eval/loss": 0.5})
    assert world.rows() == before  # killed here, nothing is missing
    record.scalars(4, {"train/loss": 0.25})
    assert world.rows() == [*before[:2], {**before[2], "eval/loss": 0.5}]
    record.close()


def test_patience_ends_the_run_and_a_restart_does_not_go_on(make: Make) -> None:
    world = make(20, Eval(every=2, early_stop=2), Checkpoint(every=0, best=True))
    world.evals = {2: 1.0, 4: 0.5, 6: 0.6, 8: 0.5, 10: 0.1}
    result = world.train()
    assert (result.ended, result.step) == ("early", 8)
    assert {step: best for step, (_, _, best) in world.saved.items()} == {2: True, 4: True, 8: False}
    assert result.progress == Progress(0.5, 4, 2, 8)
    again = world.train()
    assert (again.ended, again.step, world.events) == ("early", 8, [])


def test_an_evaluation_that_is_not_finite_is_never_the_best(make: Make) -> None:
    world = make(6, Eval(every=2), Checkpoint(every=0, best=True))
    world.evals = {2: float("nan"), 4: 0.7, 6: 0.9}
    assert world.train().progress == Progress(0.7, 4, 1, 6)


def test_a_metric_that_an_evaluation_lacks_is_not_better_and_one_beside_a_loss_of_nan_neither(make: Make) -> None:
    cfg = make(6, Eval(every=2, metric="eval/f1", mode="max")).cfg
    progress = Progress()
    judged = [
        record_evaluation(cfg, progress, step, values)
        for step, values in enumerate(
            [
                {"eval/loss": 1.0},
                {"eval/loss": 1.0, "eval/f1": 0.5},
                {"eval/loss": float("nan"), "eval/f1": 1.0},
                {"eval/loss": 1.0, "eval/f1": 0.4},
            ]
        )
    ]
    assert judged == [False, True, False, False] and progress == Progress(0.5, 1, 2, 3)


def test_a_step_with_nothing_to_train_on_is_said_and_has_no_loss(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    world = make(5, Eval())
    world.empty = {2, 3}
    world.train()
    rows = {row["step"]: row for row in world.rows()}
    assert [step for step, row in rows.items() if "train/loss" in row] == [1, 4, 5]
    assert not any("weight" in name for row in rows.values() for name in row)
    assert [record.getMessage() for record in caplog.records if "nothing to train on" in record.getMessage()] == [
        "nothing to train on in the batch of step 2: its loss is left out, its gradient is 0"
    ]


@pytest.mark.parametrize(("steps", "last"), [(4, 4), (500, 100)])
def test_a_run_with_nothing_to_train_on_ends_with_an_error(make: Make, steps: int, last: int) -> None:
    world = make(steps, Eval())
    world.empty = set(range(1, steps + 1))
    with pytest.raises(UserError, match=f"got nothing to train on in {last} consecutive batches, expected an ex"):
        world.train()


@pytest.mark.parametrize("bad", [3, 4, 6])
def test_a_loss_that_is_not_finite_stops_before_it_is_saved(make: Make, bad: int) -> None:
    world = make(eval_=Eval())
    world.losses[bad] = float("nan")
    good = {3: 2, 4: 2, 6: 4}[bad]
    ids = f"{bad - 1}, .*, {bad + 14}, …"
    with pytest.raises(NotFinite, match=rf"got loss nan at step {bad}, on examples {ids}; .*checkpoint: step {good};"):
        world.train()
    assert max(world.saved) == good
    assert [row["step"] for row in world.rows()] == list(range(1, bad))


def test_the_metric_that_is_not_finite_is_the_one_that_is_named(make: Make) -> None:
    world, step = make(eval_=Eval()), World.step

    def steps(state: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
        state, metrics = step(world, state, batch)
        return state, {"accuracy": Value(world, state, 0.5), "grad_norm": Value(world, state, float("inf")), **metrics}

    world.step = steps  # type: ignore[method-assign]
    with pytest.raises(NotFinite, match=r"got grad_norm inf at step 1, on examples .* try a lower --optim.peak-lr or"):
        world.train()
    world.losses[1] = float("nan")
    with pytest.raises(NotFinite, match="got loss nan at step 1, on examples"):
        world.train()


@pytest.mark.parametrize("every", [0, 2])
def test_what_was_trained_is_saved_when_an_evaluation_fails(make: Make, every: int) -> None:
    world, good = make(steps=5, eval_=Eval(every=every), checkpoint=Checkpoint(every=0)), World.evaluate

    def fails(state: Any) -> dict[str, float]:
        raise KeyError("no such metric")

    world.evaluate = fails  # type: ignore[method-assign]
    with pytest.raises(KeyError, match="no such metric"):
        world.train()
    assert list(world.saved) == [every or 5]
    world.evaluate = lambda state: good(world, state)  # type: ignore[method-assign]
    result = world.train()
    assert world.events[0] == f"evaluate {every or 5}" and (result.ended, result.step) == ("done", 5)
    assert "eval/loss" in result.metrics


def test_nothing_is_saved_when_an_evaluation_fails_before_anything_was_trained(make: Make) -> None:
    world = make(steps=2, eval_=Eval(every=1), checkpoint=Checkpoint(every=0))
    world.empty, world.evaluate = {1}, lambda state: 1 / 0  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        world.train()
    assert not world.saved


def test_a_damaged_checkpoint_that_was_gone_back_behind_is_not_called_good(make: Make) -> None:
    world = make()
    world.stop_after = 5
    world.train()
    world.damaged, world.losses[4] = {4, 5}, float("nan")
    with pytest.raises(NotFinite, match=r"at step 4, .* last good checkpoint: step 2;"):
        world.train()


def test_a_finished_run_does_nothing(make: Make) -> None:
    world = make()
    world.train()
    before = (world.run / "metrics.jsonl").read_bytes()
    result = world.train()
    assert (result.ended, result.step, world.events) == ("done", 6, [])
    assert (world.run / "metrics.jsonl").read_bytes() == before


def test_the_thread_that_makes_batches_is_ended_whatever_happens(make: Make) -> None:
    world, closed = make(), []

    def batches(start: int, stop: int) -> Iterator[dict[str, Any]]:
        try:
            yield from (World.batches(world, start, stop))
        finally:
            closed.append(True)

    world.batches = batches  # type: ignore[method-assign]
    world.losses[2] = float("inf")
    with pytest.raises(NotFinite) as caught:  # kept, and with it every frame: nothing is closed by chance
        world.train()
    assert closed == [True] and "step 2" in str(caught.value)


def test_a_profile_covers_its_steps_and_not_a_part_of_them(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make(profile="2:4", checkpoint=Checkpoint(every=3))
    monkeypatch.setattr(jax.profiler, "start_trace", lambda path: world.events.append("start trace"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: world.events.append("stop trace"))
    world.train()
    first, last = world.events.index("start trace"), world.events.index("stop trace")
    assert [event for event in world.events[first:last] if "dispatch" in event] == ["dispatch 3", "dispatch 4"]
    assert world.events[last - 1] == "read 4" and "read 2" in world.events[:first]
    del world.saved[6]
    world.train()  # from step 3, in the middle
    assert "start trace" not in world.events and "stop trace" not in world.events
    world.saved.clear()
    world.stop_after = 3
    world.train()
    assert world.events[-1] == "stop trace"


@pytest.mark.parametrize("text", ["5", "5:4", "0:7", "a:b"])
def test_a_profile_beyond_the_run_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="expected FIRST:LAST within 6 steps"):
        loop.profile_steps(text, 6)
