"""Methods that compress a trained model: how one is written, and which matrices it changes.

A method is a frozen dataclass whose fields are the options of `jaxmodels compress RUN METHOD`. Most of them change one
matrix at a time (`MatrixMethod`), given sums over its inputs. Dims: I inputs and O outputs of a matrix.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.compress.calibration import Calibration, get, matrices, put, stages
from jaxmodels.compress.coding import named
from jaxmodels.compress.patterns import matched
from jaxmodels.config import Config
from jaxmodels.errors import UserError
from jaxmodels.fields import Section
from jaxmodels.models.adapted import sides
from jaxmodels.models.observed import Sums
from jaxmodels.models.parameters import Axes
from jaxmodels.registry import Registry
from jaxmodels.tasks.task import Task

METHODS = Registry(
    "method",
    "jaxmodels.methods",
    {
        "magnitude": "jaxmodels.compress.pruning:Magnitude",
        "wanda": "jaxmodels.compress.pruning:Wanda",
        "sparsegpt": "jaxmodels.compress.pruning:SparseGPT",
        "structured": "jaxmodels.compress.structured:Structured",
        "rtn": "jaxmodels.compress.rounding:RTN",
        "gptq": "jaxmodels.compress.rounding:GPTQ",
        "awq": "jaxmodels.compress.factors:AWQ",
        "smoothquant": "jaxmodels.compress.factors:SmoothQuant",
    },
)


class Work(NamedTuple):
    """What a method is given."""

    config: Config
    task: Task
    params: dict[str, Any]
    """Parameters by network."""
    stats: dict[str, Any]
    calibration: Calibration | None
    """None: the method asks for none."""
    report: Callable[[str], Any] = lambda line: None
    """Called with a line about what is being done."""


class Compressed(NamedTuple):
    """What a method gives."""

    config: Config
    params: dict[str, Any]
    stats: dict[str, Any]
    matrices: dict[str, dict[str, Any]]
    """What was done to each parameter, by its path."""
    left: dict[str, str]
    """Matrices that stay as they were, though they match, and why."""


@dataclass(frozen=True)
class MethodConfig(Section, kinds=METHODS):
    """How a model is compressed. Patterns are of paths below the network, such as layers/attn/q/w or */mlp/*."""

    targets: tuple[str, ...] = ("*",)
    """Patterns of the matrices that are changed; embeddings and output layers over a vocabulary are none."""
    kept: tuple[str, ...] = ()
    """Patterns of the matrices that stay as they are."""

    asks: ClassVar[Literal["nothing", "sums", "pairs"]] = "nothing"
    """What it must know of the inputs of matrices: nothing, sums over each, or over each pair of them too."""

    @abstractmethod
    def apply(self, work: Work) -> Compressed:
        """Compress a model.

        Raises:
            UserError: patterns match nothing, or a matrix cannot be compressed so.
        """

    def check(self, work: Work) -> None:
        """Refuse what does not fit the model, before any work.

        Raises:
            UserError: as `apply`.
        """
        self.chosen(work.task)

    def chosen(self, task: Task) -> dict[str, Axes]:
        """Return the logical axes of the matrices that match, by network and path.

        Raises:
            UserError: a pattern matches none.
        """
        names, able = list(named(task.networks)), matrices(task)
        found, kept = (
            matched(field, getattr(self, field), names, list(able), "matrix") for field in ("targets", "kept")
        )
        left = {name: axes for name, axes in able.items() if name in found and name not in kept}
        if not left:
            raise UserError(f"got kept {' '.join(self.kept)}, which leaves no target, expected one, try fewer patterns")
        return left


@dataclass(frozen=True)
class MatrixMethod(MethodConfig):
    """A method that changes one matrix after the other, in the order in which the network multiplies by them."""

    @abstractmethod
    def change(self, w: jax.Array, sums: Sums | None) -> tuple[jax.Array, Any]:
        """Return a changed matrix (I, O) of float32, and what the leaf is made of (`leaf`)."""

    def leaf(self, axes: Axes, shape: tuple[int, ...], w: jax.Array, parts: Sequence[Any]) -> Any:
        """Return the parameter that stands for changed matrices, whose values are w; `parts` are theirs."""
        return w

    def changed(self, config: Config, left: Sequence[str] = ()) -> Config:
        """Return the config of the compressed model; the matrices `left`, by network and path, stay as they were."""
        return config

    def fits(self, name: str, axes: Axes, inputs: int, outputs: int) -> str:
        """Say why a matrix cannot be compressed so, as the end of "got …, "; empty if it can."""
        return ""

    def check(self, work: Work) -> None:
        for name, axes in self.chosen(work.task).items():
            shape = get(work.params, name).shape
            first, middle = sides(axes, "matrix")
            below = name.partition("/")[2].removesuffix("/w")
            if wrong := self.fits(below, axes, math.prod(shape[first:middle]), math.prod(shape[middle:])):
                raise UserError(f"got {wrong}, try --kept '{below}'")

    def apply(self, work: Work) -> Compressed:
        self.check(work)
        chosen = self.chosen(work.task)
        shapes = {name: get(work.params, name).shape for name in chosen}
        if self.asks == "nothing":
            order, left = list(chosen), {}
        else:
            assert work.calibration is not None
            order = work.calibration.in_order(work.params, work.stats, list(chosen))
            left = {
                name: "no product of a layer by which inputs could be measured" for name in chosen if name not in order
            }
            if not order:
                raise UserError(
                    f"got targets {' '.join(self.targets)}, of which no inputs can be measured, expected matrices of "
                    "linear layers or convolutions, try magnitude"
                )
        params, figures, parts = work.params, {}, {name: [] for name in order}
        for stage in stages(order, named(work.task.networks), {name: shapes[name][0] for name in order}):
            names = [name for name, _ in stage]
            sums: Mapping[str, Sums] = {}
            if work.calibration is not None and self.asks != "nothing":
                sums = work.calibration.measure(params, work.stats, names, self.asks == "pairs")
            for name, layer in stage:
                if name in sums and not sums[name].count.min():
                    left[name] = "no result that is differentiated depends on it in the data, as on a router of one"
                    continue
                params, facts = self._one(params, name, chosen[name], layer, sums.get(name), parts[name])
                figures.setdefault(name, []).append(facts)
            work.report(", ".join(name.partition("/")[2] for name in names))
        leaves = {name: get(work.params, name) for name in left}
        for name in figures.keys() - left.keys():
            leaves[name] = self.leaf(chosen[name], shapes[name], get(params, name), parts[name])
        facts = {name: _joined(each) for name, each in figures.items() if name not in left}
        return Compressed(self.changed(work.config, list(left)), put(params, leaves), work.stats, facts, left)

    def _one(
        self, params: Any, name: str, axes: Axes, layer: int, sums: Sums | None, parts: list[Any]
    ) -> tuple[Any, dict[str, float]]:
        """Change a matrix, or all the experts of a layer; return the parameters with it, and what was done."""
        whole, (first, middle) = get(params, name), sides(axes, "matrix")
        stacked = axes[0] == "layers"
        own, inputs = whole[layer] if stacked else whole, math.prod(whole.shape[first:middle])
        if stacked and sums is not None:
            sums = jax.tree.map(lambda x: x[layer], sums)
        before = own.reshape(-1, inputs, math.prod(whole.shape[middle:])).astype(jnp.float32)
        changed = [self.change(each, sums) for each in before]
        parts.extend(part for _, part in changed)
        after = jnp.stack([w for w, _ in changed])
        facts = {"zeros": float((after == 0).mean()), "error": _error(before, after, sums)}
        new = after.reshape(own.shape).astype(whole.dtype)
        return put(params, {name: whole.at[layer].set(new) if stacked else new}), facts


def _error(before: jax.Array, after: jax.Array, sums: Sums | None) -> float:
    """Return how far the outputs of a matrix are off: the square of the difference over that of the outputs.

    Without pairs of inputs they are taken to be uncorrelated, and without sums of one size.
    """
    if sums is not None and sums.gram is not None:
        power = lambda w: jnp.einsum("sio,ij,sjo->", w, sums.gram, w)  # noqa: E731
    else:
        weight = 1.0 if sums is None else sums.square[:, None]
        power = lambda w: (jnp.square(w) * weight).sum()  # noqa: E731
    whole = float(power(before))
    return float(power(after - before)) / whole if whole else 0.0


def _joined(facts: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Return the means of what was done to the layers of a stack."""
    return {name: round(float(np.mean([each[name] for each in facts])), 6) for name in facts[0]}
