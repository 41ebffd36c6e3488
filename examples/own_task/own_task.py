from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from jaxmodels.data import BatchField, examples
from jaxmodels.fields import Weight
from jaxmodels.tasks.task import Aux, Loss, Task, TaskConfig, forward, normalized, rows


@dataclass(frozen=True)
class Regression(TaskConfig):
    """Predict a number below 100 from an image, by the mean of |error| ** power."""

    power: Weight = 1.0
    """Exponent of the error."""
    reads: ClassVar[tuple[str, ...]] = ("mean", "std")

    def examples(self, opening):
        return examples.labeled(opening, ("image",))

    def build(self, model, data):
        def sums(params, stats, batch, **how):
            inputs = normalized(batch["inputs"], data)
            outputs, stats = forward(("model", model), params, stats, inputs, **how)
            error = jnp.abs(outputs[:, 0] - batch["labels"])
            counts = rows(batch)  # 0 for padding rows
            found = {"loss": error**self.power, "error": error}
            return {name: ((counts * each).sum(), counts.sum()) for name, each in found.items()}, stats

        def loss(params, stats, batch, rng, step=0):
            found, stats = sums(params, stats, batch, train=True, rng=rng)
            total, count = found["loss"]
            return total, Aux(count, found, stats)

        def metrics(params, stats, batch):
            return sums(params, stats, batch)[0]

        def predicts(params, stats, batch):
            outputs, _ = forward(("model", model), params, stats, normalized(batch["inputs"], data))
            return {"number": outputs[:, 0]}

        (inputs,) = model.inputs(1)
        fields = {
            "inputs": BatchField(inputs.shape[1:], np.float32, stored=np.uint8),
            "labels": BatchField((), below=100),
        }
        return Task({"model": model}, (Loss("loss", "model", loss),), metrics, fields, predicts=predicts)
