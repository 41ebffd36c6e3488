"""Schedules: how the learning rate comes down after its warm-up."""

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
    """The learning rate after the warm-up, as a share of its peak."""

    @abstractmethod
    def share(self, step: Any, first: int, last: int) -> Any:
        """The share of the peak that a step has, float32.

        Shapes: `step` is a float32 scalar, traced or not, counted from 0; the warm-up has reached the peak at step
        `first`, and `last` is the run's last step, which may come before `first`.
        """


@dataclass(frozen=True)
class Constant(ScheduleConfig):
    """The peak until the end."""

    def share(self, step: Any, first: int, last: int) -> Any:
        return jnp.float32(1)


@dataclass(frozen=True)
class _Falling(ScheduleConfig):
    """A schedule that ends below the peak."""

    final_lr_fraction: Share = 0.1
    """Learning rate of the last step as a share of the peak."""


@dataclass(frozen=True)
class Cosine(_Falling):
    """Half a period of a cosine, from the peak to the final rate (Loshchilov & Hutter 2017)."""

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
    """Warm-up, stable, decay: the peak, then a straight line over the last steps (MiniCPM; Hu et al. 2024)."""

    decay_fraction: Annotated[float, Range(above=0, most=1)] = 0.2
    """Share of the run's steps, the last ones, over which the rate comes down."""

    def share(self, step: Any, first: int, last: int) -> Any:
        begin = max(last - round((last + 1) * self.decay_fraction), first)
        return 1 - (1 - self.final_lr_fraction) * done(step, begin, last)


def done(step: Any, first: int, last: int) -> Any:
    """How much of the way from one step to another is done at `step`, in [0, 1]."""
    if last > first:
        return jnp.clip((step - first) / (last - first), 0.0, 1.0)
    # no step is left to come down over
    return (step >= last) * jnp.float32(last == first > 0)
