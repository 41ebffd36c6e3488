"""Tasks: the losses, metrics and batch contract of each kind of training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxmodels.data.section import DataConfig
from jaxmodels.models.families import create
from jaxmodels.models.kernels.quantized import Rule
from jaxmodels.models.model import quantized
from jaxmodels.tasks.added import better, measured
from jaxmodels.tasks.checks import checked
from jaxmodels.tasks.task import TASKS, Aux, Loss, Sums, Task, TaskConfig, tasks_that_answer

__all__ = ["TASKS", "Aux", "Loss", "Sums", "Task", "TaskConfig", "better", "build", "tasks_that_answer"]


def build(task: TaskConfig, model: Any, data: DataConfig, train: Any = None, metrics: Sequence[str] = ()) -> Task:
    """Build the task of an experiment for a model and its data, with products quantized as `train` says.

    `metrics` are the names of metrics from outside the package.

    Raises:
        UserError: this task cannot train such a model, or its class does not give a task.
    """
    made = create(model)
    if train is not None and train.quantize != "none":
        made = quantized(made, Rule(train.quantize, train.quantize_axes))
    return measured(checked(task.build(made, data), task), metrics)
