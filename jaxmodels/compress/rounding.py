"""Quantization after training: round-to-nearest, and GPTQ, whose codes make up for each other's errors.

Dims: I inputs and O outputs of a matrix, N groups of inputs that share a scale.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxmodels.compress.codes import RANGES, Spec, assemble, grid, nearest, scale_shape, spread
from jaxmodels.compress.coding import Quantized
from jaxmodels.compress.methods import MatrixMethod, Work
from jaxmodels.compress.sweep import BLOCK, sweep
from jaxmodels.config import Config
from jaxmodels.errors import UserError
from jaxmodels.fields import Positive, Range
from jaxmodels.models.observed import Sums
from jaxmodels.models.parameters import Axes

Array = jax.Array
FLAT = Axes(("embed", "mlp"), "matrix")
"""Logical axes of a matrix (I, O)."""


@dataclass(frozen=True)
class CodesConfig(MatrixMethod):
    """What methods of quantization have in common."""

    @property
    @abstractmethod
    def section(self) -> Quantized:
        """The section `compress` of a run whose matrices are all coded so."""

    @property
    def spec(self) -> Spec:
        return self.section.spec

    def changed(self, config: Config, left: Sequence[str] = ()) -> Config:
        kept = (*self.kept, *(name.partition("/")[2].removesuffix("/w") for name in left))
        return dataclasses.replace(config, compress=dataclasses.replace(self.section, kept=kept))

    def check(self, work: Work) -> None:
        super().check(work)
        try:
            self.section.specs(work.task.networks)
        except UserError as error:  # options have no section here
            raise UserError(str(error).replace("--compress.", "--")) from None


@dataclass(frozen=True)
class RoundingConfig(CodesConfig):
    """Which codes stand for the weights."""

    codes: Literal["int8", "int4"] = "int8"
    """Type of the codes; of int4 two share a byte."""
    group: Annotated[int, Range(2, 2**20)] | None = None
    """Inputs that share a scale, such as 32, 64 or 128. None: all inputs of an output."""
    symmetric: bool = True
    """Whether the codes lie around 0; otherwise they have a zero point beside each scale."""

    @property
    def section(self) -> Quantized:
        return Quantized(self.codes, self.group, self.symmetric, targets=self.targets, kept=self.kept)

    def leaf(self, axes: Axes, shape: tuple[int, ...], w: Array, parts: Sequence[Any]) -> Any:
        codes, scales, zeros = (None if each[0] is None else jnp.stack(each) for each in zip(*parts, strict=True))
        assert codes is not None and scales is not None
        held = scale_shape(shape, axes, self.spec)
        zeros = None if zeros is None else zeros.reshape(held)
        return assemble(codes.reshape(shape), scales.reshape(held), zeros, axes, self.spec)


class Codes(NamedTuple):
    """A matrix in codes."""

    codes: Array
    """(I, O), signed."""
    scales: Array
    """(N, O)."""
    zeros: Array | None
    """(N, O) of int8; None: codes of 0 stand for 0."""

    @property
    def values(self) -> Array:
        """The numbers that they stand for."""
        zeros = 0 if self.zeros is None else spread(self.zeros.astype(jnp.float32), self.codes.shape)
        return (self.codes - zeros) * spread(self.scales, self.codes.shape)


@dataclass(frozen=True)
class RTN(RoundingConfig):
    """Each weight becomes the nearest number that a code stands for."""

    def change(self, w: Array, sums: Sums | None) -> tuple[Array, Any]:
        scales, zeros = grid(w, FLAT, self.spec)
        made = Codes(nearest(w, scales, zeros, self.codes), scales, zeros)
        return made.values, made


@dataclass(frozen=True)
class GPTQ(RoundingConfig):
    """The inputs are rounded one after the other, and those behind make up for each error (Frantar et al. 2022)."""

    damping: Positive = 0.01
    """Share of the Hessian's mean diagonal that is added to it."""
    act_order: bool = False
    """Round the inputs with the largest squares first; groups then have the scales of the weights as they were."""

    asks: ClassVar = "pairs"

    def change(self, w: Array, sums: Sums | None) -> tuple[Array, Any]:
        assert sums is not None
        inputs, size = len(w), self.group or len(w)
        # as in the published code, one scale for all inputs is that of the weights as they were
        known = self.group is None or self.act_order
        begun = jnp.where(jnp.diag(sums.gram)[:, None] == 0, 0, w) if self.group else w
        order = jnp.argsort(-jnp.diag(sums.gram), stable=True) if self.act_order else jnp.arange(inputs)
        given = None
        if known:
            given = tuple(jnp.repeat(each, size, 1)[:, order] for each in fitted(begun.T, size, self.spec))
        block = min(inputs, size * max(1, BLOCK // size)) if not known else BLOCK
        rule = Round(self.codes, self.symmetric, 0 if known else size)
        gram = sums.gram[order][:, order]
        _, states = sweep(w[order].T, gram, rule, self.damping, block, given)
        codes, per_input, shifts = (jnp.concatenate(each, 1).T for each in zip(*states, strict=True))
        back = jnp.argsort(order)
        codes, per_input, shifts = codes[back], per_input[back], shifts[back]
        made = Codes(
            codes.astype(jnp.int8), per_input[::size], None if self.symmetric else shifts[::size].astype(jnp.int8)
        )
        return made.values, made


class Round(NamedTuple):
    """GPTQ's rule: each input's weights become the nearest numbers of its group's grid."""

    kind: str
    symmetric: bool
    group: int
    """Inputs that share a scale, which is that of their weights when the block begins; 0: scales are given."""

    def begin(self, w: Array, diagonal: Array, given: Any) -> Any:
        if self.group:
            spec = Spec(self.kind, None, self.symmetric)  # type: ignore[arg-type]
            given = tuple(jnp.repeat(each, self.group, 1) for each in fitted(w, self.group, spec))
        return jnp.zeros_like(w), *given

    def column(self, w: Array, state: Any, at: Array, diagonal: Array) -> tuple[Array, Any]:
        codes, scales, zeros = state
        least, most = RANGES[self.kind]
        code = jnp.clip(jnp.round(w[:, at] / scales[:, at]) + zeros[:, at], least, most)
        return scales[:, at] * (code - zeros[:, at]), (codes.at[:, at].set(code), scales, zeros)


def fitted(w: Array, group: int, spec: Spec) -> tuple[Array, Array]:
    """Return the scales and zeros (O, N) of a matrix (O, I) as GPTQ's published code has them.

    Symmetric ones map the largest magnitude to the middle between the highest code and the one that would follow.
    """
    least, most = RANGES[spec.kind]
    groups = w.reshape(len(w), -1, group)
    low, high = jnp.minimum(groups.min(2), 0), jnp.maximum(groups.max(2), 0)
    if spec.symmetric:
        high = jnp.maximum(-low, high)
        low = -high
    empty = high - low == 0
    low, high = jnp.where(empty, -1, low), jnp.where(empty, 1, high)
    scales = (high - low) / (most - least)
    zeros = jnp.zeros_like(scales) if spec.symmetric else jnp.clip(jnp.round(least - low / scales), least, most)
    return scales, zeros
