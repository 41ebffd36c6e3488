"""Groups of parameters that optimizers treat differently: by kind, matrix dimensions, layer, and whether frozen."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import jax
import numpy as np
from optax import contrib

from jaxmodels.errors import UserError

STACKED = ("layers", "expert", "gates")
"""Logical axes that stack separate parameters."""


def kinds(axes: Any) -> Any:
    """Return each parameter's declared kind: matrix, embedding, bias or norm."""
    return jax.tree.map(lambda each: each.kind, axes, is_leaf=lambda x: isinstance(x, tuple))


def matrices(axes: Any, *kind_names: str) -> Any:
    """Return which dimensions are inputs and which outputs of each parameter of these kinds, and None for all others.

    Stacked layers, experts and gates are a batch of matrices; heads and their width form one dimension of a matrix.
    """

    def dims(kind: str, names: tuple[str | None, ...]) -> contrib.MuonDimensionNumbers | None:
        if kind not in kind_names:
            return None
        used = [i for i, name in enumerate(names) if name not in STACKED]
        outputs = used[-2:] if names[-1] == "head_dim" else used[-1:]
        return contrib.MuonDimensionNumbers(tuple(i for i in used if i not in outputs), tuple(outputs))

    return jax.tree.map(dims, kinds(axes), axes)


def factors(freeze: Sequence[str], layer_decay: float, shapes: Any, axes: Any) -> Any:
    """Return what each parameter's updates are multiplied by, broadcastable to them; None if that is 1 for all.

    The factor is 0 for what `optim.freeze` names; otherwise it is `optim.layer_decay` to the power of the layers above:
    none for what follows the stack of layers (head, norm, pooler, …), all of them for what precedes it (embeddings).

    Raises:
        UserError: the model has no stack of layers for a layer decay.
    """
    leaves = jax.tree_util.tree_leaves_with_path(axes, is_leaf=lambda x: isinstance(x, tuple))
    names = {jax.tree_util.keystr(path, simple=True, separator="/"): axis for path, axis in leaves}
    sizes = [leaf.shape for leaf in jax.tree.leaves(shapes)]
    stacks = {
        name: shape[0] for (name, axis), shape in zip(names.items(), sizes, strict=True) if axis[:1] == ("layers",)
    }
    if layer_decay != 1 and not stacks:
        raise UserError(
            f"got optim.layer_decay {layer_decay} for a model without a stack of layers, expected 1, "
            "try --optim.layer-decay 1"
        )

    def above(name: str) -> int:
        # layers of the stack nearest to it in the tree, its own tower's, or of the deepest one that it feeds
        near = {stack: _shared(name, stack) for stack in stacks}
        return max(depth for stack, depth in stacks.items() if near[stack] == max(near.values()))

    def factor(name: str, axis: Any, shape: tuple[int, ...]) -> Any:
        stacked = axis[:1] == ("layers",)
        scale = np.ones(shape[0] if stacked else 1)
        if layer_decay != 1:
            if stacked:
                scale = layer_decay ** np.arange(shape[0] - 1, -1, -1.0)
            elif axis.before_stack:
                scale = np.array([layer_decay ** above(name)])
        hold = frozen(freeze, name, len(scale))
        scale = np.where(hold, 0.0, scale)
        return scale.astype(np.float32).reshape((-1, *(1,) * (len(shape) - 1)) if shape else ())

    if not freeze and layer_decay == 1:
        return None
    found = [factor(name, axis, shape) for (name, axis), shape in zip(names.items(), sizes, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(shapes), found)


def _shared(a: str, b: str) -> int:
    """How many steps from the root two paths have in common."""
    pairs = zip(a.split("/"), b.split("/"), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def check_freeze(patterns: Sequence[str], networks: Mapping[str, Any]) -> None:
    """Check the patterns of `optim.freeze` against the parameter shapes of all networks together.

    Raises:
        UserError: a pattern matches no parameter, or all patterns together leave nothing to train.
    """
    held: dict[str, np.ndarray] = {}
    for network, tree in networks.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            held[f"{network}/{name}"] = np.stack([frozen([p], name, (*leaf.shape, 1)[0]) for p in patterns])
    for index, pattern in enumerate(patterns):
        if not any(each[index].any() for each in held.values()):
            tops = list(dict.fromkeys(name.split("/")[1] for name in held))
            raise UserError(
                f"got optim.freeze {pattern!r}, which matches no parameter, expected some of {', '.join(tops)}, "
                f"try --optim.freeze '{tops[0]}/*'"
            )
    if all(each.any(0).all() for each in held.values()):
        raise UserError(
            f"got optim.freeze {' '.join(map(repr, patterns))}, which match every parameter, expected some to train,  "
            "try without it"
        )


def frozen(patterns: Sequence[str], name: str, layers: int) -> np.ndarray:
    """Return which layers of a stack (or the one parameter) patterns such as layers[:6]/* match, bool (layers,)."""
    hold = np.zeros(layers, bool)
    for pattern in patterns:
        if cut := re.fullmatch(r"([^\[]*)\[(-?\d*):(-?\d*)\](.*)", pattern):
            if fnmatchcase(name, cut[1] + cut[4]):
                hold[slice(*(int(end) if end else None for end in cut.group(2, 3)))] = True
        elif fnmatchcase(name, pattern):
            hold[:] = True
    return hold
