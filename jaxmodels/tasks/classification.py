"""Classification: one label an example."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxmodels.config import DataConfig, TaskConfig
from jaxmodels.errors import UserError
from jaxmodels.models.functional import Model
from jaxmodels.tasks.losses import Scores, cross_entropy
from jaxmodels.tasks.task import Batch, Loss, Params, Task, floats, forward, scored


def classification(cfg: TaskConfig, model: Model, data: DataConfig) -> Task:
    """Train a classifier on `inputs` (B, …) and `labels` (B,); labels below 0 are ignored, bytes scaled to [0, 1].

    Inputs of a classifier of texts are tokens (B, T); a batch may have their `segment_ids` and `types` (B, T) then.
    """
    if getattr(model.config, "classes", None) is None:
        raise UserError(
            f"got task classification with {type(model.config).__name__}, expected a classifier, "
            "try --task.name causal_lm"
        )
    if model.longest is not None and data.seq_len > model.longest:
        raise UserError(
            f"got data.seq_len {data.seq_len}, expected at most model.context {model.longest}, "
            f"try --model.context {data.seq_len}"
        )

    def score(params: Params, stats: Params, batch: Batch, **kwargs: Any) -> tuple[Scores, Params]:
        packed = {name: batch[name] for name in ("segment_ids", "types") if name in batch}
        inputs = floats(batch["inputs"])
        logits, stats = forward(("model", model), params, stats, inputs, **packed, **kwargs)
        return cross_entropy(logits, batch["labels"], cfg.label_smoothing, cfg.z_loss), stats

    def batch_spec(batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        (inputs,) = model.inputs(batch_size, data.seq_len)
        return {"inputs": inputs, "labels": jax.ShapeDtypeStruct((batch_size,), jnp.int32)}

    loss, metrics = scored(score)
    return Task({"model": model}, (Loss("loss", "model", loss),), metrics, batch_spec)
