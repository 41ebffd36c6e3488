"""Variational autoencoding: a bound on the likelihood of images (Kingma & Welling 2013)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxmodels.data import examples
from jaxmodels.data.contract import BatchField
from jaxmodels.data.opening import Opening
from jaxmodels.data.section import DataConfig
from jaxmodels.data.source import Source
from jaxmodels.errors import UserError
from jaxmodels.fields import Natural, Weight
from jaxmodels.models.model import Model
from jaxmodels.models.vae import reparameterize
from jaxmodels.tasks.losses import binary_cross_entropy, gaussian_kl
from jaxmodels.tasks.task import (
    Autoencoder,
    Aux,
    Batch,
    Loss,
    Params,
    Sums,
    Task,
    TaskConfig,
    Totals,
    divide,
    floats,
    forward,
    noise_of,
    numbers,
    rows,
    uniform_of,
)

SAMPLES = 64


@dataclass(frozen=True)
class VAE(TaskConfig):
    """Train a variational autoencoder on `inputs` (B, H, W, C) in [0, 1]; rows with a label below 0 are ignored.

    The loss is the negative evidence lower bound in nats per example. Its divergence is weighted by `task.beta`, a
    weight that grows over `task.beta_warmup_steps`. Evaluation weights it by 1, draws noise as a function of the
    example, and also reports the bound (`elbo`). With `task.binarise` each pixel becomes 1 with its brightness as the
    probability, drawn anew at each step (Salakhutdinov & Murray 2008), and in evaluation as a function of the example.
    """

    pixels: Literal["bernoulli", "gaussian"] = "bernoulli"
    """Distribution of pixels around the decoded image. bernoulli: cross-entropy; gaussian, with variance 1: half the
    squared error and a constant."""
    binarise: bool = False
    """Whether to replace each pixel by 0 or 1, drawn with its brightness as the probability."""
    beta: Weight = 1.0
    """Weight of the divergence of the codes from the prior (Higgins et al. 2017)."""
    beta_warmup_steps: Natural = 0
    """Steps over which that weight grows from 0 (Bowman et al. 2016)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.binarise and self.pixels != "bernoulli":
            raise UserError("got task.binarise with task.pixels gaussian, expected one, try --task.pixels bernoulli")
        if self.beta_warmup_steps and not self.beta:
            raise UserError(
                f"got task.beta_warmup_steps {self.beta_warmup_steps} with task.beta 0, expected a weight to grow to, "
                "try --task.beta-warmup-steps 0"
            )

    def examples(self, opening: Opening) -> Source:
        return examples.labeled(opening, ("image", "array"), optional=True)

    def build(self, model: Model, data: DataConfig) -> Task:
        shape, latents = check_autoencoder(model)

        def spread(outputs: jax.Array, images: jax.Array) -> jax.Array:
            if self.pixels == "bernoulli":
                return binary_cross_entropy(outputs, images)
            return 0.5 * jnp.square(outputs - images) + 0.5 * math.log(2 * math.pi)

        def sums(
            outputs: jax.Array, images: jax.Array, batch: Batch, mean: jax.Array, log_variance: jax.Array, beta: Any
        ) -> Sums:
            counts = rows(batch)
            pixels = spread(outputs, images).sum((1, 2, 3))
            divergence = gaussian_kl(mean, log_variance)
            found = {"loss": pixels + beta * divergence, "reconstruction": pixels, "kl": divergence}
            return {name: ((counts * each).sum(), counts.sum()) for name, each in found.items()}

        def loss(params: Params, stats: Params, batch: Batch, rng: jax.Array, step: Any = 0) -> tuple[jax.Array, Aux]:
            images = floats(batch["inputs"])
            if self.binarise:
                rng, own = jax.random.split(rng)
                images = jax.random.bernoulli(own, images).astype(jnp.float32)
            outputs, stats = forward(("model", model), params, stats, images, train=True, rng=rng)
            beta = self.beta
            if self.beta_warmup_steps:
                beta = self.beta * jnp.minimum(1.0, step / self.beta_warmup_steps)
            logits, mean, log_variance = outputs
            found = sums(logits, images, batch, mean, log_variance, beta)
            total, weight = found["loss"]
            return total, Aux(weight, found, stats)

        def metrics(params: Params, stats: Params, batch: Batch) -> Sums:
            images = floats(batch["inputs"])
            if self.binarise:
                images = (uniform_of(batch["inputs"], images.shape[1:]) < images).astype(jnp.float32)
            (_, mean, log_variance), _ = forward(("model", model), params, stats, images)
            z = reparameterize(mean, log_variance, noise_of(batch["inputs"], mean.shape[-1]))
            outputs, _ = forward(("model", model), params, stats, latents=z)
            return sums(outputs, images, batch, mean, log_variance, 1.0)

        def summarize(totals: Totals, classes: Sequence[str] = ()) -> dict[str, float]:
            values = divide(totals)
            return {**values, "elbo": -values["loss"]} if "loss" in values else values

        def seen(images: jax.Array) -> jax.Array:
            return (images > 0.5).astype(jnp.float32) if self.binarise else images

        def shown(outputs: jax.Array) -> jax.Array:
            return jax.nn.sigmoid(outputs) if self.pixels == "bernoulli" else jnp.clip(outputs, 0, 1)

        def samples(params: Params, stats: Params, count: int = SAMPLES, seed: int = 0) -> jax.Array:
            z = jax.random.normal(jax.random.key(seed), (count, latents))
            return shown(forward(("model", model), params, stats, latents=z)[0])

        fields = {"inputs": numbers(shape), "labels": BatchField(None, optional=True)}
        return Task(
            {"model": model},
            (Loss("loss", "model", loss),),
            metrics,
            fields,
            needs="an image, with a label of 0 or above if it has one",
            summarize=summarize,
            better={"reconstruction": "min", "elbo": "max"},
            samples=samples,
            autoencoder=Autoencoder(seen, shown),
            outputs=lambda params, stats, batch: forward(("model", model), params, stats, floats(batch["inputs"]))[0],
        )


def check_autoencoder(model: Model) -> tuple[tuple[int, ...], int]:
    """Return the shape of a variational autoencoder's images, and the size of their codes.

    Raises:
        UserError: the model is none: its `apply(params, images)` does not give logits of pixels and the codes' mean and
            log-variance, or its `apply(params, latents=codes)` no logits.
    """
    known = jax.eval_shape(model.stats)
    params, stats = {"model": model.shapes()}, {"model": known} if known else {}

    def outputs(*inputs: Any, **named: Any) -> Any:
        return jax.eval_shape(lambda p, s: forward(("model", model), p, s, *inputs, **named)[0], params, stats)

    def shapes(found: Any) -> list[tuple[int, ...]]:
        return [x.shape for x in found] if isinstance(found, tuple) else []

    given = model.inputs(1)
    if [len(x.shape) for x in given] == [4]:
        image = jnp.zeros(given[0].shape, given[0].dtype)
        encoded = shapes(outputs(image))
        if len(encoded) == 3 and encoded[0] == image.shape and encoded[1] == encoded[2] and len(encoded[1]) == 2:
            with contextlib.suppress(TypeError):  # its apply has no latents=
                if outputs(latents=jnp.zeros(encoded[1])).shape == image.shape:
                    return image.shape[1:], encoded[1][1]
    raise UserError(
        f"got task vae with {type(model.config).__name__}, expected a variational autoencoder, whose apply gives "
        "(logits, mean, log-variance) for images and logits for latents=, try --task classification"
    )
