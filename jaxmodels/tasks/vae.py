"""Variational autoencoding: a bound on the likelihood of images (Kingma & Welling 2013)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxmodels.config import DataConfig, TaskConfig
from jaxmodels.data.contract import BatchField
from jaxmodels.errors import UserError
from jaxmodels.models.functional import Model
from jaxmodels.models.vae import VAEConfig, reparameterise
from jaxmodels.tasks.losses import binary_cross_entropy, gaussian_kl
from jaxmodels.tasks.task import (
    Aux,
    Batch,
    Loss,
    Params,
    Sums,
    Task,
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


def vae(cfg: TaskConfig, model: Model, data: DataConfig) -> Task:
    """Train a variational autoencoder on `inputs` (B, H, W, C) in [0, 1]; rows with a label below 0 are ignored.

    The loss is the negative evidence lower bound in nats an example, with the divergence weighted by `task.beta`, to
    which it grows over `task.beta_warmup_steps`; evaluation weighs it by 1, with noise that is a function of the
    example, and gives the bound too (`elbo`). With `task.binarise` each pixel is 1 with its brightness as the
    probability, drawn anew at each step (Salakhutdinov & Murray 2008), in evaluation as a function of the example.
    """
    if not isinstance(model.config, VAEConfig):
        raise UserError(
            f"got task vae with {type(model.config).__name__}, expected a variational autoencoder, "
            "try --task.name classification"
        )
    if cfg.binarise and cfg.pixels != "bernoulli":
        raise UserError("got task.binarise with task.pixels gaussian, expected one, try --task.pixels bernoulli")

    def spread(outputs: jax.Array, images: jax.Array) -> jax.Array:
        if cfg.pixels == "bernoulli":
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
        if cfg.binarise:
            rng, own = jax.random.split(rng)
            images = jax.random.bernoulli(own, images).astype(jnp.float32)
        outputs, stats = forward(("model", model), params, stats, images, train=True, rng=rng)
        beta = cfg.beta
        if cfg.beta_warmup_steps:
            beta = cfg.beta * jnp.minimum(1.0, step / cfg.beta_warmup_steps)
        logits, mean, log_variance = outputs
        found = sums(logits, images, batch, mean, log_variance, beta)
        total, weight = found["loss"]
        return total, Aux(weight, found, stats)

    def metrics(params: Params, stats: Params, batch: Batch) -> Sums:
        images = floats(batch["inputs"])
        if cfg.binarise:
            images = (uniform_of(batch["inputs"], images.shape[1:]) < images).astype(jnp.float32)
        (_, mean, log_variance), _ = forward(("model", model), params, stats, images)
        z = reparameterise(mean, log_variance, noise_of(batch["inputs"], mean.shape[-1]))
        outputs, _ = forward(("model", model), params, stats, latents=z)
        return sums(outputs, images, batch, mean, log_variance, 1.0)

    def summarise(totals: Totals, classes: Sequence[str] = ()) -> dict[str, float]:
        values = divide(totals)
        return {**values, "elbo": -values["loss"]} if "loss" in values else values

    def samples(params: Params, stats: Params, count: int = SAMPLES) -> jax.Array:
        z = jax.random.normal(jax.random.key(0), (count, model.config.latents))
        outputs, _ = forward(("model", model), params, stats, latents=z)
        return jax.nn.sigmoid(outputs) if cfg.pixels == "bernoulli" else jnp.clip(outputs, 0, 1)

    fields = {"inputs": numbers(model.config.input_shape), "labels": BatchField(None, optional=True)}
    return Task(
        {"model": model},
        (Loss("loss", "model", loss),),
        metrics,
        fields,
        needs="an image, with a label of 0 or above if it has one",
        summarise=summarise,
        samples=samples,
    )
