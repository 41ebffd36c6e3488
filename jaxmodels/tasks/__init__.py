"""What is optimised: the losses, metrics and batch contract of each kind of training."""

from __future__ import annotations

from typing import Any

from jaxmodels.config import DataConfig, TaskConfig, Train, used
from jaxmodels.models.functional import create, quantized
from jaxmodels.models.kernels.quantized import Rule
from jaxmodels.tasks.causal_lm import causal_lm
from jaxmodels.tasks.classification import classification
from jaxmodels.tasks.contrastive import contrastive
from jaxmodels.tasks.gan import gan
from jaxmodels.tasks.masked_lm import masked_lm
from jaxmodels.tasks.seq2seq import seq2seq
from jaxmodels.tasks.task import Aux, Loss, Sums, Task
from jaxmodels.tasks.vae import vae

__all__ = ["Aux", "Loss", "Sums", "Task", "build"]

TASKS = {
    "causal_lm": causal_lm,
    "masked_lm": masked_lm,
    "classification": classification,
    "seq2seq": seq2seq,
    "contrastive": contrastive,
    "vae": vae,
    "gan": gan,
}


def build(task: TaskConfig, model: Any, data: DataConfig, train: Train | None = None) -> Task:
    """The task of an experiment: this kind of training of this model on batches of this shape; quantized by `train`."""
    used.check_task(task, model)
    made = create(model)
    if train is not None and train.quantize != "none":
        made = quantized(made, Rule(train.quantize, train.quantize_axes))
    return TASKS[task.name](task, made, data)
