"""Schedules: how the learning rate decays after its warm-up."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated, Any

import jax.numpy as jnp

from jaxmodels.fields import Range, Section, Share
from jaxmodels.registry import Registry

SCHEDULES = Registry(
    "schedule",
    "jaxmodels.schedules",
    {
        "cosine": "jaxmodels.train.schedules:Cosine",
        "linear": "jaxmodels.train.schedules:Linear",
        "constant": "jaxmodels.train.schedules:Constant",
        "wsd": "jaxmodels.train.schedules:WSD",
    },
)


@dataclass(frozen=True)
class ScheduleConfig(Section, section="optim.schedule", kinds=SCHEDULES):
    """The learning rate after the warm-up, as a fraction of its peak."""

    @abstractmethod
    def share(self, step: Any, first: int, last: int) -> Any:
        """Return the fraction of the peak at a step, float32.

        Shapes: `step` is a float32 scalar, traced or not, counted from 0. The warm-up reaches the peak at step `first`;
        `last` is the run's last step, which may come before `first`.
        """


@dataclass(frozen=True)
class Constant(ScheduleConfig):
    """Stay at the peak until the end."""

    def share(self, step: Any, first: int, last: int) -> Any:
        return jnp.float32(1)


@dataclass(frozen=True)
class _Falling(ScheduleConfig):
    """A schedule that ends below the peak."""

    final_lr_fraction: Share = 0.1
    """Learning rate of the last step, as a fraction of the peak."""


@dataclass(frozen=True)
class Cosine(_Falling):
    """Half a cosine period from the peak to the final rate (Loshchilov & Hutter 2017)."""

    def share(self, step: Any, first: int, last: int) -> Any:
        final = self.final_lr_fraction
        return final + (1 - final) * 0.5 * (1 + jnp.cos(math.pi * done(step, first, last)))


@dataclass(frozen=True)
class Linear(_Falling):
    """A straight line from the peak to the final rate."""

    def share(self, step: Any, first: int, last: int) -> Any:
        return 1 - (1 - self.final_lr_fraction) * done(step, first, last)


@dataclass(frozen=True)
class WSD(_Falling):
    """Warm-up, stable, decay: the peak, then a straight line down over the last steps (MiniCPM; Hu et al. 2024)."""

    decay_fraction: Annotated[float, Range(above=0, most=1)] = 0.2
    """Fraction of the run's steps, at its end, over which the rate decays."""

    def share(self, step: Any, first: int, last: int) -> Any:
        begin = max(last - round((last + 1) * self.decay_fraction), first)
        return 1 - (1 - self.final_lr_fraction) * done(step, begin, last)


def done(step: Any, first: int, last: int) -> Any:
    """Return how much of the way from step `first` to step `last` is done at `step`, in [0, 1]."""
    if last > first:
        return jnp.clip((step - first) / (last - first), 0.0, 1.0)
    # no step is left to decay over
    return (step >= last) * jnp.float32(last == first > 0)
