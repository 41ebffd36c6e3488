"""Send tokens to their experts, multiply them by the experts' weights, and bring the results back.

Dims: B rows, T tokens, k experts of a token, E experts, D and F widths; C places of an expert, or from one device to
another; N tokens of a device, R = N · k rows that it sends, S devices that share the experts.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxmodels.models.kernels.grouped import grouped, loop
from jaxmodels.models.kernels.product import PRODUCT
from jaxmodels.models.layers import shard
from jaxmodels.parallel import rules

Array = jax.Array
Activation = Callable[[Array], Array]
Weights = tuple[Array, Array, Array]
"""Gate and up (E, D, F), and down (E, F, D), of gated MLPs."""
How = tuple[Callable[[Array, Array], Array], Callable[..., Array]]
"""How inputs are multiplied by weights, and how the products with gate and up become hidden units."""
Kept = tuple[Array, ...]
"""Inputs, and what hidden units are made of: products with gate and up, and the rows' shares where they have some."""

WIDE, NARROW = ("expert", "embed", "mlp"), ("expert", "mlp", "embed")
AXES = WIDE, WIDE, NARROW
"""Logical axes of the weights."""
SLACK = 1.25
"""Places from one device to another, as a multiple of what is needed if all experts are chosen equally often."""

FURTHER = loop(0)
"""The scope of the loop over further rounds; there are none if experts are chosen about equally often."""

_named = partial(checkpoint_name, name=PRODUCT)


class MeshAxes(NamedTuple):
    """The mesh axes of the devices that work on a batch; a single device has none."""

    expert: tuple[str, ...] = ()
    """Those over which experts are sharded."""
    fsdp: tuple[str, ...] = ()
    """Those over which weights are gathered."""
    every: tuple[str, ...] = ()


class Exchange(NamedTuple):
    """How devices exchange rows."""

    axes: MeshAxes
    places: int
    """C: the rows that one device sends to another in a round."""
    most: int
    """The rounds that are needed if all tokens choose the experts of one device."""
    k: int


class Route(NamedTuple):
    """The rows that a device sends to each other device, and those that it receives."""

    order: Array
    """(R,): the rows sorted by expert, and so by device."""
    device: Array
    """(R,): the device that holds a row's expert."""
    rank: Array
    """(R,): a row's place among those for its device."""
    sent: Array
    """(S,): the number of rows for each device."""
    received: Array
    """(S, E / S): the number of rows from each device for each expert here."""
    rounds: Array
    """(): the rounds that the whole mesh needs."""


class Round(NamedTuple):
    """One exchange of at most C rows from each device to each other device."""

    sizes: Array
    """(E / S,): the number of rows that each expert here receives."""
    send: Callable[[Array], Array]
    """(N or R, …) -> (S · C, …): send rows to their experts; returns those received by expert, unused places last."""
    bring: Callable[[Array], list[Array]]
    """(S · C, …) -> k of (N, …): send results back to each choice of a token, 0 where it is not of this round."""


def dropless(x: Array, chosen: Array, share: Array, weights: Weights, activation: Activation) -> Array:
    """Apply to each token all experts chosen for it, however uneven the choices are.

    On a mesh, tokens travel to the devices that hold their experts, and back, in rounds of a fixed buffer: one round if
    experts are chosen about equally often, and as many as it takes if they are not. Where F is sharded, its partial
    sums are added up, and scattered where the residual stream is sharded over the same axes.
    Shapes: x (B, T, D), chosen and share (B, T, k), returns (B, T, D).
    """
    mesh, split, tokens = rules.ambient(), rules.RULES["mlp"], ("batch", "seq")

    def local(axes: MeshAxes, x: Array, chosen: Array, share: Array, weights: Weights) -> Array:
        k, D = chosen.shape[-1], x.shape[-1]
        exchange, route = _route(axes, chosen.reshape(-1, k), len(weights[0]))
        y: Any = _apply_experts(exchange, activation, x.reshape(-1, D), share.reshape(-1, k), route, weights)
        return y.reshape(x.shape)

    if mesh is None or any(x.shape[i] % rules.pieces(name) for i, name in enumerate(tokens)):
        return local(MeshAxes(), x, chosen, share, weights)
    table = rules.rules_of(mesh.shape)
    scattered = set(split) <= set(table["residual"]) and x.shape[1] % rules.pieces("residual") == 0
    expert, fsdp = (tuple(axis for axis in rules.RULES[name] if mesh.shape[axis] > 1) for name in ("expert", "embed"))

    def add(*given: Any) -> Array:
        y = local(MeshAxes(expert, fsdp, mesh.axis_names), *given)
        return jax.lax.psum_scatter(y, split, scatter_dimension=1, tiled=True) if scattered else y[None]

    rows = rules.spec((*tokens, None), table)
    out = rules.spec(("batch", "residual", None), table) if scattered else rules.spec(("mlp", *tokens, None), table)
    specs = (rows, rows, rows, tuple(map(rules.spec, AXES)))
    y = jax.shard_map(add, in_specs=specs, out_specs=out, check_vma=False)(x, chosen, share, weights)
    # outside of the shard_map, where the gradient of this sum needs no sum
    return y if scattered else jax.lax.reduce_sum(y, (0,))


