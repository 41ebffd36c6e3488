"""Quantization-aware training: what a network computes with are the numbers that codes stand for.

The numbers that are trained lie in the optimizer's state, and after each update the parameters are these, rounded. So
gradients are taken of rounded parameters and applied to those behind them, which is the straight-through estimator
(Bengio et al. 2013; Jacob et al. 2018), and whatever reads the parameters (evaluation, sampling, exports) reads rounded
ones. The first step alone is one of the parameters as they begin.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxmodels.compress.codes import quantize
from jaxmodels.compress.coding import CodesConfig, leaves_of
from jaxmodels.errors import UserError
from jaxmodels.models.coded import dequantize

Array = jax.Array


class Behind(NamedTuple):
    """The state of an optimizer of rounded parameters."""

    exact: Any
    """The parameters as they are trained, where they have codes, and None elsewhere."""
    inner: Any


@dataclass(frozen=True)
class Rounded(CodesConfig):
    """Parameters that are trained to be codes: after each update they are the nearest numbers that codes stand for.

    Gradients pass the rounding. `jaxmodels compress RUN rtn` with the same codes and group then makes codes of them.
    """

    def check(self, adapter: bool, ema: float | None) -> None:
        if adapter:
            raise UserError(
                "got compress rounded with an adapter, which trains none of the weights, expected one of the two"
            )
        if ema is not None:
            raise UserError(
                f"got compress rounded with train.ema {ema}, whose averages no codes stand for, expected no averages, "
                "try --train.ema None"
            )

    def trained(
        self, optimizer: optax.GradientTransformation, steps: int, axes: Mapping[str, Any], updates: int = 1
    ) -> optax.GradientTransformation:
        names, form = leaves_of(axes)

        def init(params: Any) -> Behind:
            weights = dict(zip(names, form.flatten_up_to(params), strict=True))
            chosen = self.chosen(names, {name: w.shape for name, w in weights.items()})
            exact = [jnp.copy(w) if name in chosen else None for name, w in weights.items()]
            return Behind(jax.tree.unflatten(form, exact), optimizer.init(params))

        def update(grads: Any, state: Behind, params: Any = None) -> tuple[Any, Behind]:
            weights, held = form.flatten_up_to(params), form.flatten_up_to(state.exact)
            before = [w if exact is None else exact for w, exact in zip(weights, held, strict=True)]
            moves, inner = optimizer.update(grads, state.inner, jax.tree.unflatten(form, before))
            found, after = [], []
            for move, w, exact, own in zip(form.flatten_up_to(moves), weights, held, names.values(), strict=True):
                new = None if exact is None else optax.apply_updates(exact, move)
                after.append(new)
                found.append(move if new is None else dequantize(quantize(new, own, self.spec)) - w)
            return jax.tree.unflatten(form, found), Behind(jax.tree.unflatten(form, after), inner)

        return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]
