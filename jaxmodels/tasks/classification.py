"""Classification with one label per example, or any number of them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.data import examples
from jaxmodels.data.classes import check_classes
from jaxmodels.data.contract import BatchField
from jaxmodels.data.opening import Opening
from jaxmodels.data.section import DataConfig
from jaxmodels.data.source import Source
from jaxmodels.errors import UserError
from jaxmodels.fields import Weight, described
from jaxmodels.models.layers import shard
from jaxmodels.models.model import Model
from jaxmodels.registry import named
from jaxmodels.tasks import metrics as measures
from jaxmodels.tasks.losses import Scores, binary_cross_entropy
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
    normalized,
    numbers,
    tokens,
)


@dataclass(frozen=True)
class Classification(ScoredConfig):
    """Train a classifier on `inputs` (B, …) and `labels` (B,), ignored below 0; with `task.multi_label` (B, classes).

    Images of bytes are scaled to [0, 1] and normalized. Text classifiers take tokens (B, T) as inputs, and batches may
    then have `segment_ids` and `types` (B, T). Images may be blended in training (`task.mixup`, `task.cutmix`), as a
    function of the seed and the step.
    """

    multi_label: bool = False
    """Whether an example may have any number of classes, each predicted independently."""
    mixup: Weight = 0.0
    """Blend images in pairs, with weights drawn from Beta(mixup, mixup) (Zhang et al. 2018). 0: never."""
    cutmix: Weight = 0.0
    """Paste a rectangle of another image, covering a fraction drawn from Beta(cutmix, cutmix) (Yun et al. 2019). 0:
    never. With mixup too, each batch uses one of them."""
    reads: ClassVar[tuple[str, ...]] = ("mean", "std")

    @property
    def answers(self) -> Answers:  # pyright: ignore[reportIncompatibleVariableOverride]
        return "classes" if self.multi_label else "class"

    def examples(self, opening: Opening) -> Source:
        kinds = ("image", "array") if opening.inputs_shape else ("text",)
        source = examples.labeled(opening, kinds)
        check_classes(source, opening.num_classes)
        return source

    def build(self, model: Model, data: DataConfig) -> Task:
        classes = getattr(model.config, "classes", None)
        if classes is None:
            raise UserError(
                f"got task classification with {type(model.config).__name__}, expected a classifier, "
                "try --task causal_lm"
            )
        if model.longest is not None and data.seq_len > model.longest:
            raise UserError(
                f"got data.seq_len {data.seq_len}, expected at most model.context {model.longest}, "
                f"try --model.context {data.seq_len}"
            )
        if classes == 1 and not self.multi_label:
            raise UserError(
                "got model.classes 1, expected 2 or more, since the probability of a single class is always 1 (a score "
                "or a regression is not computed here), try --model.classes 2"
            )
        blends = bool(self.mixup or self.cutmix)
        if blends and len(model.inputs(1)[0].shape) != 4:
            raise UserError(
                f"got task.mixup {self.mixup} and task.cutmix {self.cutmix} for {type(model.config).__name__}, "
                "expected a model of images, try --task.mixup 0 --task.cutmix 0"
            )
        if self.multi_label and (self.label_smoothing or self.z_loss):
            raise UserError(
                "got task.multi_label with label smoothing or z-loss, expected neither, "
                "try --task.label-smoothing 0 --task.z-loss 0"
            )

        def scores(logits: jax.Array, labels: jax.Array) -> Scores:
            if not self.multi_label:
                return self.score(logits, labels)
            found = measures.multiple(logits, labels)
            each = (binary_cross_entropy(logits, jnp.maximum(labels, 0)) * (labels >= 0)).sum(-1)
            return Scores(each.sum(), each.sum(), *found["accuracy"])

        def packed(batch: Batch) -> dict[str, Any]:
            return {name: batch[name] for name in ("segment_ids", "types") if name in batch}

        def apply(params: Params, stats: Params, batch: Batch, inputs: jax.Array, **kwargs: Any) -> tuple[Any, Params]:
            logits, stats = forward(("model", model), params, stats, inputs, **packed(batch), **kwargs)
            if getattr(logits, "shape", None) != (len(inputs), classes):
                raise UserError(
                    f"got a model {named(type(model.config))} that gives {described(logits)} for {len(inputs)} "
                    f"examples of {classes} classes, expected logits of shape {(len(inputs), classes)}"
                )
            return logits, stats

        def ask(batch: Batch, rng: jax.Array | None) -> ModelCall:
            inputs, labels = normalized(batch["inputs"], data), counted(batch, batch["labels"])
            if not blends or rng is None:
                return ModelCall((inputs,), packed(batch), labels, scores, rng)
            rng, own = jax.random.split(rng)
            inputs, share = blend(own, inputs, self.mixup, self.cutmix)

            def blended(logits: jax.Array, labels: jax.Array) -> Scores:
                a, b = scores(logits, labels), scores(logits, labels[::-1])
                return Scores(*(share * x + (1 - share) * y for x, y in zip(a, b, strict=True)))

            return ModelCall((inputs,), packed(batch), labels, blended, rng)

        def loss(params: Params, stats: Params, batch: Batch, rng: jax.Array, step: Any = 0) -> tuple[jax.Array, Aux]:
            call = ask(batch, rng)
            logits, stats = apply(params, stats, batch, *call.inputs, train=True, rng=call.rng)
            s = call.score(logits, call.targets)
            return s.objective, Aux(s.count, {"loss": (s.objective, s.count), "accuracy": (s.correct, s.count)}, stats)

        def metrics(params: Params, stats: Params, batch: Batch) -> Sums:
            logits, _ = apply(params, stats, batch, normalized(batch["inputs"], data))
            labels = counted(batch, batch["labels"])
            s = scores(logits, labels)
            measure = measures.multiple if self.multi_label else measures.single
            return {"loss": (s.loss, s.count), **measure(logits, labels)}

        (inputs,), types = model.inputs(1, data.seq_len), tokens(data, optional=True)
        segments = dataclasses.replace(types, usual=True)
        reads_text = jnp.issubdtype(inputs.dtype, jnp.integer)
        label = BatchField((classes,), np.float32, below=2) if self.multi_label else BatchField((), below=classes)
        if reads_text:
            ids = tokens(data, getattr(model.config, "vocab_size", None))
            fields = {"inputs": ids, "labels": label, "segment_ids": segments, "types": types}
        else:
            fields = {"inputs": numbers(inputs.shape[1:]), "labels": label}

        return Task(
            {"model": model},
            (Loss("loss", "model", loss),),
            metrics,
            fields,
            needs="a label of 0 or above",
            summarize=measures.summarize,
            ask=ask,
            better=measures.BETTER,
            outputs=lambda params, stats, batch: apply(params, stats, batch, normalized(batch["inputs"], data))[0],
        )


def blend(key: jax.Array, images: jax.Array, mixup: float, cutmix: float) -> tuple[jax.Array, jax.Array]:
    """Blend each image (B, H, W, C) with its mirror position in the batch; also return the weight of the image itself.

    mixup and cutmix are the parameters of the Beta distributions of that weight; 0: not used. With both, a coin decides
    for the whole batch.
    Source: Zhang et al. 2018; Yun et al. 2019, equation 2.
    """
    which, amount, at = jax.random.split(key, 3)
    other = images[::-1]

    def whole() -> tuple[jax.Array, jax.Array]:
        share = jax.random.beta(amount, mixup, mixup)
        return share * images + (1 - share) * other, share

    def rectangle() -> tuple[jax.Array, jax.Array]:
        H, W = images.shape[1:3]
        side = jnp.sqrt(1 - jax.random.beta(amount, cutmix, cutmix))
        y, x = jax.random.uniform(at, (2,)) * jnp.array([H, W])
        (top, bottom), (left, right) = (
            (jnp.clip(jnp.round(c - side * n / 2), 0, n), jnp.clip(jnp.round(c + side * n / 2), 0, n))
            for c, n in ((y, H), (x, W))
        )
        rows, columns = jnp.arange(H)[:, None], jnp.arange(W)[None]
        inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
        return jnp.where(inside[..., None], other, images), 1 - inside.mean()

    if mixup and cutmix:
        mixed, share = jax.lax.cond(jax.random.bernoulli(which), whole, rectangle)
    else:
        mixed, share = whole() if mixup else rectangle()
    return shard(mixed, "batch", None, None, None), share
