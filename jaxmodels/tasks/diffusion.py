"""Image generation from noise, by diffusion or flow matching, conditioned on a class or a text."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from jaxmodels.data import examples
from jaxmodels.data.contract import BatchField
from jaxmodels.data.opening import Opening
from jaxmodels.data.section import DataConfig, default
from jaxmodels.data.source import Source
from jaxmodels.errors import UserError
from jaxmodels.fields import Dropped, Natural, Range, Share, Weight
from jaxmodels.models.layers import shard
from jaxmodels.models.model import Model
from jaxmodels.tasks.noise import Objective, Process, Schedule, guided
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
    tokens,
    uniform_of,
)

SAMPLES = 64
Steps = Annotated[int, Range(1, 100_000)]


@dataclass(frozen=True)
class Diffusion(TaskConfig):
    """Train a network to remove noise from images in [0, 1]; rows with a label below 0 are ignored.

    The images `inputs` (B, H, W, C) come with `labels` (B,) where the model has classes. With a vocabulary they are
    `images`, with `tokens` and `segment_ids` (B, T). The loss is the squared error of what is predicted, averaged over
    pixels, at a random time of the path from image to noise. In evaluation, time and noise are functions of the
    example.
    """

    objective: Objective = "flow"
    """What is predicted. epsilon: the noise of DDPM; v: its velocity; flow: the velocity of a straight path."""
    schedule: Schedule = "linear"
    """How the noise of epsilon and v grows: variances from 1e-4 to 0.02, or a squared cosine. A flow has none."""
    noise_steps: Steps = 1000
    """Steps from image to noise, by which diffusion counts time."""
    label_dropout: Dropped = 0.1
    """Share of examples whose class or text is withheld while training, which classifier-free guidance needs."""
    guidance: Weight = 1.0
    """Scale of classifier-free guidance in sampling (Ho & Salimans 2022); 1: no guidance."""
    sample_steps: Steps = 50
    """Steps of sampling, in each of which the network is applied once, or twice with guidance."""
    eta: Share = 0.0
    """Noise that steps of sampling add. 0: none, which is DDIM or, for a flow, Euler's method; 1: ancestral sampling of
    DDPM."""
    draw: tuple[Natural, ...] = ()
    """Classes of the pictures that are drawn, in turn. (): all of them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.guidance != 1 and not self.label_dropout:
            raise UserError(
                f"got task.guidance {self.guidance} with task.label_dropout 0, at which a model has not learned what "
                "pictures of anything are, expected a share above 0, try --task.guidance 1 or --task.label-dropout 0.1"
            )
        if self.objective == "flow":
            for name in ("schedule", "noise_steps", "eta"):
                if (value := getattr(self, name)) != (usual := default(self, name)):
                    raise UserError(
                        f"got task.{name} {value} for a flow, whose path is straight, expected objective epsilon or v, "
                        f"try --task.objective v or --task.{name.replace('_', '-')} {usual}"
                    )
        elif self.sample_steps > self.noise_steps:
            raise UserError(
                f"got task.sample_steps {self.sample_steps}, expected at most task.noise_steps {self.noise_steps}, "
                f"try --task.sample-steps {self.noise_steps}"
            )

    def examples(self, opening: Opening) -> Source:
        if opening.vocab_size:
            return examples.captioned(opening)
        return examples.labeled(opening, ("image", "array"), optional=not opening.num_classes)

    def build(self, model: Model, data: DataConfig) -> Task:
        shape, classes, vocabulary = check_denoiser(model)
        process = Process(self.objective, self.schedule, self.noise_steps)
        by_text = vocabulary > 0
        image = "images" if by_text else "inputs"
        if self.guidance != 1 and not (classes or by_text):
            raise UserError(
                f"got task.guidance {self.guidance} for a model of neither classes nor texts, by which pictures could "
                "be guided, expected one of them, try --task.guidance 1"
            )
        if wrong := [each for each in self.draw if each >= classes]:
            raise UserError(
                f"got class {wrong[0]} in task.draw, expected classes below model.classes {classes}, try without it"
            )

        def predict(params: Params, stats: Params, x: Any, times: Any, conditions: Any, counts: Any, **how: Any) -> Any:
            """What the network predicts; unconditionally in the rows where `counts` (B,) is false."""
            words: dict[str, Any] = {}
            if by_text:
                given = conditions["tokens"]
                words["segment_ids"] = conditions.get("segment_ids", jnp.ones_like(given)) * counts[:, None]
            else:
                given = jnp.where(counts, conditions["labels"], classes) if classes else None
            return forward(("model", model), params, stats, x, times, given, **words, **how)

        def errors(
            params: Params, stats: Params, batch: Batch, share: jax.Array, noise: jax.Array, **how: Any
        ) -> tuple[Sums, Params]:
            images, time = 2 * floats(batch[image]) - 1, process.time(share)
            x, target = process.mix(images, noise, time), process.target(images, noise, time)
            found, stats = predict(params, stats, x, process.timestep(time), batch, **how)
            counts = rows(batch)
            return {"loss": ((counts * jnp.square(found - target).mean((1, 2, 3))).sum(), counts.sum())}, stats

        def loss(params: Params, stats: Params, batch: Batch, rng: jax.Array, step: Any = 0) -> tuple[jax.Array, Aux]:
            count, keys = len(batch[image]), jax.random.split(rng, 4)
            noise = shard(jax.random.normal(keys[0], (count, *shape)), "batch", None, None, None)
            share = shard(jax.random.uniform(keys[1], (count,)), "batch")
            conditional = shard(jax.random.bernoulli(keys[2], 1 - self.label_dropout, (count,)), "batch")
            how: dict[str, Any] = {"counts": conditional, "train": True, "rng": keys[3]}
            found, stats = errors(params, stats, batch, share, noise, **how)
            return found["loss"][0], Aux(found["loss"][1], found, stats)

        def metrics(params: Params, stats: Params, batch: Batch) -> Sums:
            share = uniform_of(batch[image], ())
            noise = noise_of(batch[image], math.prod(shape)).reshape(-1, *shape)
            return errors(params, stats, batch, share, noise, counts=jnp.ones(len(share), bool))[0]

        @functools.partial(jax.jit, static_argnames=("count", "kept"))
        def drawn(params: Params, stats: Params, count: int, seed: Any, given: Any, kept: bool) -> jax.Array:
            start, key = jax.random.split(jax.random.key(seed))
            both = {name: jnp.concatenate([x, x]) for name, x in given.items()}

            def rule(x: jax.Array, times: jax.Array, counts: jax.Array) -> jax.Array:
                return predict(params, stats, x, times, given if x.shape[0] == count else both, counts)[0]

            predicted = guided(rule, self.guidance)
            x = jax.random.normal(start, (count, *shape))
            found = process.sample(predicted, x, key, self.sample_steps, self.eta, kept)
            if kept:
                found = jnp.concatenate([x[None], found])
            return jnp.clip((found + 1) / 2, 0, 1)

        def conditions(count: int, given: Mapping[str, jax.Array] | None) -> Mapping[str, jax.Array]:
            if by_text and given is None:
                nothing = jnp.zeros((count, 1), jnp.int32)
                return {"tokens": nothing, "segment_ids": nothing}
            if given is None and classes:
                turn = jnp.array(self.draw or range(classes))
                return {"labels": turn[jnp.arange(count) % len(turn)]}
            return given or {}

        def samples(params: Params, stats: Params, count: int = SAMPLES, seed: Any = 0, given: Any = None) -> jax.Array:
            return drawn(params, stats, count, seed, conditions(count, given), kept=False)

        def path(params: Params, stats: Params, count: int, seed: Any = 0, given: Any = None) -> jax.Array:
            return drawn(params, stats, count, seed, conditions(count, given), kept=True)

        if by_text:
            label = BatchField((), optional=True, usual=True)
            segments = tokens(data, optional=True, usual=True)
            given = {"tokens": tokens(data, vocabulary), "segment_ids": segments, "labels": label}
        else:
            given = {"labels": BatchField((), below=classes) if classes else BatchField(None, optional=True)}
        return Task(
            {"model": model},
            (Loss("loss", "model", loss),),
            metrics,
            {image: numbers(shape), **given},
            needs="an image, with a label of 0 or above if it has one",
            samples=samples,
            path=path,
            asks=("tokens", "segment_ids") if by_text else ("labels",) if classes else (),
        )


def check_denoiser(model: Model) -> tuple[tuple[int, ...], int, int]:
    """Return the shape of a denoising network's images, the number of its classes, and that of its tokens.

    Raises:
        UserError: the model is none: its `apply(params, images, times, labels)` does not give what has the images'
            shape.
    """
    given, config = model.inputs(1), model.config
    if [len(x.shape) for x in given[:2]] == [4, 1] and len(given) == 3:
        zeros = [jnp.zeros(x.shape, x.dtype) for x in given]
        outputs = jax.eval_shape(lambda params: model.apply(params, *zeros), model.shapes())
        if getattr(outputs, "shape", ()) == given[0].shape:
            return given[0].shape[1:], getattr(config, "classes", 0), getattr(config, "vocab_size", 0)
    raise UserError(
        f"got task diffusion with {type(config).__name__}, expected a network that gives what has the shape of its "
        "images for images, times and labels or tokens, try --model dit-s2 or another --task"
    )
