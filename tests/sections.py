"""Sections whose kind a test chooses by its name, synthetic data of a task, and runs that trained nothing."""

from jaxmodels import config as configs
from jaxmodels import tasks
from jaxmodels.config import Synthetic
from jaxmodels.data import SOURCES, open_source
from jaxmodels.train import saved
from jaxmodels.train.checkpoint import Checkpointer
from jaxmodels.train.job import assemble
from tests.zoo import arrays


def task_of(name="causal_lm", **fields):
    """The task of that name; behind a colon it may have a field, as in `seq2seq:seconds=2`."""
    if "=" in name:  # and not package.module:Name
        name, _, field = name.partition(":")
        key, _, value = field.partition("=")
        fields = {key: float(value), **fields}
    return tasks.TASKS.find(name)(**fields)


def data_of(source="stdlib", **fields):
    """The data source of that name."""
    return SOURCES.find(source)(**fields)


def drawn(task, model, split="train", **fields):
    """Synthetic examples for the training of a model by a task, with these fields of `data`."""
    data = Synthetic(**fields)
    contract = tasks.build(task, model, data).fields
    return open_source(data, split, task, inputs_shape=getattr(model, "input_shape", None), fields=contract)


def untrained(cfg, run):
    """A run as `train` leaves it, with random parameters, which no program was compiled for."""
    job, checkpoints = assemble(cfg), Checkpointer(run / "checkpoints")
    run.mkdir(parents=True)
    configs.save(cfg, run / "config.json", {})
    saved.keep_facts(run, job.sources["train"], job.sources["eval"])
    params = {name: arrays(network) for name, network in job.task.networks.items()}
    checkpoints.save(1, {"params": params, "stats": {}}, {})
    checkpoints.wait()
    return run


def inverted(image, rng):
    """The negative of an image: a transform from outside of the package."""
    return 255 - image
