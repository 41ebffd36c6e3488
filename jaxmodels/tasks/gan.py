"""Adversarial training: a generator against a discriminator, or against a critic with a gradient penalty."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import jax

from jaxmodels.data import examples
from jaxmodels.data.contract import BatchField
from jaxmodels.data.opening import Opening
from jaxmodels.data.section import DataConfig, default
from jaxmodels.data.source import Source
from jaxmodels.errors import UserError
from jaxmodels.fields import Range, Weight
from jaxmodels.models.families import create
from jaxmodels.models.layers import shard
from jaxmodels.models.model import Model
from jaxmodels.tasks import losses as objectives
from jaxmodels.tasks.task import (
    Aux,
    Batch,
    Loss,
    Params,
    Sums,
    Task,
    TaskConfig,
    floats,
    forward,
    noise_of,
    numbers,
    rows,
)

SAMPLES = 64


@dataclass(frozen=True)
class GAN(TaskConfig):
    """Train both networks of a GAN on `inputs` (B, H, W, C) in [0, 1]; rows with a label below 0 are ignored.

    A step updates the discriminator `task.critic_steps` times, each time on its own share of the batch, then the
    generator, with as many latents as a share has rows. Each network's batch statistics follow only its own loss. DCGAN
    uses the logistic loss, in its non-saturating form for the generator (Goodfellow et al. 2014, section 3). WGAN-GP
    uses the Wasserstein distance with gradient penalty (Gulrajani et al. 2017, equation 3). Evaluation reports the
    discriminator's loss (without penalty) and the generator's, with latents that are a function of the example.

    The model's config has two fields: `network`, generator or discriminator, and `kind`, of which wgan-gp is trained as
    WGAN-GP and any other as DCGAN.
    """

    critic_steps: Annotated[int, Range(1, 1000)] = 1
    """Discriminator updates per generator update, each on its own share of the batch."""
    gradient_penalty: Weight = 10.0
    """Weight of the penalty on the critic's gradient (only for kind wgan-gp; Gulrajani et al. 2017)."""

    def examples(self, opening: Opening) -> Source:
        return examples.labeled(opening, ("image", "array"), optional=True)

    def build(self, model: Model, data: DataConfig) -> Task:
        config = model.config
        if not (hasattr(config, "network") and hasattr(config, "kind")):
            raise UserError(
                f"got task gan with {type(config).__name__}, expected a GAN, whose config has the fields "
                "network (generator or discriminator) and kind, try --task classification"
            )
        wasserstein = config.kind == "wgan-gp"
        if not wasserstein and self.gradient_penalty != (usual := default(self, "gradient_penalty")):
            raise UserError(
                f"got task.gradient_penalty {self.gradient_penalty} for a GAN of kind {config.kind}, expected wgan-gp, "
                f"try --model.kind wgan-gp or --task.gradient-penalty {usual}"
            )
        generator = ("generator", create(config, network="generator"))
        discriminator = ("discriminator", create(config, network="discriminator"))
        (noise,), (image,) = (network.inputs(1) for _, network in (generator, discriminator))
        size, shape = noise.shape[-1], image.shape[1:]

        def scale(batch: Batch) -> jax.Array:
            return 2 * floats(batch["inputs"]) - 1

        def latents(key: jax.Array, batch: Batch) -> jax.Array:
            # the same on any number of devices; each device draws those of its rows
            return shard(jax.random.normal(key, (len(batch["inputs"]), size)), "batch", None)

        def judged(real: jax.Array, fake: jax.Array) -> jax.Array:
            return fake - real if wasserstein else jax.nn.softplus(-real) + jax.nn.softplus(fake)

        def fooled(fake: jax.Array) -> jax.Array:
            return -fake if wasserstein else jax.nn.softplus(-fake)

        def total(each: Mapping[str, jax.Array], batch: Batch) -> Sums:
            counts = rows(batch)
            return {name: ((counts * values).sum(), counts.sum()) for name, values in each.items()}

        def train_discriminator(
            params: Params, stats: Params, batch: Batch, rng: jax.Array, step: Any = 0
        ) -> tuple[jax.Array, Aux]:
            keys = jax.random.split(rng, 2)
            real = scale(batch)
            fake, _ = forward(generator, params, stats, latents(keys[0], batch), train=True)
            on_real, stats = forward(discriminator, params, stats, real, train=True)
            on_fake, stats = forward(discriminator, params, stats, fake, train=True)
            each = {"loss": judged(on_real, on_fake), "real": on_real, "fake": on_fake}
            if wasserstein:
                share = shard(jax.random.uniform(keys[1], (len(real),)), "batch")
                each["penalty"] = objectives.gradient_penalty(
                    lambda x: forward(discriminator, params, stats, x, train=True)[0], real, fake, share
                )
                each["loss"] += self.gradient_penalty * each["penalty"]
            sums = total(each, batch)
            return sums["loss"][0], Aux(sums["loss"][1], sums, stats)

        def train_generator(
            params: Params, stats: Params, batch: Batch, rng: jax.Array, step: Any = 0
        ) -> tuple[jax.Array, Aux]:
            batch = {name: x[:: self.critic_steps] for name, x in batch.items()}  # strided: rows of every device
            fake, stats = forward(generator, params, stats, latents(rng, batch), train=True)
            on_fake, _ = forward(discriminator, params, stats, fake, train=True)
            sums = total({"loss": fooled(on_fake)}, batch)
            return sums["loss"][0], Aux(sums["loss"][1], sums, stats)

        def metrics(params: Params, stats: Params, batch: Batch) -> Sums:
            fake, _ = forward(generator, params, stats, noise_of(batch["inputs"], size))
            on_real, on_fake = (forward(discriminator, params, stats, x)[0] for x in (scale(batch), fake))
            return total({"loss": judged(on_real, on_fake), "generator": fooled(on_fake)}, batch)

        fields = {"inputs": numbers(shape), "labels": BatchField(None, optional=True)}

        def samples(params: Params, stats: Params, count: int = SAMPLES, seed: int = 0) -> jax.Array:
            z = jax.random.normal(jax.random.key(seed), (count, size))
            return (forward(generator, params, stats, z)[0] + 1) / 2

        losses = (
            Loss("discriminator", "discriminator", train_discriminator, self.critic_steps),
            Loss("generator", "generator", train_generator),
        )
        needs = "an image, with a label of 0 or above if it has one"
        return Task(dict((generator, discriminator)), losses, metrics, fields, needs=needs, samples=samples)
