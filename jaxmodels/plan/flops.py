"""FLOPs of a function, counted by walking its jaxpr; XLA's own count takes the body of a scan once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax

from jaxmodels.models.functional import Model, create
from jaxmodels.tasks.task import Task


def count(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """FLOPs of the products (dot, convolution) in `fn(*args)`; args may be `jax.ShapeDtypeStruct`s.

    A multiply-add is 2. Loops count by their trip counts, a branch by its dearest arm; a `while` of unknown length
    counts once. A `ragged_dot` counts each row with the one group that it belongs to.
    """
    return _count(jax.make_jaxpr(fn)(*args, **kwargs).jaxpr)


def forward(model: Model, batch: int, length: int = 8) -> int:
    """Model FLOPs of one application to so many examples (of so many tokens).

    Attention is counted in full, causal or not, whatever the kernel skips; of experts, those that a token is sent to;
    recomputation is not counted.
    Source: Chowdhery et al. 2022 (PaLM), appendix B.
    """
    plain = countable(model)
    stats = jax.eval_shape(plain.stats) or None
    return count(plain.apply, plain.shapes(), *plain.inputs(batch, length), stats=stats)


def per_step(task: Task, batch_size: int) -> int:
    """Model FLOPs of a training step: 3 × `forward` of each network (backward is twice the forward)."""
    lengths = [x.shape[1] for x in task.batch_spec(batch_size).values() if len(x.shape) == 2]
    return sum(3 * forward(model, batch_size, *lengths[:1]) for model in task.networks.values())


def countable(model: Model) -> Model:
    """The model with the reference attention, whose products the walk can see, no free places, nothing recomputed."""
    plain = {"attention": "xla", "routing": "dropless", "remat": "none"}
    differ = {name: value for name, value in plain.items() if getattr(model.config, name, value) != value}
    return create(model.config, **differ) if differ else model


def _count(jaxpr: Any) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            (contract, _), _ = params["dimension_numbers"]
            left = eqn.invars[0].aval.shape
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[i] for i in contract)
        elif name == "conv_general_dilated":
            kernel, numbers = eqn.invars[1].aval.shape, params["dimension_numbers"]
            taps = math.prod(kernel[i] for i in numbers.rhs_spec[1:])  # inputs a group and window
            # a dilated input (of a transposed convolution, or a strided one's gradient) is mostly zeros
            zeros = params["batch_group_count"] * math.prod(params["lhs_dilation"])
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * taps // zeros
        elif name == "ragged_dot_general":
            # each row of the left with one group of the right (or all of both, summed up group by group)
            numbers = params["ragged_dot_dimension_numbers"]
            (_, contract), (_, batch) = numbers.dot_dimension_numbers
            seen = {*contract, *batch, *numbers.rhs_group_dimensions}
            left, right = (eqn.invars[i].aval.shape for i in (0, 1))
            total += 2 * math.prod(left) * math.prod(n for i, n in enumerate(right) if i not in seen)
        elif name == "scan":
            total += params["length"] * _count(params["jaxpr"].jaxpr)
        elif name == "cond":
            total += max(_count(branch.jaxpr) for branch in params["branches"])
        elif name == "shard_map":
            sizes = params["mesh"].shape
            total += math.prod(sizes[axis] for axis in params.get("manual_axes", sizes)) * _count(params["jaxpr"])
        else:
            for inner in params.values():
                total += sum(_count(getattr(j, "jaxpr", j)) for j in _jaxprs(inner))
    return total


def _jaxprs(value: Any) -> list[Any]:
    if hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns"):
        return [value]
    return [j for item in value for j in _jaxprs(item)] if isinstance(value, (tuple, list)) else []