def _route(axes: MeshAxes, chosen: Array, here: int) -> tuple[Exchange, Route]:
    """Route each row to the device that holds its expert; each device holds `here` experts. Shapes: chosen (N, k)."""
    (N, k), expert, S = chosen.shape, chosen.ravel(), jax.lax.axis_size(axes.expert) if axes.expert else 1
    R, most = N * k, N * min(k, here)
    C = min(-(-math.ceil(SLACK * R / S) // 8) * 8, most) if axes.expert else R
    order = jnp.argsort(expert, stable=True)
    place = jnp.zeros_like(order).at[order].set(jnp.arange(R), unique_indices=True)
    counts = jnp.bincount(expert, length=S * here).astype(jnp.int32).reshape(S, here)
    device, sent = expert // here, counts.sum(1)
    rank = place - (jnp.cumsum(sent) - sent)[device]
    rounds = -(-sent.max() // C)
    if axes.expert:
        counts = jax.lax.all_to_all(counts, axes.expert, 0, 0, tiled=True)
        # the maximum over all devices, or some would wait in a collective for others that have finished
        rounds = jax.lax.pmax(rounds, axes.every)
    return Exchange(axes, C, -(-most // C), k), Route(order, device, rank, sent, counts, rounds)


def _exchange_of(exchange: Exchange, route: Route, number: Any) -> Round:
    """Round `number`: of the rows from each device to each other, C from `number` · C on."""
    (axes, C, most, k), S = exchange, len(route.sent)
    at = number * C + jnp.arange(C)
    source = route.order.at[((jnp.cumsum(route.sent) - route.sent)[:, None] + at).ravel()].get(mode="clip")
    slot = route.rank - number * C
    now, slot = ((slot >= 0) & (slot < C)).reshape(-1, k), (route.device * C + slot).reshape(-1, k)
    ends = jnp.cumsum(route.received, 1)
    sizes = jnp.diff(jnp.clip(ends - number * C, 0, C).sum(0), prepend=0)
    by_expert = jnp.argsort((ends[:, None] <= at[:, None]).sum(-1).ravel(), stable=True)
    by_device = jnp.zeros_like(by_expert).at[by_expert].set(jnp.arange(S * C), unique_indices=True)
    move = partial(jax.lax.all_to_all, axis_name=axes.expert, split_axis=0, concat_axis=0, tiled=True)

    def take(rows: Array, at: Array) -> Array:
        return rows.at[at].get(mode="clip")  # places outside of this round may point anywhere

    def send(rows: Array) -> Array:
        rows = take(rows, source if rows.shape[0] == slot.size else source // k)
        return take(move(rows), by_expert) if axes.expert else rows

    def bring(rows: Array) -> list[Array]:
        rows = move(take(rows, by_device)) if axes.expert else rows
        # one choice after the other: to add up (N, k, D) over k, TPUs would lay it out anew
        found = [take(rows, slot[:, choice]) for choice in range(k)]
        mine = [now[:, choice].reshape(-1, *(1,) * (rows.ndim - 1)) for choice in range(k)]
        return [jnp.where(own, each, 0) for own, each in zip(mine, found, strict=True)] if most > 1 else found

    return Round(sizes, send, bring)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _apply_experts(
    exchange: Exchange, activation: Activation, x: Array, share: Array, route: Route, weights: Weights
) -> Array:
    """Apply to each token its experts, and add up their results by their shares.

    Hidden units are multiplied by the shares, not results: the shares' gradients then need no results, which would have
    to be computed and sent back a second time. The backward pass gathers weights again, and has saved the rows of the
    first round only: others are sent again. There are as many further rounds as it takes, so that even choices pay
    nothing for uneven ones. A loop of unknown length has no automatic gradient, hence this one. Bringing back is the
    transpose of sending, so no pass scatters.
    Shapes: x (N, D), share (N, k), returns (N, D).
    """
    return _experts_forward(exchange, activation, x, share, route, weights)[0]


def _experts_forward(
    exchange: Exchange, activation: Activation, x: Array, share: Array, route: Route, weights: Weights
) -> Any:
    whole = _gathered(weights, x.dtype, exchange.axes.fsdp)

    def go(number: Any) -> tuple[Array, Kept]:
        now = _exchange_of(exchange, route, number)
        rows, kept = _gated(_ragged(now.sizes, activation), now.send(x), whole, now.send(share.ravel()))
        return _sum(now.bring(rows)), kept

    y, first = go(0)
    if exchange.most > 1:
        with jax.named_scope(FURTHER):
            y = jax.lax.fori_loop(1, route.rounds, lambda number, y: y + go(number)[0], y)
    return y, ((x, share) if exchange.most > 1 else None, route, weights, first)


def _experts_backward(
    exchange: Exchange, activation: Activation, saved: Any, dy: Array
) -> tuple[Array, Array, None, Weights]:
    given, route, weights, first = saved
    whole, scatter = jax.vjp(lambda weights: _gathered(weights, dy.dtype, exchange.axes.fsdp), weights)

    def go(number: Any, kept: Kept | None = None) -> tuple[Array, Array, Weights]:
        now = _exchange_of(exchange, route, number)
        how = _ragged(now.sizes, activation)
        if kept is None:
            x, share = given
            kept = _gated(how, now.send(x), whole, now.send(share.ravel()))[1]
        (rows, shares), dweights = _gated_gradients(how, kept, whole, now.send(dy))
        return _sum(now.bring(rows)), jnp.stack(now.bring(shares), -1), dweights

    gradients = go(0, first)
    if exchange.most > 1:
        with jax.named_scope(FURTHER):
            add = partial(jax.tree.map, jnp.add)
            gradients = jax.lax.fori_loop(1, route.rounds, lambda number, sums: add(sums, go(number)), gradients)
    dx, dshare, dweights = gradients
    return dx, dshare, None, *scatter(dweights)


_apply_experts.defvjp(_experts_forward, _experts_backward)


def _sum(rows: list[Array]) -> Array:
    """Add up rows in float32, as a reduction does."""
    return functools.reduce(jnp.add, (each.astype(jnp.float32) for each in rows)).astype(rows[0].dtype)


def _gathered(weights: Weights, dtype: Any, fsdp: tuple[str, ...] = ()) -> Weights:
    """Cast weights to the compute dtype and gather them over fsdp; in a `shard_map`, over the mesh axes `fsdp`."""

    def one(w: Array, names: tuple[str, ...]) -> Array:
        w = rules.gather(w.astype(dtype), names)
        return jax.lax.all_gather(w, fsdp, axis=names.index("embed"), tiled=True) if fsdp else w

    return one(weights[0], WIDE), one(weights[1], WIDE), one(weights[2], NARROW)


def _ragged(sizes: Array, activation: Activation) -> How:
    """Return how to compute rows that are sorted by expert; those behind the last expert's may be nan, and become 0."""

    def hidden(gate: Array, up: Array, share: Array) -> Array:
        rows = (activation(gate) * up * share[:, None]).astype(gate.dtype)
        return jnp.where((jnp.arange(gate.shape[0]) < sizes.sum())[:, None], rows, 0)

    return partial(grouped, sizes=sizes), hidden


def _padded(activation: Activation) -> How:
    """Return how to compute a buffer of rows for each expert."""

    def hidden(gate: Array, up: Array) -> Array:
        return shard(activation(gate) * up, "expert", "expert_batch", None, "mlp")

    return partial(jnp.einsum, "ebci,eio->ebco"), hidden


def _gated(how: How, x: Array, weights: Weights, *share: Array) -> tuple[Array, Kept]:
    """Gated MLPs: their outputs, and what their gradients need."""
    (multiply, hidden), (gate, up, down) = how, weights
    units = _named(multiply(x, gate)), _named(multiply(x, up)), *share
    return multiply(hidden(*units), down), (x, *units)


def _gated_gradients(how: How, kept: Kept, weights: Weights, dy: Array) -> tuple[list[Array], Weights]:
    """The gradients of x and of the shares, if there are some, and those of the weights."""
    (multiply, hidden), (x, *units), (gate, up, down) = how, kept, weights
    inner, pull = jax.vjp(hidden, *units)
    dinner, ddown = jax.vjp(multiply, inner, down)[1](dy)
    dgate, dup, *dshare = pull(dinner)
    dx, dgate = jax.vjp(multiply, x, gate)[1](dgate)
    more, dup = jax.vjp(multiply, x, up)[1](dup)
    return [dx + more, *dshare], (dgate, dup, ddown)


def assign_places(chosen: Array, real: Array | None, experts: int, capacity: int) -> Array:
    """Each token's place in its experts' buffers, expert · capacity + place, or experts · capacity if they are full.

    Tokens queue in their order, each with all its choices at once. GShard's order, all first choices before any second
    one, would let a later token take an earlier one's place. Tokens that are not `real` take no place.
    Shapes: chosen (B, T, k), real (B, T), returns (B, T, k).
    """
    wanted = jax.nn.one_hot(chosen, experts, dtype=jnp.int32).sum(-2)
    if real is not None:
        wanted = jnp.where(real[..., None], wanted, 0)
    before = jnp.take_along_axis(jnp.cumsum(wanted, 1) - wanted, chosen, -1)
    room = before < capacity
    if real is not None:
        room &= real[..., None]
    return jnp.where(room, chosen * capacity + before, experts * capacity)


def limited(x: Array, places: Array, share: Array, weights: Weights, activation: Activation, capacity: int) -> Array:
    """Apply to each token those of its experts that have a place for it.

    On a mesh, buffers are sharded by expert: an all-to-all takes them to the experts' devices, and another one back.
    Shapes: x (B, T, D), places (of `assign_places`) and share (B, T, k), returns (B, T, D).
    """
    (B, T, k), (E, D) = places.shape, weights[0].shape[:2]
    size, flat = E * capacity, places.reshape(B, T * k)
    tokens = jnp.repeat(jnp.arange(T), k)
    source = jax.vmap(lambda at: jnp.full(size, T).at[at].set(tokens, mode="drop"))(flat)
    take = jax.vmap(lambda rows, at: rows.at[at].get(mode="fill", fill_value=0))

    def move(buffers: Array) -> Array:
        return shard(buffers, "expert", "expert_batch", None, None)

    y = shard(take(x, source), "batch", None, None)
    y = move(jnp.swapaxes(y.reshape(B, E, capacity, D), 0, 1))
    y = move(_buffered(activation, y, weights))
    y = shard(jnp.swapaxes(y, 0, 1).reshape(B, size, D), "batch", None, None)
    return (take(y, flat).reshape(B, T, k, D) * share.astype(y.dtype)[..., None]).sum(2)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _buffered(activation: Activation, x: Array, weights: Weights) -> Array:
    """Apply each expert to its buffer; the backward pass gathers weights again. Shapes: x (E, B, C, D)."""
    return _buffered_forward(activation, x, weights)[0]


def _buffered_forward(activation: Activation, x: Array, weights: Weights) -> tuple[Array, Any]:
    y, kept = _gated(_padded(activation), x, _gathered(weights, x.dtype))
    return y, (weights, kept)


def _buffered_backward(activation: Activation, saved: tuple[Weights, Kept], dy: Array) -> tuple[Array, Weights]:
    weights, kept = saved
    whole, scatter = jax.vjp(lambda weights: _gathered(weights, dy.dtype), weights)
    (dx,), dweights = _gated_gradients(_padded(activation), kept, whole, dy)
    return dx, *scatter(dweights)


_buffered.defvjp(_buffered_forward, _buffered_backward)
