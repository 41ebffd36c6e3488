"""The optimizer of an experiment, from Optax's parts."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

from jaxmodels.fields import Dropped, Natural, Positive, Range, Section, Weight
from jaxmodels.registry import Registry
from jaxmodels.train import groups
from jaxmodels.train.adafactor import scale_by_adafactor
from jaxmodels.train.schedules import Cosine, ScheduleConfig

OPTIMIZERS = Registry(
    "optimizer",
    "jaxmodels.optimizers",
    {
        "adamw": "jaxmodels.train.optim:AdamW",
        "adam": "jaxmodels.train.optim:Adam",
        "sgd": "jaxmodels.train.optim:SGD",
        "momentum": "jaxmodels.train.optim:Momentum",
        "rmsprop": "jaxmodels.train.optim:RMSprop",
        "adafactor": "jaxmodels.train.optim:Adafactor",
        "lion": "jaxmodels.train.optim:Lion",
        "muon": "jaxmodels.train.optim:Muon",
    },
)


@dataclass(frozen=True)
class OptimConfig(Section, section="optim", kinds=OPTIMIZERS):
    """How the loss is minimized (Optax)."""

    peak_lr: Weight = 1e-3
    """Learning rate after the warm-up."""
    warmup_steps: Natural = 0
    """Steps of linear warm-up from 0: the first has 1 / warmup_steps of the peak, the last of them the peak."""
    schedule: ScheduleConfig = Cosine()
    """How the learning rate comes down after the warm-up."""
    clip_norm: Positive | None = 1.0
    """Largest global norm of the gradient; None: no clipping."""
    freeze: tuple[str, ...] = ()
    """Patterns of parameters that stay as they are: embed/*, layers/*, layers[:6]/* (the first six of a stack)."""
    layer_decay: Annotated[float, Range(above=0, most=1)] = 1.0
    """Factor of the learning rate from each layer to the one below it (ELECTRA; Clark et al. 2020)."""
    offload: bool = False
    """Keep the optimizer's state in the hosts' memory; it comes to the devices for the update alone."""

    @abstractmethod
    def rule(self, axes: Any) -> optax.GradientTransformation:
        """The update rule, without learning rate, clipping and decay, for params with these logical axes.

        Its updates point along the gradient: the learning rate turns them round.
        """

    def decay(self, axes: Any) -> optax.GradientTransformation:
        """What is added to the rule's updates to make the parameters smaller."""
        return optax.identity()

    def rate(self, steps: int) -> optax.Schedule:
        """The learning rate of each step of a run, counted from 0.

        Step k of W steps of warm-up has (k + 1) / W of the peak: the line begins at 0 one step before the run, so that
        no step is without effect. The first step after the warm-up has the peak, the last one of the run the
        schedule's final share of it; the only step of a run of one has the peak.
        """
        warmup = self.warmup_steps

        def of(step: Any) -> Any:
            at = jnp.asarray(step, jnp.float32)
            share = jnp.minimum((at + 1) / warmup, 1.0) if warmup else jnp.float32(1)
            return self.peak_lr * (share * self.schedule.share(at, warmup, steps - 1))

        return of

    def build(self, steps: int, axes: Any, shapes: Any = None, updates: int = 1) -> optax.GradientTransformation:
        """Clip, update rule, weight decay, learning rate; for params with these logical axes.

        `shapes` are the params' as `jax.ShapeDtypeStruct`s, of use where layers are frozen or learn at rates of their
        own. `updates`: those of a step, which all have the step's learning rate.
        """
        rate: Any = self.rate(steps)
        parts = [
            optax.clip_by_global_norm(self.clip_norm) if self.clip_norm else optax.identity(),
            self.rule(axes),
            self.decay(axes),
            optax.scale_by_learning_rate(lambda count: rate(jnp.asarray(count) // updates)),
        ]
        scales = None if shapes is None else groups.factors(self.freeze, self.layer_decay, shapes, axes)
        if scales is None:
            return optax.chain(*parts)
        # what is frozen adds nothing to the norm that is clipped, and its gradient is never computed
        return optax.chain(scaled(jax.tree.map(np.sign, scales)), *parts, scaled(scales))


@dataclass(frozen=True)
class DecayedConfig(OptimConfig):
    """An optimizer with decoupled weight decay (Loshchilov & Hutter 2019)."""

    weight_decay: Weight = 0.1
    """Decoupled weight decay."""
    decay_on: tuple[Literal["matrix", "embedding", "bias", "norm"], ...] = ("matrix", "embedding")
    """Kinds of parameter that are decayed."""

    def decay(self, axes: Any) -> optax.GradientTransformation:
        mask = jax.tree.map(lambda kind: kind in self.decay_on, groups.kinds(axes))
        return optax.add_decayed_weights(self.weight_decay, mask) if self.weight_decay else optax.identity()


@dataclass(frozen=True)
class Adam(OptimConfig):
    """Adam without weight decay (Kingma & Ba 2015)."""

    b1: Dropped = 0.9
    """First-moment decay."""
    b2: Dropped = 0.95
    """Second-moment decay."""
    eps: Positive = 1e-8
    """Added to the denominator."""

    def rule(self, axes: Any) -> optax.GradientTransformation:
        return optax.scale_by_adam(self.b1, self.b2, self.eps)


@dataclass(frozen=True)
class AdamW(DecayedConfig, Adam):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019)."""


@dataclass(frozen=True)
class SGD(DecayedConfig):
    """The gradient itself."""

    def rule(self, axes: Any) -> optax.GradientTransformation:
        return optax.identity()


@dataclass(frozen=True)
class Momentum(DecayedConfig):
    """A decaying sum of gradients (Polyak 1964)."""

    b1: Dropped = 0.9
    """Decay of the sum."""

    def rule(self, axes: Any) -> optax.GradientTransformation:
        return optax.trace(self.b1)


@dataclass(frozen=True)
class RMSprop(DecayedConfig):
    """Gradients divided by the root of their mean square (Hinton 2012)."""

    b2: Dropped = 0.95
    """Decay of the mean square."""
    eps: Positive = 1e-8
    """Added to the denominator."""

    def rule(self, axes: Any) -> optax.GradientTransformation:
        return optax.scale_by_rms(self.b2, self.eps, eps_in_sqrt=False)


@dataclass(frozen=True)
class Adafactor(DecayedConfig):
    """Second moments kept by row and column, without momentum (Shazeer & Stern 2018)."""

    def rule(self, axes: Any) -> optax.GradientTransformation:
        return scale_by_adafactor(axes)


@dataclass(frozen=True)
class Lion(DecayedConfig):
    """The sign of a blend of gradient and momentum (Chen et al. 2023)."""

    b1: Dropped = 0.9
    """Share of the momentum in the blend."""
    b2: Dropped = 0.95
    """Decay of the momentum."""

    def rule(self, axes: Any) -> optax.GradientTransformation:
        return optax.scale_by_lion(self.b1, self.b2)


@dataclass(frozen=True)
class Muon(DecayedConfig):
    """Momentum made orthogonal for matrices, Adam for all else.

    Source: Jordan et al. 2024; updates are scaled to Adam's size (Liu et al. 2025).
    """

    b1: Dropped = 0.9
    """Decay of the momentum, and Adam's first-moment decay."""
    b2: Dropped = 0.95
    """Adam's second-moment decay."""
    eps: Positive = 1e-8
    """Added to the denominator."""

    def rule(self, axes: Any) -> optax.GradientTransformation:
        muon = contrib.muon(
            1.0,
            beta=self.b1,
            eps=self.eps,
            adam_b1=self.b1,
            adam_b2=self.b2,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=groups.matrices(axes, "matrix"),
        )
        return optax.chain(muon, optax.scale(-1.0))


def scaled(factors: Any) -> optax.GradientTransformation:
    """Updates times factors."""

    def scale(update: jax.Array, factor: Any) -> jax.Array:
        return update * factor.astype(update.dtype) if factor.any() else jnp.zeros_like(update)

    def each(updates: Any, _: Any) -> Any:
        return jax.tree.map(scale, updates, factors)

    return optax.stateless(each)
