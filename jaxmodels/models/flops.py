"""Count the FLOPs of a function by walking its jaxpr; XLA's own count takes the body of a scan only once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax

from jaxmodels.models.families import create
from jaxmodels.models.kernels.visibility import Mask
from jaxmodels.models.model import Model

Products = Iterator[tuple[float, Mask | None]]
"""FLOPs of each product, and the mask of the attention that it belongs to, if any."""


def count(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Count the FLOPs of the products (dot, convolution) in `fn(*args)`; args may be `jax.ShapeDtypeStruct`s.

    A multiply-add counts as 2. A loop counts once for each iteration, a conditional by its most expensive branch, and a
    `while` of unknown length once. A `ragged_dot` multiplies each row with the one group that it belongs to.
    """
    return _total(products(jax.make_jaxpr(fn)(*args, **kwargs).jaxpr))


def forward(model: Model, batch: int, length: int = 8) -> int:
    """Count the model FLOPs of one application to `batch` examples (of `length` tokens).

    Attention counts in full, causal or not, whatever the kernel skips. Each token counts the experts that it is sent
    to. Recomputation does not count.
    Source: Chowdhery et al. 2022 (PaLM), appendix B.
    """
    plain = countable(model)
    stats = jax.eval_shape(plain.stats) or None
    return count(plain.apply, plain.shapes(), *plain.inputs(batch, length), stats=stats)


def countable(model: Model) -> Model:
    """Return the model in the plain form whose products can be counted."""
    plain = model.config.plain()
    return model if plain == model.config else create(plain)


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
            taps = math.prod(kernel[i] for i in numbers.rhs_spec[1:])  # inputs of a group, times the window
            # a dilated input (of a transposed convolution, or of the gradient of a strided one) is mostly zeros
            zeros = params["batch_group_count"] * math.prod(params["lhs_dilation"])
            yield times * (2 * math.prod(eqn.outvars[0].aval.shape) * taps // zeros), within
        elif name == "ragged_dot_general":
            # each row of the left operand meets one group of the right (or all of both, summed by group)
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
