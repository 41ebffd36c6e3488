"""Make parameters with their logical axes, their kind, and whether they come before the stack of layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
from flax import struct

from jaxmodels.errors import UserError
from jaxmodels.models.adapted import Adapted, merged
from jaxmodels.models.coded import Coded, check_numbers, dequantize
from jaxmodels.models.observed import Observed, unobserved
from jaxmodels.parallel.rules import gather, spec

Init = Callable[..., jax.Array]
Kind = Literal["matrix", "embedding", "bias", "norm"]
"""matrix: multiplied with activations; embedding: looked up; bias: added; norm: scales and shifts of a normalization,
and single numbers."""


class Axes(tuple[str | None, ...]):
    """Logical axes of a parameter, one name a dimension, and what an optimizer must know of it."""

    kind: Kind
    before_stack: bool
    """Whether it is used before the stack of layers, as embeddings are."""

    def __new__(cls, names: Iterable[str | None], kind: Kind, before_stack: bool = False) -> Axes:
        axes = super().__new__(cls, names)
        axes.kind, axes.before_stack = kind, before_stack
        return axes

    def __getnewargs__(self) -> tuple[Any, ...]:
        return tuple(self), self.kind, self.before_stack

    @property
    def is_output(self) -> bool:
        """Whether it is the table of an output layer, which no text is looked up in."""
        return self.kind == "embedding" and "vocab" in self and not self.before_stack


@struct.dataclass
class Declared(nn.LogicallyPartitioned):
    """Flax's box around a parameter with its logical axes; a scan over layers puts `layers` before them."""

    kind: Kind = struct.field(default="matrix", pytree_node=False)
    before_stack: bool = struct.field(default=False, pytree_node=False)


def leaf(
    module: nn.Module,
    name: str,
    initializer: Init,
    axes: Sequence[str],
    shape: Sequence[int],
    kind: Kind,
    before_stack: bool = False,
) -> jax.Array | Adapted | Coded | Observed:
    """A float32 parameter of a module as it is stored: an array, or what stands for one (coded, adapted, observed).

    Raises:
        UserError: there are more or fewer axes than dimensions, or they are not in the table of `parallel.rules`.
    """
    _check_axes(module, name, tuple(axes), tuple(shape))

    def make(*args: Any) -> Declared:
        value: Any = initializer(*args)
        return Declared(value, tuple(axes), kind=kind, before_stack=before_stack)

    if module.has_variable("params", name):
        given: Any = module.get_variable("params", name)
        if isinstance(given, Adapted | Coded | Observed):  # whose arrays have shapes of their own
            return given
    value: Any = module.param(name, make, tuple(shape))
    return value


def parameter(
    module: nn.Module,
    name: str,
    initializer: Init,
    axes: Sequence[str],
    shape: Sequence[int],
    kind: Kind,
    before_stack: bool = False,
) -> jax.Array:
    """A float32 parameter of a module, with a logical axis name for each dimension.

    Raises:
        UserError: there are more or fewer axes than dimensions, or they are not in the table of `parallel.rules`.
    """
    value = unobserved(leaf(module, name, initializer, axes, shape, kind, before_stack))
    if isinstance(value, Adapted):
        return merged(value, axes, kind)
    if not isinstance(value, Coded):
        return value
    check_numbers(value, tuple(axes))
    return dequantize(value)


def _check_axes(module: nn.Module, name: str, axes: tuple[str, ...], shape: tuple[int, ...]) -> None:
    wrong = "" if len(axes) == len(shape) else "expected one for each dimension"
    try:
        spec(axes)
    except ValueError as error:
        wrong = f"but {error}"
    if wrong:
        path = "/".join([*module.path, name])
        raise UserError(f"got parameter {path} of shape {shape} with the axes {axes}, {wrong}")


def contracted_dimensions(module: nn.Module, outputs: Any, axes: Any, given: tuple[int, ...]) -> int:
    """How many dimensions of an input a matrix contracts: the axes that are not those of its outputs.

    Raises:
        UserError: the axes leave no dimension of the input to contract, or none for the rows.
    """
    count = len(axes) - len(outputs) if isinstance(outputs, tuple) and isinstance(axes, tuple) else 0
    if not 0 < count < len(given):
        path = "/".join([*module.path, "w"])
        raise UserError(
            f"got parameter {path} with the outputs {outputs} and the axes {axes} for an input of shape {given}, "
            "expected tuples, an axis for each contracted dimension and each output, try (width,), ('embed', 'mlp')"
        )
    return count


def weight(
    module: nn.Module,
    name: str,
    initializer: Init,
    axes: Sequence[str],
    shape: Sequence[int],
    dtype: str,
    kind: Kind,
    before_stack: bool = False,
) -> jax.Array:
    """A parameter as a product takes it: in the compute dtype, and whole along what fsdp cuts."""
    value = parameter(module, name, initializer, axes, shape, kind, before_stack)
    return gather(value.astype(dtype), tuple(axes))


def declared_axes(boxed: Any) -> Any:
    """The tree of `Axes` of a network's parameters, as `init` gives them in their boxes.

    Raises:
        UserError: a parameter was not made by `parameter`, so that its axes and kind are unknown.
    """

    def one(path: tuple[Any, ...], leaf: Any) -> Axes:
        if not isinstance(leaf, Declared):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise UserError(
                f"got parameter {name} without logical axes and kind, expected one made by a layer of "
                "jaxmodels.models.layers, try jaxmodels.models.parameters.parameter"
            )
        return Axes(leaf.names, leaf.kind, leaf.before_stack)

    return jax.tree_util.tree_map_with_path(one, boxed, is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata))
