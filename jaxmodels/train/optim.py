"""Optimizers, built from Optax's transformations."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

from jaxmodels.errors import UserError
from jaxmodels.fields import Dropped, Natural, Positive, Range, Section, Weight, described
from jaxmodels.registry import Registry, named, outside
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
    """Steps of linear warm-up from 0. The first has 1 / warmup_steps of the peak, the last one the whole peak."""
    schedule: ScheduleConfig = Cosine()
    """How the learning rate decays after the warm-up."""
    clip_norm: Positive | None = 1.0
    """Largest global norm of the gradient, above which it is scaled down. None: no clipping."""
    freeze: tuple[str, ...] = ()
    """Patterns of parameters that are not trained: embed/*, layers/*, layers[:6]/* (the first six of a stack)."""
    layer_decay: Annotated[float, Range(above=0, most=1)] = 1.0
    """Factor between the learning rate of each layer and that of the layer below it (ELECTRA; Clark et al. 2020)."""
    offload: bool = False
    """Keep the optimizer's state in host memory, and copy it to the devices only for the update."""

    @abstractmethod
    def rule(self, axes: Any) -> optax.GradientTransformation:
        """Build the update rule, without learning rate, clipping and decay, for params with these logical axes.

        The rule's updates point along the gradient; the learning rate reverses their sign.
        """

    def decay(self, axes: Any) -> optax.GradientTransformation:
        """Build what is added to the rule's updates so that the parameters decay."""
        return optax.identity()

    def rate(self, steps: int) -> optax.Schedule:
        """Return the schedule of the learning rate over a run's steps, counted from 0.

        Step k of W warm-up steps has (k + 1) / W of the peak: the line starts from 0 one step before the run, so that
        no step has a learning rate of 0. The first step after the warm-up has the peak, and the run's last step has the
        schedule's final share of it. A run of a single step has the peak.

        Raises:
            UserError: the schedule's share is no number from 0 to 1, or branches on the step.
        """
        warmup = self.warmup_steps

        def share(at: Any) -> Any:
            try:
                found = self.schedule.share(at, warmup, steps - 1)
            except jax.errors.JAXTypeError as error:
                raise UserError(
                    f"got schedule {named(type(self.schedule))}, whose share asks for the value of a step that is "
                    "traced, expected operations on arrays, try jnp.where(step < 100, a, b) in place of if"
                ) from error
            if not isinstance(found, jax.Array | np.ndarray | np.number | int | float) or jnp.shape(found):
                raise UserError(
                    f"got schedule {named(type(self.schedule))}, whose share gives {described(found)}, expected a "
                    "single number, the fraction of the peak at this step"
                )
            return found

        def of(step: Any) -> Any:
            at = jnp.asarray(step, jnp.float32)
            warm = jnp.minimum((at + 1) / warmup, 1.0) if warmup else jnp.float32(1)
            return self.peak_lr * (warm * share(at))

        jax.eval_shape(share, jax.ShapeDtypeStruct((), jnp.float32))
        last = steps - 1
        for step in sorted({0, warmup, (warmup + last) // 2, last}) if outside(self.schedule) else ():
            if step <= last and not 0 <= (found := float(share(jnp.float32(step)))) <= 1 + 1e-6:
                raise UserError(
                    f"got schedule {named(type(self.schedule))}, whose share gives {found:g} at step {step} with "
                    f"{warmup} steps of warm-up, expected a fraction of the peak, from 0 to 1"
                )
        return of

    def build(self, steps: int, axes: Any, shapes: Any = None, updates: int = 1) -> optax.GradientTransformation:
        """Chain clipping, update rule, weight decay and learning rate, for params with these logical axes.

        `shapes` are the params as `jax.ShapeDtypeStruct`s, needed where layers are frozen or have learning rates of
        their own. `updates` is the number of updates in a step; all of them have the step's learning rate.

        Raises:
            UserError: the rule, the decay or the schedule gives something else. For updates and states of other shapes,
                when the transformation is traced.
        """
        rate: Any = self.rate(steps)
        parts = [
            optax.clip_by_global_norm(self.clip_norm) if self.clip_norm else optax.identity(),
            self._checked("rule", self.rule(axes), axes),
            self._checked("decay", self.decay(axes), axes),
            optax.scale_by_learning_rate(lambda count: rate(jnp.asarray(count) // updates)),
        ]
        scales = None if shapes is None else groups.factors(self.freeze, self.layer_decay, shapes, axes)
        if scales is None:
            return optax.chain(*parts)
            # frozen parameters add nothing to the norm that is clipped, and their gradients are never computed
        return optax.chain(scaled(jax.tree.map(np.sign, scales)), *parts, scaled(scales))

    def _checked(self, method: str, made: Any, axes: Any) -> optax.GradientTransformation:
        """Return a transformation that refuses updates and states of other shapes when it is traced."""
        what = f"optimizer {named(type(self))}, whose {method}"
        if not callable(getattr(made, "init", None)) or not callable(getattr(made, "update", None)):
            raise UserError(f"got {what} gives {described(made)}, expected an optax.GradientTransformation")
        if method == "rule" and outside(self) and _ascends(made, axes):
            raise UserError(
                f"got {what} gives updates against the gradient, expected them along it, since the learning rate "
                "reverses their sign, try optax.scale_by_adam() and not optax.adam(…), or optax.scale(-1.0) behind it"
            )

        def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
            found = made.update(updates, state, params)
            if not isinstance(found, tuple) or len(found) != 2:
                raise UserError(f"got {what} gives {described(found)} as an update, expected (updates, state)")
            for name, given, new in (("updates", updates, found[0]), ("a state", state, found[1])):
                if wrong := _differ(given, new):
                    raise UserError(f"got {what} gives {name} with {wrong}")
            return found

        return optax.GradientTransformation(made.init, update)


@dataclass(frozen=True)
class DecayedConfig(OptimConfig):
    """An optimizer with decoupled weight decay (Loshchilov & Hutter 2019)."""

    weight_decay: Weight = 0.1
    """Decoupled weight decay."""
    decay_on: tuple[Literal["matrix", "embedding", "bias", "norm"], ...] = ("matrix", "embedding")
    """Kinds of parameters that decay."""

    def decay(self, axes: Any) -> optax.GradientTransformation:
        mask = jax.tree.map(lambda kind: kind in self.decay_on, groups.kinds(axes))
        return optax.add_decayed_weights(self.weight_decay, mask) if self.weight_decay else optax.identity()


@dataclass(frozen=True)
class Adam(OptimConfig):
    """Adam without weight decay (Kingma & Ba 2015)."""

    b1: Dropped = 0.9
    """Decay rate of the first moment."""
    b2: Dropped = 0.95
    """Decay rate of the second moment."""
    eps: Positive = 1e-8
    """Added to the denominator."""

    def rule(self, axes: Any) -> optax.GradientTransformation:
        return optax.scale_by_adam(self.b1, self.b2, self.eps)


@dataclass(frozen=True)
class AdamW(DecayedConfig, Adam):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019)."""


@dataclass(frozen=True)
class SGD(DecayedConfig):
    """Plain stochastic gradient descent."""

    def rule(self, axes: Any) -> optax.GradientTransformation:
        return optax.identity()


@dataclass(frozen=True)
class Momentum(DecayedConfig):
    """SGD with momentum: a decaying sum of gradients (Polyak 1964)."""

    b1: Dropped = 0.9
    """Decay rate of the momentum."""

    def rule(self, axes: Any) -> optax.GradientTransformation:
        return optax.trace(self.b1)


@dataclass(frozen=True)
class RMSprop(DecayedConfig):
    """Gradients divided by the root of their running mean square (Hinton 2012)."""

    b2: Dropped = 0.95
    """Decay rate of the mean square."""
    eps: Positive = 1e-8
    """Added to the denominator."""

    def rule(self, axes: Any) -> optax.GradientTransformation:
        return optax.scale_by_rms(self.b2, self.eps, eps_in_sqrt=False)


@dataclass(frozen=True)
class Adafactor(DecayedConfig):
    """Second moments factored into rows and columns, without momentum (Shazeer & Stern 2018)."""

    def rule(self, axes: Any) -> optax.GradientTransformation:
        return scale_by_adafactor(axes)


@dataclass(frozen=True)
class Lion(DecayedConfig):
    """The sign of a mixture of gradient and momentum (Chen et al. 2023)."""

    b1: Dropped = 0.9
    """Weight of the momentum in the mixture."""
    b2: Dropped = 0.95
    """Decay rate of the momentum."""

    def rule(self, axes: Any) -> optax.GradientTransformation:
        return optax.scale_by_lion(self.b1, self.b2)


@dataclass(frozen=True)
class Muon(DecayedConfig):
    """Orthogonalized momentum for matrices, Adam for all other parameters.

    Source: Jordan et al. 2024, with updates scaled to the size of Adam's (Liu et al. 2025).
    """

    b1: Dropped = 0.9
    """Decay rate of the momentum, and of Adam's first moment."""
    b2: Dropped = 0.95
    """Decay rate of Adam's second moment."""
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
    """Multiply updates by constant factors."""

    def scale(update: jax.Array, factor: Any) -> jax.Array:
        return update * factor.astype(update.dtype) if factor.any() else jnp.zeros_like(update)

    def each(updates: Any, _: Any) -> Any:
        return jax.tree.map(scale, updates, factors)

    return optax.stateless(each)


def _ascends(rule: Any, axes: Any) -> bool:
    """Whether a rule's first updates of small parameters point against their gradient."""
    gradient = jax.tree.map(
        lambda names: 1.0 + jnp.arange(2.0 ** len(names)).reshape((2,) * len(names)),
        axes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    try:
        updates, _ = rule.update(gradient, rule.init(gradient), gradient)
        return sum(float(x) for x in jax.tree.leaves(jax.tree.map(jnp.vdot, updates, gradient))) < 0
    except Exception:  # a rule may know the sizes of its parameters; what is wrong with it is told when it is traced
        return False


def _differ(given: Any, new: Any) -> str:
    """Say where a tree of arrays has other shapes than the one given; empty if nowhere."""
    before, after = ({path: jnp.shape(x) for path, x in jax.tree.leaves_with_path(tree)} for tree in (given, new))
    for path in [*before, *after]:
        if before.get(path) != after.get(path):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            was, now = (f"shape {x[path]}" if path in x else "nothing" for x in (before, after))
            return f"{now} as {name or 'array'}, expected {was}"
    return ""
