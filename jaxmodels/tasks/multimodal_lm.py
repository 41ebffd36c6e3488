"""Multimodal language modeling: answer a question about an image, a sound, or both."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.data.contract import BatchField, Places
from jaxmodels.data.opening import Opening
from jaxmodels.data.replies import replied
from jaxmodels.data.section import DataConfig
from jaxmodels.data.source import Source
from jaxmodels.errors import UserError
from jaxmodels.fields import Count
from jaxmodels.models.model import Model
from jaxmodels.parallel.rules import gather
from jaxmodels.tasks.losses import Scores, language_cross_entropy, logits_of
from jaxmodels.tasks.task import (
    OF_LANGUAGE,
    Answers,
    Batch,
    Loss,
    ModelCall,
    Params,
    ScoredConfig,
    Sums,
    Task,
    counted,
    floats,
    forward,
    normalized,
    numbers,
    perplexity,
    scored,
    tokens,
)


@dataclass(frozen=True)
class MultimodalLM(ScoredConfig):
    """Train a decoder with towers on `tokens` (B, T) and `targets` (B, T), the tokens of the answers; others are below
    0. A batch has `images` (B, H, W, C) and `sounds` (B, N) with `lengths` (B,) where the model has towers for them.

    `exact_match` is the share of answers whose tokens are each the likeliest: those that greedy decoding gives.
    """

    template: str = ""
    """What is before the answer, such as "USER: {image} {question} ASSISTANT: ", with {question} and {image} or {sound}
    in braces. Empty: the media, the question and a space."""
    longest: Count = 32
    """The most tokens of an answer, its end included."""
    answers: ClassVar[Answers] = "reply"
    reads: ClassVar[tuple[str, ...]] = ("mean", "std")

    def examples(self, opening: Opening) -> Source:
        return replied(opening, self.template, self.longest)

    def build(self, model: Model, data: DataConfig) -> Task:
        config, unembedding = model.config, model.unembedding
        if unembedding is None or not hasattr(config, "towers"):
            raise UserError(
                f"got task multimodal_lm with {type(config).__name__}, expected a decoder with towers, "
                "try --model multimodal or --task causal_lm"
            )

        def inputs(batch: Batch) -> tuple[Any, ...]:
            return batch["tokens"], *media(batch, data)

        def ask(batch: Batch, rng: jax.Array | None = None) -> ModelCall:
            return ModelCall(inputs(batch), {"head": False}, counted(batch, batch["targets"]), self.score, rng)

        def answered(params: Params, stats: Params, batch: Batch, **how: Any) -> tuple[Any, Any, Params]:
            call = ask(batch)
            features, stats = forward(("model", model), params, stats, *call.inputs, **call.options, **how)
            return features, call.targets, stats

        def scores(params: Params, features: jax.Array, targets: jax.Array) -> Scores:
            return language_cross_entropy(
                features, unembedding(params["model"]), targets, self.label_smoothing, self.z_loss
            )

        def score(params: Params, stats: Params, batch: Batch, **how: Any) -> tuple[Scores, Params]:
            features, targets, stats = answered(params, stats, batch, **how)
            return scores(params, features, targets), stats

        def metrics(params: Params, stats: Params, batch: Batch) -> Sums:
            features, targets, _ = answered(params, stats, batch)
            s, output = scores(params, features, targets), unembedding(params["model"]).astype(features.dtype)
            exact = exactly(features, gather(output, ("vocab", "embed")), targets, self.longest)
            return {"loss": (s.loss, s.count), "accuracy": (s.correct, s.count), "exact_match": exact}

        def outputs(params: Params, stats: Params, batch: Batch) -> jax.Array:
            return forward(("model", model), params, stats, *inputs(batch))[0]

        ids = tokens(data, config.vocab_size)
        fields = {"tokens": ids, "targets": ids}
        if "image" in config.towers:
            own = Places(config.image.token, lambda _: config.image.places)
            fields["images"] = dataclasses.replace(numbers(config.image.input_shape), places=own)
        if "sound" in config.towers:
            sound = config.sound
            how: dict[str, Any] = {"rate": sound.sample_rate, "places": Places(sound.token, sound.taken)}
            # 16 bits a sample, of which a plan draws those from 0 on
            fields["sounds"] = BatchField((sound.samples,), np.float32, stored=np.int16, below=2**15, **how)
            fields["lengths"] = BatchField((), below=sound.samples + 1, optional=True, usual=True)
        loss, _ = scored(score)
        return Task(
            {"model": model},
            (Loss("loss", "model", loss),),
            metrics,
            fields,
            unit="tokens",
            needs="an answer",
            summarize=perplexity,
            better={**OF_LANGUAGE, "exact_match": "max"},
            outputs=outputs,
            ask=ask,
        )


def media(batch: Mapping[str, Any], data: DataConfig) -> list[Any]:
    """Return what a model takes behind its tokens: images, and sounds with their lengths if the batch has them."""
    found: list[Any] = [normalized(batch["images"], data)] if "images" in batch else []
    if "sounds" in batch:
        sounds = floats(batch["sounds"])
        found.append((sounds, batch["lengths"]) if "lengths" in batch else sounds)
    return found


def exactly(features: jax.Array, output: jax.Array, targets: jax.Array, longest: int) -> tuple[jax.Array, jax.Array]:
    """Count the rows whose targets are each the likeliest token, and the rows that have any.

    Shapes: features (B, T, D), output (V, D), targets (B, T), of which at most `longest` of a row are not below 0, one
    behind the other.
    """
    begins = jnp.argmax(targets >= 0, axis=1)[:, None]
    at = jnp.minimum(begins + jnp.arange(min(longest, targets.shape[1])), targets.shape[1] - 1)
    wanted = jnp.take_along_axis(targets, at, axis=1)
    logits = logits_of(jnp.take_along_axis(features, at[..., None], axis=1), output)
    right = ((logits.argmax(-1) == wanted) | (wanted < 0)).all(1)
    counts = (targets >= 0).any(1)
    return (right & counts).sum(), counts.sum()
