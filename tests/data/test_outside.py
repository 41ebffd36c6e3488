"""A source and a task that no file of the tree knows: found by `module:Name`, opened and built like any other."""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import jax
import numpy as np
import pytest

from jaxmodels import tasks
from jaxmodels.commands import eval as evaluation
from jaxmodels.config import Classification, Synthetic
from jaxmodels.data import SOURCES, Loader, Order, RecordsConfig, open_source
from jaxmodels.data.contract import check_batch
from jaxmodels.errors import UserError
from jaxmodels.models.mlp import MLPConfig
from tests.sections import data_of, task_of

PACKAGE = '''
"""Readings of sensors, and the task to tell by how much each is off."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from jaxmodels.data import BatchField, RecordsConfig
from jaxmodels.data import examples
from jaxmodels.data.records import Field, Records
from jaxmodels.fields import Count, Weight
from jaxmodels.tasks.task import Aux, Loss, Task, TaskConfig, counted


class Rows(Records):
    fields = {"reading": Field("array", shape=(3,), dtype="float32"), "label": Field("label", ("low", "high"))}
    label = "sensors"

    def __init__(self, numbers):
        self.numbers, self.fingerprint = numbers, f"sensors {numbers}"

    def __len__(self):
        return len(self.numbers)

    def read(self, indices, fields):
        every = [{"reading": np.full(3, self.numbers[i], np.float32), "label": self.numbers[i] % 2} for i in indices]
        return [{name: one[name] for name in fields} for one in every]


@dataclass(frozen=True)
class Sensors(RecordsConfig):
    """Readings of sensors."""

    count: Count = 20

    def records(self, split):
        return Rows(range(self.count) if split == "train" else range(self.count, self.count + 5))


@dataclass(frozen=True)
class Offset(TaskConfig):
    """Tell by how much a reading is off."""

    power: Weight = 2.0
    reads: ClassVar = ("mean", "std")

    def build(self, model, data):
        def error(params, batch):
            out = model.apply(params["model"], batch["inputs"])[:, 0]
            each = jnp.abs(out - batch["labels"]) ** self.power
            weight = batch.get("weight", jnp.ones(len(out)))
            return (each * weight).sum(), weight.sum()

        def loss(params, stats, batch, rng, step=0):
            total, count = error(params, batch)
            return total, Aux(count, {"loss": (total, count)}, stats)

        fields = {"inputs": BatchField((3,), np.float32), "labels": BatchField((), below=2)}
        return Task({"model": model}, (Loss("loss", "model", loss),), lambda p, s, b: {"loss": error(p, b)}, fields)

    def examples(self, opening):
        return examples.labeled(opening, ("array",))
'''
MODEL = MLPConfig(input_shape=(3,), classes=2, hidden=(4,))
FACTS = {"inputs_shape": (3,), "num_classes": 2}


@pytest.fixture(autouse=True)
def package(tmp_path, monkeypatch):
    (tmp_path / "own_sensors.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(str(tmp_path))


def test_a_source_from_outside_gives_records_to_every_task():
    source = open_source(data_of("own_sensors:Sensors", count=9), "train", Classification(), **FACTS)
    batch = source.batch(np.arange(9), np.zeros(9))
    assert len(source) == 9 and source.class_names == ("low", "high") and source.kind == "array"
    assert np.array_equal(batch["inputs"][:, 1], np.arange(9)) and np.array_equal(batch["labels"], np.arange(9) % 2)
    held_out = open_source(data_of("own_sensors:Sensors", count=9), "eval", Classification(), **FACTS)
    assert held_out.batch(np.arange(1), np.zeros(1))["inputs"][0, 0] == 9
    with pytest.raises(UserError, match=r"got data.tokenizer 'chars', which classification of images or arrays"):
        open_source(data_of("own_sensors:Sensors", tokenizer="chars"), "train", Classification(), **FACTS)
    assert SOURCES.name_of(SOURCES.find("own_sensors:Sensors")) == "own_sensors:Sensors"
    with pytest.raises(UserError, match="got data source own_sensors:Sensor, .*Sensors"):
        SOURCES.find("own_sensors:Sensor")


def test_a_task_from_outside_is_built_and_has_examples_synthetic_ones_too():
    task = task_of("own_sensors:Offset", power=1)
    built = tasks.build(task, MODEL, data_of("own_sensors:Sensors"))
    params = built.init(jax.random.key(0))
    fed = {"fields": built.fields, **FACTS}
    for data, size in ((data_of("own_sensors:Sensors", count=7), 7), (Synthetic(batch_size=4), 1 << 20)):
        source = open_source(data, "train", task, **fed)
        batch = source.batch(np.arange(6), np.zeros(6))
        check_batch(built.fields, batch)
        assert len(source) == size and set(batch["labels"]) <= {0, 1}
        total, aux = built.losses[0].fn(params, {}, batch, jax.random.key(0))
        assert float(total) > 0 and float(aux.weight) == 6
    last = list(Loader(open_source(data_of("own_sensors:Sensors"), "eval", task, **fed), Order(5, 4, 0)).once())[-1]
    assert float(built.metrics(params, {}, last)["loss"][1]) == 1, "rows that fill up the batch do not count"
    with pytest.raises(UserError, match="got data.seq_len 8, which own_sensors:Offset of random examples"):
        open_source(Synthetic(seq_len=8), "train", task, **fed)


def test_a_task_refuses_a_source_that_does_not_give_what_it_needs():
    task = task_of("own_sensors:Offset")
    with pytest.raises(UserError, match="got data stdlib, expected a source of records, try --data tfds"):
        open_source(data_of("stdlib"), "train", task, **FACTS)


def test_eval_takes_the_fields_of_a_source_from_outside_that_say_which_data_it_has():
    @dataclass(frozen=True)
    class Sensor(RecordsConfig):
        station: str = ""
        scale: float = 1.0

        def records(self, split):
            raise NotImplementedError

    @dataclass(frozen=True)
    class Calibrated(Sensor):
        evaluated_by: ClassVar[tuple[str, ...]] = ("station",)

    def own(kind):
        return {field.name for field in dataclasses.fields(evaluation._options(kind))} & {"station", "scale", "path"}

    assert own(Sensor) == {"path", "station", "scale"} and own(Calibrated) == {"path", "station"}
