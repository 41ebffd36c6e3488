"""Sections whose kind a test chooses by its name, and synthetic data of a task."""

from jaxmodels import tasks
from jaxmodels.config import Synthetic
from jaxmodels.data import SOURCES, open_source


def task_of(name="causal_lm", **fields):
    """The task of that name."""
    return tasks.TASKS.find(name)(**fields)


def data_of(source="stdlib", **fields):
    """The data source of that name."""
    return SOURCES.find(source)(**fields)


def drawn(task, model, split="train", **fields):
    """Synthetic examples for the training of a model by a task, with these fields of `data`."""
    data = Synthetic(**fields)
    contract = tasks.build(task, model, data).fields
    return open_source(data, split, task, inputs_shape=getattr(model, "input_shape", None), fields=contract)


def inverted(image, rng):
    """The negative of an image: a transform from outside of the package."""
    return 255 - image
