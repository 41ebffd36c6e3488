"""Causal language modelling: predict each next token."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.config import DataConfig, TaskConfig
from jaxmodels.errors import UserError
from jaxmodels.models.functional import Model
from jaxmodels.models.layers import shard
from jaxmodels.tasks.losses import Scores, cross_entropy, linear_cross_entropy
from jaxmodels.tasks.task import Batch, Loss, Params, Task, forward, scored

FEW = 2048
"""Below so many tokens in the vocabulary all logits are held at once: it is faster, and they are small."""


def causal_lm(cfg: TaskConfig, model: Model, data: DataConfig) -> Task:
    """Train a decoder on `tokens` (B, T) and `targets` (B, T), the tokens that follow; targets below 0 are ignored."""
    unembedding = model.unembedding
    if unembedding is None:
        raise UserError(
            f"got task causal_lm with {type(model.config).__name__}, expected a language model, "
            "try --task.name classification"
        )
    if model.longest is not None and data.seq_len > model.longest:
        raise UserError(
            f"got data.seq_len {data.seq_len}, expected at most model.context {model.longest}, "
            f"try --model.context {data.seq_len}"
        )

    def score(params: Params, stats: Params, batch: Batch, **kwargs: Any) -> tuple[Scores, Params]:
        packed = {name: batch[name] for name in ("segment_ids", "positions") if name in batch}
        features, stats = forward(("model", model), params, stats, batch["tokens"], head=False, **packed, **kwargs)
        output = shard(unembedding(params["model"]).astype(features.dtype), "vocab", None)
        if output.shape[0] < FEW:
            logits = jnp.einsum("btd,vd->btv", features, output, preferred_element_type=jnp.float32)
            return cross_entropy(logits, batch["targets"], cfg.label_smoothing, cfg.z_loss), stats
        return linear_cross_entropy(features, output, batch["targets"], cfg.label_smoothing, cfg.z_loss), stats

    def batch_spec(batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        rows = jax.ShapeDtypeStruct((batch_size, data.seq_len), jnp.int32)
        return {"tokens": rows, "targets": rows}

    def summarise(values: dict[str, float]) -> dict[str, float]:
        return {**values, "perplexity": float(np.exp(min(values["loss"], 700.0)))}

    loss, metrics = scored(score)
    return Task({"model": model}, (Loss("loss", "model", loss),), metrics, batch_spec, "tokens", summarise)
