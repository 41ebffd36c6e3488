"""Calibration: sums over the inputs of a model's matrices, measured on batches of data, matrix by matrix."""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from jaxmodels import data
from jaxmodels.compress.coding import named
from jaxmodels.data.contract import check_batch
from jaxmodels.errors import UserError
from jaxmodels.models.adapted import sides
from jaxmodels.models.observed import Observed, Order, Sums
from jaxmodels.models.parameters import Axes
from jaxmodels.parallel.mesh import Mesh, make_mesh
from jaxmodels.tasks.task import Task
from jaxmodels.train.saved import Run, imported


def matrices(task: Task) -> dict[str, Axes]:
    """Return the logical axes of all matrices of a task's networks, by network and path: model/layers/attn/q/w."""
    return {name: axes for name, axes in named(task.networks).items() if axes.kind == "matrix"}


def get(tree: Any, name: str) -> Any:
    """Return the leaf of a tree by its path."""
    return functools.reduce(operator.getitem, name.split("/"), tree)


def put(tree: Any, leaves: Mapping[str, Any]) -> Any:
    """Return a tree with other leaves at these paths."""
    made = jax.tree.map(lambda x: x, tree, is_leaf=lambda x: not isinstance(x, Mapping))
    for name, leaf in leaves.items():
        *path, last = name.split("/")
        functools.reduce(operator.getitem, path, made)[last] = leaf
    return made


def open_source(run: Run, given: Mapping[str, Any], kind: str | None) -> data.Source:
    """Open the data to calibrate with: those that the run was trained on, or others as `jaxmodels eval` takes them.

    Raises:
        UserError: they are not here, or are not what the run's task takes.
    """
    if given or kind:
        return run.evaluation(given, kind=kind).source
    cfg, task = run.config, run.task
    if imported(run.directory, run.kept):
        return run.evaluation().source  # of its own kind of data, or refused with what to give
    section = cfg.data
    if run.tokenizer is not None and hasattr(section, "tokenizer"):
        # the one that the run keeps, and not one that is learned anew
        section = type(section)(**{**vars(section), "tokenizer": str(run.directory)})
    opened = type(cfg)(**{**vars(cfg), "data": section})
    try:
        source = data.open_for(opened, "train", task.fields, run.kept.classes, run.kept.groups)
    except UserError as error:
        raise UserError(f"{error}, or other data than the run's own with {cfg.data.instead}") from error
    check_batch(task.fields, data.spec(source, section.batch_size))
    return source


@dataclass(frozen=True)
class Calibration:
    """Batches of a task's data, on a mesh, by which the inputs of matrices are measured."""

    task: Task
    mesh: jax.sharding.Mesh
    batches: Sequence[Any]
    described: str = ""
    """What the data are, in one line."""
    order: Order = field(default_factory=Order)

    @classmethod
    def of(cls, run: Run, source: data.Source, batches: int) -> Calibration:
        """Read the first batches of a source, in the order in which a training reads them."""
        mesh, section = make_mesh(Mesh()), run.config.data
        size = -(-section.batch_size // mesh.size) * mesh.size
        placed = run.task.shardings(mesh, data.spec(source, size))
        loader = data.Loader(source, data.Order(len(source), size, run.config.train.seed), placed)
        return cls(run.task, mesh, tuple(loader.iterate(0, batches)), source.describe())

    def measure(self, params: Any, stats: Any, names: Sequence[str], gram: bool) -> dict[str, Sums]:
        """Return the sums over the inputs of these matrices; of a matrix that no product of a layer reads they are 0.

        `gram` asks for the products of all pairs of inputs too.
        """
        zeros = self._zeros(params, names, gram)
        with jax.set_mesh(self.mesh):
            found = (self._sums(zeros, params, stats, batch) for batch in self.batches)
            return functools.reduce(lambda a, b: {name: a[name] + b[name] for name in a}, found)

    def in_order(self, params: Any, stats: Any, names: Sequence[str]) -> list[str]:
        """Return those of the matrices whose inputs can be measured, in the order in which a network reads them."""
        self.order.clear()
        zeros = self._zeros(params, names, gram=False)
        with jax.set_mesh(self.mesh):
            jax.eval_shape(lambda *args: jax.grad(self._total)(*args), zeros, params, stats, self.batches[0])
        return [name for name in self.order if name in names]

    def _zeros(self, params: Any, names: Sequence[str], gram: bool) -> dict[str, Sums]:
        axes, found = matrices(self.task), {}
        for name in names:
            shape, (first, middle) = get(params, name).shape, sides(axes[name], "matrix")
            found[name] = Sums.zeros(shape[:first], math.prod(shape[first:middle]), gram)
        return found

    @functools.cached_property
    def _sums(self) -> Any:
        return jax.jit(jax.grad(self._total))

    def _total(self, sums: dict[str, Sums], params: Any, stats: Any, batch: Any) -> jax.Array:
        """Return a number that depends on what the networks compute: the sum of all that is measured of them."""
        leaves = {name: Observed(get(params, name), each, name, self.order) for name, each in sums.items()}
        task, observed = self.task, put(params, leaves)
        if task.whole is None:
            found: Any = [total for total, _ in task.metrics(observed, stats, batch).values()]
        else:  # its metrics are computed from features of the whole set
            key = jax.random.key(0)
            found = [loss.fn(observed, stats, batch, key, 0)[0] for loss in task.losses]
        floats = (x for x in jax.tree.leaves(found) if jnp.issubdtype(jnp.result_type(x), jnp.floating))
        return jnp.asarray(sum(jnp.sum(x, dtype=jnp.float32) for x in floats), jnp.float32)


def stages(
    names: Sequence[str], axes: Mapping[str, Axes], depths: Mapping[str, int]
) -> Iterator[list[tuple[str, int]]]:
    """Yield what is compressed together, in order: the matrices of one layer of a stack, or one that is in none.

    Each is a name and a layer, 0 for one without layers. `names` are in the order in which a network reads them, and
    `axes` are those of all its parameters.
    """
    for stack, group in itertools.groupby(names, lambda name: _stack(name, axes)):
        own = list(group)
        if not stack:
            yield from ([(name, 0)] for name in own)
            continue
        for layer in range(depths[own[0]]):
            yield [(name, layer) for name in own]


def _stack(name: str, axes: Mapping[str, Axes]) -> str:
    """Return the path of the stack that a parameter is in: the shortest one below which all are stacked."""
    parts = name.split("/")
    if axes[name][0] != "layers":
        return ""
    for end in range(1, len(parts)):
        path = "/".join(parts[:end])
        if all(each[0] == "layers" for other, each in axes.items() if other.startswith(path + "/")):
            return path
    return name
