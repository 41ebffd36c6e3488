"""Pruning after training: which weights become 0, and by how much the others make up for them.

Dims: I inputs and O outputs of a matrix. Heads with their size are one dimension of each side.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.compress.calibration import get
from jaxmodels.compress.methods import Compressed, MatrixMethod, Work
from jaxmodels.compress.sweep import Prune, sweep
from jaxmodels.errors import UserError
from jaxmodels.fields import Positive, Share
from jaxmodels.models.observed import Sums
from jaxmodels.models.parameters import Axes


@dataclass(frozen=True)
class PruningConfig(MatrixMethod):
    """What methods of pruning have in common."""

    sparsity: Share = 0.5
    """Share of the weights that become 0."""
    pattern: str = ""
    """N:M keeps N of each M inputs of an output that follow each other, such as 2:4; empty: any weights."""

    def __post_init__(self) -> None:
        if self.pattern:
            found = re.fullmatch(r"([1-9]\d?):([1-9]\d?)", self.pattern)
            if not found or int(found[1]) >= int(found[2]):
                raise UserError(f"got pattern {self.pattern!r}, expected N:M with N below M, try 2:4")
            share = 1 - int(found[1]) / int(found[2])
            if self.sparsity not in (0.5, share):
                raise UserError(
                    f"got sparsity {self.sparsity} with pattern {self.pattern}, which has {share:g}, expected one of "
                    f"the two, try without --sparsity"
                )

    @property
    def group(self) -> tuple[int, int]:
        """N and M of the pattern; zeros without one."""
        kept, _, of = (self.pattern or "0:0").partition(":")
        return int(kept), int(of)

    def fits(self, name: str, axes: Axes, inputs: int, outputs: int) -> str:
        _, of = self.group
        return f"pattern {self.pattern} for {name} with {inputs} inputs, expected a multiple of {of}" if (
            of and inputs % of
        ) else ""  # fmt: skip


def lowest(scores: np.ndarray, share: float, group: tuple[int, int], axis: int | None) -> np.ndarray:
    """Return which entries of scores (I, O) are the lowest: a share of all, or with `axis` 0 of each output's.

    With a group of N and M it is all but N of each M inputs of an output. Of equal scores the first ones go first.
    """
    kept, of = group
    if of:
        inputs, outputs = scores.shape
        ranks = scores.reshape(inputs // of, of, outputs).argsort(1, kind="stable").argsort(1, kind="stable")
        return (ranks < of - kept).reshape(inputs, outputs)
    if axis is None:
        removed = np.zeros(scores.size, bool)
        removed[scores.ravel().argsort(kind="stable")[: int(scores.size * share)]] = True
        return removed.reshape(scores.shape)
    ranks = scores.argsort(axis, kind="stable").argsort(axis, kind="stable")
    return ranks < int(scores.shape[axis] * share)


@dataclass(frozen=True)
class Magnitude(PruningConfig):
    """The smallest weights become 0 (Han et al. 2015)."""

    scope: Literal["matrix", "global"] = "matrix"
    """What weights are compared with: those of their matrix, or those of all targets."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scope == "global" and self.pattern:
            raise UserError(f"got scope global with pattern {self.pattern}, expected matrix, try without --scope")

    def apply(self, work: Work) -> Compressed:
        if self.scope == "matrix":
            return super().apply(work)
        every = np.concatenate([np.abs(np.asarray(get(work.params, name))).ravel() for name in self.chosen(work.task)])
        count = int(every.size * self.sparsity)
        threshold = float(np.partition(every, count - 1)[count - 1]) if count else -1.0
        return _Below(self.targets, self.kept, threshold=threshold).apply(work)

    def change(self, w: jax.Array, sums: Sums | None) -> tuple[jax.Array, Any]:
        return jnp.where(lowest(np.abs(np.asarray(w)), self.sparsity, self.group, None), 0, w), None


@dataclass(frozen=True)
class _Below(Magnitude):
    """Magnitude by a threshold that all targets share."""

    threshold: float = field(default=0.0)

    def change(self, w: jax.Array, sums: Sums | None) -> tuple[jax.Array, Any]:
        return jnp.where(jnp.abs(w) <= self.threshold, 0, w), None


@dataclass(frozen=True)
class Wanda(PruningConfig):
    """Of each output, the weights with the smallest |w| · ‖x‖ over their inputs become 0 (Sun et al. 2023)."""

    scope: Literal["output", "matrix"] = "output"
    """What products are compared with: those of their output, as published, or those of the matrix, which is better
    where outputs differ in the size of their weights."""

    asks: ClassVar = "sums"

    def change(self, w: jax.Array, sums: Sums | None) -> tuple[jax.Array, Any]:
        assert sums is not None
        scores = np.abs(np.asarray(w)) * np.sqrt(np.asarray(sums.square))[:, None]
        return jnp.where(lowest(scores, self.sparsity, self.group, 0 if self.scope == "output" else None), 0, w), None


@dataclass(frozen=True)
class SparseGPT(PruningConfig):
    """The weights that cost least become 0, and those behind them make up for it (Frantar & Alistarh 2023)."""

    damping: Positive = 0.01
    """Share of the Hessian's mean diagonal that is added to it."""

    asks: ClassVar = "pairs"

    def change(self, w: jax.Array, sums: Sums | None) -> tuple[jax.Array, Any]:
        assert sums is not None
        found, _ = sweep(w.T, sums.gram, Prune(self.sparsity, *self.group), self.damping)
        return found.T, None
