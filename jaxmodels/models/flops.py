"""FLOPs of a function, counted by walking its jaxpr; XLA's own count takes the body of a scan once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax

from jaxmodels.models.families import create
from jaxmodels.models.kernels.visibility import Mask
from jaxmodels.models.model import Model

PLAIN = {"attention": "xla", "routing": "dropless", "remat": "none"}
"""Fields of a model by which it has the reference attention, whose products the walk can see, no free places, and
nothing recomputed."""
Products = Iterator[tuple[float, Mask | None]]
"""FLOPs of each product, and the mask of the attention that it is of."""


def count(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """FLOPs of the products (dot, convolution) in `fn(*args)`; args may be `jax.ShapeDtypeStruct`s.

    A multiply-add is 2. Loops count by their trip counts, a branch by its dearest arm; a `while` of unknown length
    counts once. A `ragged_dot` counts each row with the one group that it belongs to.
    """
    return _total(products(jax.make_jaxpr(fn)(*args, **kwargs).jaxpr))


def forward(model: Model, batch: int, length: int = 8) -> int:
    """Model FLOPs of one application to so many examples (of so many tokens).

    Attention is counted in full, causal or not, whatever the kernel skips; of experts, those that a token is sent to;
    recomputation is not counted.
    Source: Chowdhery et al. 2022 (PaLM), appendix B.
    """
    plain = countable(model)
    stats = jax.eval_shape(plain.stats) or None
    return count(plain.apply, plain.shapes(), *plain.inputs(batch, length), stats=stats)


def countable(model: Model) -> Model:
    """The model whose products the walk can see."""
    differ = {name: value for name, value in PLAIN.items() if getattr(model.config, name, value) != value}
    return create(model.config, **differ) if differ else model


def plain(config: Any) -> Any:
    """The config of `countable`."""
    return dataclasses.replace(config, **{name: value for name, value in PLAIN.items() if hasattr(config, name)})


def _total(found: Iterable[tuple[float, Mask | None]]) -> int:
    return round(sum(flops for flops, _ in found))


def products(jaxpr: Any, times: int = 1, mask: Mask | None = None) -> Products:
    """Walk the products of a jaxpr that is run `times` times, inside the attention of this mask."""
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        within = Mask.of(str(eqn.source_info.name_stack)) or mask
        if name == "dot_general":
            (contract, _), _ = params["dimension_numbers"]
            left = eqn.invars[0].aval.shape
            inner = math.prod(left[i] for i in contract)
            yield times * 2 * math.prod(eqn.outvars[0].aval.shape) * inner, within
        elif name == "conv_general_dilated":
            kernel, numbers = eqn.invars[1].aval.shape, params["dimension_numbers"]
            taps = math.prod(kernel[i] for i in numbers.rhs_spec[1:])  # inputs a group and window
            # a dilated input (of a transposed convolution, or a strided one's gradient) is mostly zeros
            zeros = params["batch_group_count"] * math.prod(params["lhs_dilation"])
            yield times * (2 * math.prod(eqn.outvars[0].aval.shape) * taps // zeros), within
        elif name == "ragged_dot_general":
            # each row of the left with one group of the right (or all of both, summed up group by group)
            numbers = params["ragged_dot_dimension_numbers"]
            (_, contract), (_, batch) = numbers.dot_dimension_numbers
            seen = {*contract, *batch, *numbers.rhs_group_dimensions}
            left, right = (eqn.invars[i].aval.shape for i in (0, 1))
            yield times * 2 * math.prod(left) * math.prod(n for i, n in enumerate(right) if i not in seen), within
        elif name == "scan":
            yield from products(params["jaxpr"].jaxpr, times * params["length"], within)
        elif name == "cond":
            yield from max(([*products(branch.jaxpr, times, within)] for branch in params["branches"]), key=_total)
        elif name == "shard_map":
            sizes = params["mesh"].shape
            devices = math.prod(sizes[axis] for axis in params.get("manual_axes", sizes))
            yield from products(params["jaxpr"], times * devices, within)
        else:
            for inner in params.values():
                for each in _jaxprs(inner):
                    yield from products(getattr(each, "jaxpr", each), times, within)


def _jaxprs(value: Any) -> list[Any]:
    if hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns"):
        return [value]
    return [j for item in value for j in _jaxprs(item)] if isinstance(value, (tuple, list)) else []
