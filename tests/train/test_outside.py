"""What tasks, losses, schedules, optimizers and sources from outside give is checked before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmodels.config import Config, Metrics, OptimConfig, ScheduleConfig, Train
from jaxmodels.data import BatchField, RecordsConfig, examples
from jaxmodels.data.records import Field, Records
from jaxmodels.errors import UserError
from jaxmodels.models.mlp import MLPConfig
from jaxmodels.tasks.task import Aux, Loss, Task, TaskConfig, rows
from jaxmodels.train import run as runs

GIVEN: dict[str, Callable[..., Any]] = {}
"""What the classes below give instead of what they should."""
NAMES = ("low", "high")


def give(name: str, usual: Callable[..., Any], *args: Any) -> Any:
    return GIVEN.get(name, usual)(*args)


@dataclass(frozen=True)
class Offset(TaskConfig):
    """Tell a number."""

    answers: ClassVar = ""

    def build(self, model, data):
        def loss(params, stats, batch, rng=None, step=0):
            each = (model.apply(params["model"], batch["inputs"])[:, 0] - batch["labels"]) ** 2 * rows(batch)
            return give("loss", usual, each, stats)

        def usual(each, stats):
            pair = each.sum(), jnp.float32(len(each))
            return pair[0], Aux(pair[1], {"loss": pair}, stats)

        def metrics(params, stats, batch):
            counts, total = rows(batch), loss(params, stats, batch)[1].sums["loss"][0]
            return give("metrics", lambda total, counts: {"loss": (total, counts.sum())}, total, counts)

        fields = {"inputs": BatchField((3,), np.float32), "labels": BatchField((), below=2)}
        made = Task({"model": model}, (Loss("loss", "model", loss),), metrics, give("fields", lambda: fields))
        return give("build", lambda task: task, made)

    def examples(self, opening):
        return give("examples", lambda opening: examples.labeled(opening, ("array",)), opening)


@dataclass(frozen=True)
class Flat(ScheduleConfig):
    """The peak."""

    def share(self, step, first, last):
        return give("share", lambda step: 1, step)


@dataclass(frozen=True)
class Plain(OptimConfig):
    """The gradient."""

    schedule: ScheduleConfig = Flat()

    def rule(self, axes):
        return give("rule", optax.identity)


class Rows(Records):
    label, fingerprint = "sensors", "sensors 1"

    def __init__(self):
        self.fields = {
            "reading": Field("array", shape=(3,), dtype="float32"),
            "label": Field("label", give("names", lambda: NAMES)),
        }

    def __len__(self):
        return give("length", lambda: 8)

    def read(self, indices, fields):
        def usual(indices, fields):
            every = [{"reading": np.full(3, i, np.float32), "label": i % 2} for i in indices]
            return [{name: one[name] for name in fields} for one in every]

        return give("read", usual, indices, fields)


@dataclass(frozen=True)
class Sensors(RecordsConfig):
    """Readings of sensors."""

    def records(self, split):
        return give("records", lambda split: Rows(), split)


CONFIG = Config(
    model=MLPConfig(input_shape=(3,), classes=2, hidden=()),
    task=Offset(),
    data=Sensors(batch_size=8),
    optim=Plain(),
    train=Train(steps=2),
    metrics=Metrics(progress="none", loggers=()),
)


@pytest.fixture(autouse=True)
def nothing_is_given():
    yield
    GIVEN.clear()


def field(*args, **how):
    return lambda: {"inputs": BatchField(*args, **how), "labels": BatchField(())}


def update(change, kept=lambda state: state):
    """A rule that changes its updates and its state so."""

    def updated(updates, state, params=None):
        return jax.tree.map(change, updates), kept(state)

    return lambda: optax.GradientTransformation(lambda params: optax.EmptyState(), updated)


TASK = f"got task {__name__}:Offset, whose "
OPTIMIZER = f"got optimizer {__name__}:Plain, whose rule gives "
SCHEDULE = f"got schedule {__name__}:Flat, whose share gives "
SOURCE = f"got data {__name__}:Sensors, whose "
RECORDS = f"got {__name__}:Rows, whose read gives "
WRONG = [
    ("build", lambda task: None, TASK + "build gives None, expected a Task"),
    ("build", lambda task: replace(task, networks=[1]), TASK + "build gives networks [1], expected models by name"),
    ("build", lambda task: replace(task, losses=task.losses[0]), TASK + "build gives losses Loss("),
    ("build", lambda task: replace(task, losses=task.losses * 2), TASK + "build gives two losses 'loss'"),
    ("build", lambda task: replace(task, losses=(replace(task.losses[0], trains="net"),)), "trains 'net', expected"),
    ("build", lambda task: replace(task, metrics=None), TASK + "build gives metrics, which is a NoneType, exp"),
    (
        "build",
        lambda task: replace(task, metrics=lambda batch: {}),
        "gives metrics, which takes (batch), expected a fun",
    ),
    (
        "build",
        lambda task: replace(task, predicts=lambda batch: {}),
        "which takes (batch), expected a function(params,",
    ),
    (
        "build",
        lambda task: replace(task, losses=(replace(task.losses[0], fn=lambda params: 0),)),
        "gives loss 'loss', which takes (params), expected a function(params, stats, batch, rng, step)",
    ),
    ("build", lambda task: replace(task, unit="token"), TASK + "build gives unit 'token', expected tokens or examples"),
    ("fields", lambda: None, TASK + "build gives fields None, expected a BatchField by the name"),
    ("fields", lambda: {"inputs": np.float32}, TASK + "build gives a field 'inputs' that is"),
    ("fields", field((3,), np.float32, ("batch", "seq")), "of shape (3,) with the axes ('batch', 'seq'), expected"),
    ("fields", field((3,), np.float32, ("sequence",)), "with the axis 'sequence', expected one of batch, "),
    ("fields", field(None, np.float32, ("seq", "embed")), "got inputs of shape (8, 3) from the data, expected 2 dimen"),
    ("fields", field((3,), "flaot32"), "of dtype 'flaot32', expected that of numbers"),
    ("fields", field([3], np.float32), "of shape [3], expected a tuple of whole numbers"),
    ("examples", lambda opening: None, TASK + "examples gives None, expected a Source"),
    ("loss", lambda each, stats: None, TASK + "loss 'loss' gives None, expected (sum over the batch, Aux("),
    ("loss", lambda each, stats: each.sum(), TASK + "loss 'loss' gives float32[], expected (sum over the batch"),
    ("loss", lambda each, stats: (each, Aux(each.sum(), {}, stats)), "gives float32[8] as its sum, expected a single"),
    ("loss", lambda each, stats: (each.sum(), Aux(each, {}, stats)), "gives float32[8] as its weight, expected a sing"),
    ("loss", lambda each, stats: (each.sum(), Aux(each[0], {"a": each[0]}, stats)), "gives float32[] as 'a', expected"),
    ("loss", lambda each, stats: (each.sum(), Aux(each[0], {}, {"x": each})), "statistics that differ from those"),
    ("share", lambda step: None, SCHEDULE + "None, expected a single number"),
    ("share", lambda step: "1", SCHEDULE + "'1', expected a single number"),
    ("share", lambda step: jnp.ones(2), SCHEDULE + "float32[2], expected a single number"),
    ("share", lambda step: 1 if step < 5 else 0.1, SCHEDULE.replace("gives ", "asks for the value of a step that is")),
    ("share", lambda step: jnp.sqrt(2 / step), SCHEDULE + "inf at step 0 with 0 steps of warm-up, expected a fraction"),
    ("share", lambda step: 1 - 2 * step, SCHEDULE + "-1 at step 1 with 0 steps of warm-up, expected a fraction of the"),
    ("metrics", lambda total, counts: {"loss": (total, jnp.float32(len(counts)))}, "got metric 'loss' of a task from"),
    ("metrics", lambda total, counts: {"loss": (total / counts.sum(), 1.0)}, "which also counts the rows of weight 0"),
    ("rule", lambda: optax.adam(1e-3), "rule gives updates against the gradient, expected them along it"),
    ("rule", lambda: None, OPTIMIZER + "None, expected an optax.GradientTransformation"),
    ("rule", update(lambda x: x[:1]), OPTIMIZER + "updates with shape (1,) as head/b, expected shape (2,)"),
    ("rule", update(lambda x: 1.0), OPTIMIZER + "updates with shape () as head/b, expected shape (2,)"),
    ("rule", update(lambda x: x, lambda state: jnp.ones(3)), OPTIMIZER + "a state with shape (3,) as array, expected"),
    ("records", lambda split: None, SOURCE + "records('train') gives None, expected a Records"),
    ("records", lambda split: [{"reading": 1}], SOURCE + "records('train') gives [{'reading': 1}], expected a Records"),
    (
        "length",
        lambda: 8.0,
        SOURCE + "records have no length ('float' object cannot be interpreted as an integer), exp",
    ),
    ("length", lambda: -1, SOURCE + "records have no length (__len__() should return >= 0), expected a whole number"),
    ("read", lambda indices, fields: None, RECORDS + "None for 8 indices, expected a list of one record for each"),
    ("read", lambda indices, fields: [{}], RECORDS + "1 records for 8 indices, expected a list of one record for each"),
    ("read", lambda indices, fields: [{}] * len(indices), RECORDS + "{}, expected a dict with label, or a Bad"),
    ("names", lambda: "low", "got Field('label', names='low'), expected a tuple of names of classes"),
]


@pytest.mark.parametrize(("name", "gives", "message"), WRONG)
def test_what_a_class_from_outside_gives_is_refused_by_its_name_before_anything_is_written(
    tmp_path, name, gives, message
):
    GIVEN[name] = gives
    with pytest.raises(UserError) as error:
        runs.train(CONFIG, tmp_path / "run")
    assert message in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_a_run_does_not_go_on_where_classes_were_swapped(tmp_path):
    run, swapped = tmp_path / "run", r"got data whose class 0 is 'high', expected 'low' as in the run in .*run, whose"
    runs.train(CONFIG, run)
    GIVEN["names"] = lambda: NAMES[::-1]
    for _ in range(2):  # the refusal leaves what the next run compares with
        with pytest.raises(UserError, match=swapped):
            runs.train(CONFIG, run)
    runs.train(CONFIG, run, resume="must")
    runs.train(CONFIG, run)
