"""Causal language modeling: predict each next token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.data import examples
from jaxmodels.data.opening import Opening
from jaxmodels.data.section import DataConfig
from jaxmodels.data.source import Source
from jaxmodels.errors import UserError
from jaxmodels.models.model import Model
from jaxmodels.tasks.losses import Scores, language_cross_entropy
from jaxmodels.tasks.task import (
    Answers,
    Aux,
    Batch,
    Loss,
    ModelCall,
    Params,
    ScoredConfig,
    Sums,
    Task,
    counted,
    forward,
    language_task,
    packed,
    tokens,
)


@dataclass(frozen=True)
class CausalLM(ScoredConfig):
    """Train a decoder on `tokens` (B, T) and `targets` (B, T), the tokens that follow; targets below 0 are ignored.

    A model's auxiliary losses (a router's) are added to the mean loss in training, and reported; not in evaluation.
    """

    answers: ClassVar[Answers] = "continuation"

    def examples(self, opening: Opening) -> Source:
        return examples.language(opening)

    def build(self, model: Model, data: DataConfig) -> Task:
        unembedding = model.unembedding
        if unembedding is None or len(model.inputs(1)) != 1:
            raise UserError(
                f"got task causal_lm with {type(model.config).__name__}, expected a language model of one text, "
                "try --task classification or seq2seq"
            )
        if model.longest is not None and data.seq_len > model.longest:
            raise UserError(
                f"got data.seq_len {data.seq_len}, expected at most model.context {model.longest}, "
                f"try --model.context {data.seq_len}"
            )

        def ask(batch: Batch, rng: jax.Array | None = None) -> ModelCall:
            rows = {name: batch[name] for name in ("segment_ids", "positions") if name in batch}
            targets = counted(batch, batch["targets"])
            return ModelCall((batch["tokens"],), {**rows, "head": False}, targets, self.score, rng)

        def run(
            params: Params, stats: Params, batch: Batch, **kwargs: Any
        ) -> tuple[Scores, Params, dict[str, jax.Array]]:
            call, auxiliary = ask(batch), {"auxiliary": True} if model.auxiliary else {}
            out, stats = forward(("model", model), params, stats, *call.inputs, **call.options, **auxiliary, **kwargs)
            features, extra = out if model.auxiliary else (out, {})
            output = unembedding(params["model"])
            scores = language_cross_entropy(features, output, call.targets, self.label_smoothing, self.z_loss)
            return scores, stats, extra

        def loss(params: Params, stats: Params, batch: Batch, rng: jax.Array, step: Any = 0) -> tuple[jax.Array, Aux]:
            s, stats, extra = run(params, stats, batch, train=True, rng=rng)
            # times the count that the sum is divided by, so that the mean loss contains each once
            added = {name: s.count * value for name, value in extra.items()}
            sums = {"loss": s.objective + sum(added.values()), "accuracy": s.correct, **added}
            return sums["loss"], Aux(s.count, {name: (total, s.count) for name, total in sums.items()}, stats)

        def metrics(params: Params, stats: Params, batch: Batch) -> Sums:
            s, _, _ = run(params, stats, batch)
            found = {"loss": (s.loss, s.count), "accuracy": (s.correct, s.count)}
            if "bytes" in batch:
                seen = counted(batch, batch["targets"]) >= 0
                found["bits_per_byte"] = (s.loss / np.log(2), jnp.where(seen, batch["bytes"], 0).sum())
            return found

        def outputs(params: Params, stats: Params, batch: Batch) -> jax.Array:
            rows: dict[str, Any] = {name: batch[name] for name in ("segment_ids", "positions") if name in batch}
            return forward(("model", model), params, stats, batch["tokens"], **rows)[0]

        ids = tokens(data, getattr(model.config, "vocab_size", None))
        fields = {"tokens": ids, "targets": ids, **packed(data), "bytes": tokens(data, optional=True)}
        return language_task(model, Loss("loss", "model", loss), metrics, fields, outputs=outputs, ask=ask)
