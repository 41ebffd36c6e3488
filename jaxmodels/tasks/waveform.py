"""Sounds, sample by sample: predict each from those before it."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.data.contract import BatchField
from jaxmodels.data.opening import Opening
from jaxmodels.data.section import DataConfig
from jaxmodels.data.source import Source
from jaxmodels.data.waves import LEVELS, SILENCE, open_waves
from jaxmodels.errors import UserError
from jaxmodels.fields import Natural, Range
from jaxmodels.models.model import Model
from jaxmodels.tasks.losses import cross_entropy
from jaxmodels.tasks.task import (
    Aux,
    Batch,
    Loss,
    Params,
    Sounds,
    Sums,
    Task,
    TaskConfig,
    Totals,
    counted,
    divide,
    forward,
    tokens,
)


@dataclass(frozen=True)
class Waveform(TaskConfig):
    """Train a model of sounds on µ-law codes of 8 bits: `codes` (B, T), and `targets` (B, T), the codes that follow.

    `label_condition` and `group_condition` (B,) are the conditions of each sound.
    """

    rate: Annotated[int, Range(100, 1_000_000)] = 8000
    """Samples a second; sounds of another rate are resampled."""
    conditions: tuple[Literal["label", "group"], ...] = ()
    """What the model is conditioned on: a sound's `data.label_field`, its `data.group_field`, or both."""
    context: Natural = 512
    """Samples at the beginning of a window of evaluation that do not count, because the model does not see all that is
    before them. They count at the beginning of a sound."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.conditions)) < len(self.conditions):
            raise UserError(f"got task.conditions {' '.join(self.conditions)}, expected each once")

    def examples(self, opening: Opening) -> Source:
        return open_waves(opening, self.rate, self.conditions, self.context)

    def build(self, model: Model, data: DataConfig) -> Task:
        levels = check_model(model, self.conditions)
        check_context(model, self.context)

        def scores(params: Params, stats: Params, batch: Batch, **how: Any) -> tuple[Any, Params]:
            given = [batch[f"{name}_condition"] for name in self.conditions]
            given = [jnp.stack(given, -1)] if given else []
            logits, stats = forward(("model", model), params, stats, batch["codes"], *given, **how)
            return cross_entropy(logits, counted(batch, batch["targets"])), stats

        def loss(params: Params, stats: Params, batch: Batch, rng: jax.Array, step: Any = 0) -> tuple[jax.Array, Aux]:
            s, stats = scores(params, stats, batch, train=True, rng=rng)
            return s.loss, Aux(s.count, {"loss": (s.loss, s.count), "accuracy": (s.correct, s.count)}, stats)

        def metrics(params: Params, stats: Params, batch: Batch) -> Sums:
            s, _ = scores(params, stats, batch)
            return {"loss": (s.loss, s.count), "accuracy": (s.correct, s.count)}

        def summarize(totals: Totals, classes: Any = ()) -> dict[str, float]:
            values = divide(totals)
            return {**values, "bits": values["loss"] / math.log(2)} if "loss" in values else values

        codes = tokens(data, levels)
        conditions = tuple(zip(self.conditions, model.config.conditions, strict=True))
        own = {f"{name}_condition": BatchField((), np.int32, below=count) for name, count in conditions}
        return Task(
            {"model": model},
            (Loss("loss", "model", loss),),
            metrics,
            {"codes": codes, "targets": codes, **own},
            unit="tokens",
            needs="a sample of a sound",
            summarize=summarize,
            better={"accuracy": "max", "bits": "min"},
            sounds=Sounds(functools.partial(draw, model), self.rate, conditions),
        )


def check_model(model: Model, conditions: tuple[str, ...]) -> int:
    """Return how many levels a model of sounds has.

    Raises:
        UserError: the model is none, has fewer levels than the codes, or other conditions than the task.
    """
    given = model.inputs(1)
    whole = all(np.issubdtype(x.dtype, np.integer) for x in given)
    shape: Any = None
    if whole and given[0].ndim == 2 and len(given) in (1, 2) and not jax.eval_shape(model.stats):
        shape = jax.eval_shape(model.apply, model.shapes(), *given).shape
    if shape is None or len(shape) != 3 or not hasattr(model.config, "conditions"):
        raise UserError(
            f"got task waveform with {type(model.config).__name__}, expected a model of sounds, try --model wavenet"
        )
    if shape[-1] < LEVELS:
        raise UserError(f"got a model of {shape[-1]} levels, expected {LEVELS}, try --model.levels {LEVELS}")
    if len(model.config.conditions) != len(conditions):
        own = " ".join(map(str, model.config.conditions)) or "none"
        raise UserError(
            f"got model.conditions {own} and task.conditions {' '.join(conditions) or 'none'}, expected one number "
            "of values for each condition, try --task.conditions label --model.conditions 10"
        )
    return shape[-1]


def check_context(model: Model, context: int) -> None:
    """Refuse a context in evaluation that is shorter than what the model sees."""
    reach = getattr(model.config, "reach", 0)
    if context < reach - 1:
        raise UserError(
            f"got task.context {context} for a model that sees {reach} samples, expected at least {reach - 1}, "
            f"try --task.context {reach - 1}"
        )


def draw(
    model: Model,
    params: Params,
    conditions: Any = None,
    *,
    count: int = 1,
    length: int = 8000,
    temperature: float = 1.0,
    seed: int = 0,
) -> jax.Array:
    """Draw sounds sample by sample, each row by a key of its own: codes (B, length) in int32.

    `conditions` are (B, C); without them there are `count` rows. Temperature 0 takes the likeliest code each time.
    """
    rows = count if conditions is None else len(conditions)
    given = () if conditions is None else (jnp.asarray(conditions, jnp.int32),)
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(rows))

    def step(carry: Any, at: jax.Array) -> tuple[Any, jax.Array]:
        cache, last = carry
        logits, cache = model.apply(params["model"], last[:, None], *given, cache=cache)
        logits = logits[:, 0, :LEVELS]
        if temperature == 0:
            code = logits.argmax(-1)
        else:
            own = jax.vmap(jax.random.fold_in, (0, None))(keys, at)
            code = jax.vmap(jax.random.categorical)(own, logits / temperature)
        code = code.astype(jnp.int32)
        return (cache, code), code

    start = (model.cache(rows, length), jnp.full((rows,), SILENCE, jnp.int32))
    _, codes = jax.lax.scan(step, start, jnp.arange(length))
    return codes.T
