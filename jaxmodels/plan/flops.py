"""FLOPs of a function, counted by walking its jaxpr; XLA's own count takes the body of a scan once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax

from jaxmodels.models.functional import create
from jaxmodels.tasks.task import Task


def count(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """FLOPs of the products (dot, convolution) in `fn(*args)`; args may be `jax.ShapeDtypeStruct`s.

    A multiply-add is 2. Loops count by their trip counts, a branch by its dearest arm; a `while` of unknown length
    counts once.
    """
    return _count(jax.make_jaxpr(fn)(*args, **kwargs).jaxpr)


def per_step(task: Task, batch_size: int) -> int:
    """Model FLOPs of a training step: 3 × the forward products of each loss (backward is twice the forward).

    Attention is counted in full, causal or not, whatever the kernel skips, and recomputation is not counted.
    Source: Chowdhery et al. 2022 (PaLM), appendix B.
    """
    inputs = next(iter(task.batch_spec(batch_size).values()))
    total = 0
    for model in task.networks.values():
        plain = create(_plain(model.config))
        total += 3 * count(plain.apply, plain.shapes(), inputs, stats=jax.eval_shape(plain.stats) or None)
    return total


def _plain(config: Any) -> Any:
    """The config with the reference attention, whose products the walk can see, and nothing recomputed."""
    known = {f.name for f in dataclasses.fields(config)}
    return dataclasses.replace(config, **{k: v for k, v in {"attention": "xla", "remat": "none"}.items() if k in known})


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
