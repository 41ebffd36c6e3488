"""Variational autoencoding: a bound on the likelihood of images (Kingma & Welling 2013)."""

from __future__ import annotations

import jax

from jaxmodels.config import DataConfig, TaskConfig
from jaxmodels.errors import UserError
from jaxmodels.models.functional import Model
from jaxmodels.models.vae import VAEConfig, reparameterise
from jaxmodels.tasks.losses import binary_cross_entropy, gaussian_kl
from jaxmodels.tasks.task import Aux, Batch, Loss, Params, Sums, Task, floats, forward, noise_of, rows


def vae(cfg: TaskConfig, model: Model, data: DataConfig) -> Task:
    """Train a variational autoencoder on `inputs` (B, H, W, C) in [0, 1]; rows with a label below 0 are ignored.

    The loss is the negative evidence lower bound in nats an example, with the divergence weighted by `task.beta`;
    evaluation weighs it by 1, with noise that is a function of the example.
    """
    if not isinstance(model.config, VAEConfig):
        raise UserError(
            f"got task vae with {type(model.config).__name__}, expected a variational autoencoder, "
            "try --task.name classification"
        )

    def sums(logits: jax.Array, batch: Batch, mean: jax.Array, log_variance: jax.Array, beta: float) -> Sums:
        counts = rows(batch)
        pixels = binary_cross_entropy(logits, floats(batch["inputs"])).sum((1, 2, 3))
        divergence = gaussian_kl(mean, log_variance)
        found = {"loss": pixels + beta * divergence, "reconstruction": pixels, "kl": divergence}
        return {name: ((counts * each).sum(), counts.sum()) for name, each in found.items()}

    def loss(params: Params, stats: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Aux]:
        outputs, stats = forward(("model", model), params, stats, floats(batch["inputs"]), train=True, rng=rng)
        logits, mean, log_variance = outputs
        found = sums(logits, batch, mean, log_variance, cfg.beta)
        total, weight = found["loss"]
        return total, Aux(weight, found, stats)

    def metrics(params: Params, stats: Params, batch: Batch) -> Sums:
        (_, mean, log_variance), _ = forward(("model", model), params, stats, floats(batch["inputs"]))
        z = reparameterise(mean, log_variance, noise_of(batch["inputs"], mean.shape[-1]))
        logits, _ = forward(("model", model), params, stats, latents=z)
        return sums(logits, batch, mean, log_variance, 1.0)

    def batch_spec(batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        return {"inputs": model.inputs(batch_size)[0]}

    return Task({"model": model}, (Loss("loss", "model", loss),), metrics, batch_spec)
