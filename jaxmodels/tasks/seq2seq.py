"""Sequence to sequence: predict each next token of a target from a source and the target so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax

from jaxmodels.data import examples
from jaxmodels.data.opening import Opening
from jaxmodels.data.section import DataConfig
from jaxmodels.data.source import Source
from jaxmodels.errors import UserError
from jaxmodels.models.model import Model
from jaxmodels.tasks.losses import Scores, language_cross_entropy
from jaxmodels.tasks.task import (
    Answers,
    Asked,
    Batch,
    Loss,
    Params,
    ScoredConfig,
    Task,
    counted,
    forward,
    language_task,
    scored,
    tokens,
)


@dataclass(frozen=True)
class Seq2Seq(ScoredConfig):
    """Train an encoder-decoder on sources `inputs` (B, S), decoder inputs `tokens` (B, T) and `targets` (B, T).

    Targets are the tokens that follow, ignored below 0. A batch may have `segment_ids` (B, S) and `target_segment_ids`
    (B, T), for padding and packing.
    """

    answers: ClassVar[Answers] = "translation"

    def examples(self, opening: Opening) -> Source:
        return examples.pairs(opening)

    def build(self, model: Model, data: DataConfig) -> Task:
        unembedding = model.unembedding
        if unembedding is None or len(model.inputs(1)) != 2:
            raise UserError(
                f"got task seq2seq with {type(model.config).__name__}, expected an encoder-decoder, "
                "try TransformerConfig or another --task"
            )

        def ask(batch: Batch, rng: jax.Array | None = None) -> Asked:
            packed = {name: batch[name] for name in ("segment_ids", "target_segment_ids") if name in batch}
            inputs, targets = (batch["inputs"], batch["tokens"]), counted(batch, batch["targets"])
            return Asked(inputs, {**packed, "head": False}, targets, self.score, rng)

        def score(params: Params, stats: Params, batch: Batch, **kwargs: Any) -> tuple[Scores, Params]:
            asked = ask(batch)
            features, stats = forward(("model", model), params, stats, *asked.inputs, **asked.options, **kwargs)
            output = unembedding(params["model"])
            return language_cross_entropy(features, output, asked.targets, self.label_smoothing, self.z_loss), stats

        def outputs(params: Params, stats: Params, batch: Batch) -> Any:
            packed: dict[str, Any] = {
                name: batch[name] for name in ("segment_ids", "target_segment_ids") if name in batch
            }
            return forward(("model", model), params, stats, batch["inputs"], batch["tokens"], **packed)[0]

        ids, segments = tokens(data, getattr(model.config, "vocab_size", None)), tokens(data, optional=True, usual=True)
        fields = {"inputs": ids, "tokens": ids, "targets": ids, "segment_ids": segments, "target_segment_ids": segments}
        loss, metrics = scored(score)
        return language_task(model, Loss("loss", "model", loss), metrics, fields, outputs=outputs, ask=ask)
