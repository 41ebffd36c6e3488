"""Quantization with a factor for each input, which moves what is large between weights and inputs: AWQ and SmoothQuant.

x · w = (x / s) · (s · w): the codes are of s · w, and the parameter holds the factors 1 / s, where the published codes
fold them into the layer before. Dims: I inputs and O outputs of a matrix, N groups of inputs that share a scale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxmodels.compress.codes import Spec, assemble, grid, nearest, scale_shape
from jaxmodels.compress.coding import Quantized
from jaxmodels.compress.rounding import FLAT, Codes, CodesConfig
from jaxmodels.errors import UserError
from jaxmodels.fields import Range, Share
from jaxmodels.models.coded import Activations
from jaxmodels.models.observed import Sums
from jaxmodels.models.parameters import Axes

Array = jax.Array
LEAST = 1e-4
"""The least factor, as in AWQ's published code."""


class Scaled(NamedTuple):
    """A matrix in codes, each input of which was multiplied by a factor before."""

    codes: Codes
    factors: Array
    """(I,): what undoes it."""
    step: Array
    """(): the scale of its inputs in static int8, behind the factors."""

    @property
    def values(self) -> Array:
        """The numbers (I, O) that they stand for."""
        return self.codes.values * self.factors[:, None]


def rounded(w: Array, by: Array, spec: Spec, peak: Array) -> Scaled:
    """Return a matrix (I, O) times `by` (I,) in the nearest codes; `peak` (I,) are its inputs' largest magnitudes."""
    scaled = w * by[:, None]
    scales, zeros = grid(scaled, FLAT, spec)
    codes = Codes(nearest(scaled, scales, zeros, spec.kind), scales, zeros)
    largest = (peak / by).max()
    return Scaled(codes, 1 / by, jnp.where(largest > 0, largest, 1) / 127)


@dataclass(frozen=True)
class FactorsConfig(CodesConfig):
    """What methods with a factor for each input have in common."""

    def leaf(self, axes: Axes, shape: tuple[int, ...], w: Array, parts: Sequence[Any]) -> Any:
        own, spec = jax.tree.map(lambda *each: jnp.stack(each), *parts), self.spec
        held = scale_shape(shape, axes, spec)
        zeros = None if own.codes.zeros is None else own.codes.zeros.reshape(held)
        factors = own.factors if spec.factors else None
        step = own.step if spec.activations == "static" else None
        return assemble(
            own.codes.codes.reshape(shape), own.codes.scales.reshape(held), zeros, axes, spec, factors, step
        )


@dataclass(frozen=True)
class AWQ(FactorsConfig):
    """Large inputs get finer codes, by those factors of a grid that do least to the outputs (Lin et al. 2023).

    Factors are the inputs' mean magnitudes to a power from 0 to 1, chosen for each matrix by itself.
    """

    codes: Literal["int8", "int4"] = "int4"
    """Type of the codes; of int4 two share a byte."""
    group: Annotated[int, Range(2, 2**20)] | None = None
    """Inputs that share a scale, such as 32, 64 or 128. None: all inputs of an output."""
    symmetric: bool = True
    """Whether the codes lie around 0; otherwise they have a zero point beside each scale."""
    powers: Annotated[int, Range(1, 1000)] = 20
    """How many powers are tried."""

    asks: ClassVar = "pairs"

    @property
    def section(self) -> Quantized:
        return Quantized(self.codes, self.group, self.symmetric, targets=self.targets, kept=self.kept, factors=True)

    def change(self, w: Array, sums: Sums | None) -> tuple[Array, Any]:
        assert sums is not None
        size = sums.size / jnp.maximum(sums.count, 1)
        best, least = None, math.inf
        for power in (i / self.powers for i in range(self.powers)):
            by = jnp.maximum(size**power, LEAST)
            made = rounded(w, by / jnp.sqrt(by.max() * by.min()), self.spec, sums.peak)
            off = made.values - w
            error = float((off * (sums.gram @ off)).sum())
            if error < least:
                best, least = made, error
        if best is None:
            raise UserError("got weights or inputs that are not finite, expected numbers, try another checkpoint")
        return best.values, best


@dataclass(frozen=True)
class SmoothQuant(FactorsConfig):
    """Weights and inputs in int8, after outliers of inputs have been moved into the weights (Xiao et al. 2022)."""

    power: Share | None = 0.5
    """Factors are max |x| to this power, over max |w| to what it lacks of 1. None: no factors."""
    activations: Activations = "dynamic"
    """dynamic: a scale for each row of inputs, found as it comes; static: one, of the largest that was measured."""

    asks: ClassVar = "sums"

    @property
    def section(self) -> Quantized:
        factors = self.power is not None
        return Quantized("int8", targets=self.targets, kept=self.kept, factors=factors, activations=self.activations)

    def fits(self, name: str, axes: Axes, inputs: int, outputs: int) -> str:
        return f"{name}, the weights of a convolution, for int8 activations" if "window" in axes else ""

    def change(self, w: Array, sums: Sums | None) -> tuple[Array, Any]:
        assert sums is not None
        by = jnp.ones(len(w))
        if self.power is not None:
            by = sums.peak**self.power / jnp.maximum(jnp.abs(w).max(1), 1e-5) ** (1 - self.power)
            by = jnp.where(sums.peak > 0, jnp.maximum(by, 1e-5), 1)
        made = rounded(w, by, self.spec, sums.peak)
        return made.values, made
