"""Pipeline parallelism: microbatches follow each other through a stack of layers that is cut into stages.

All stages are computed at once, as one array with a dimension of stages that is sharded over the mesh: in each tick,
every stage applies its layers to the microbatch that it has, then a roll of the array by one stage sends the results
on. With S stages, R rounds and M microbatches, M · R + S - 1 ticks do the work of M · R: what a stage computes before
its first microbatch and after its last one is discarded. With one round this is GPipe; with more, a stage has R slices
of layers, groups of S microbatches pass through all stages R times, and the bubble is R times shorter.
Source: Huang et al. 2018; slices of layers, Narayanan et al. 2021, section 2.2; stages as a dimension, Xu et al. 2021.
Dims: S stages, N = M / S microbatches of each stage, B rows, b = B / M of a microbatch.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxmodels.errors import UserError
from jaxmodels.models import remat as remats
from jaxmodels.models.kernels.product import PRODUCT, recomputed
from jaxmodels.models.remat import INPUT
from jaxmodels.parallel import rules
from jaxmodels.parallel.rules import Stages, constrain, pin

Array = jax.Array

CHOSEN = 4
"""Microbatches for each stage where no number is asked for, if the batch divides."""
MOVES = frozenset(
    {"broadcast_in_dim", "convert_element_type", "custom_vjp_call", "dynamic_slice", "gather"}
    | {"reshape", "sharding_constraint", "squeeze", "transpose"}
)
"""Primitives that only move or cast weights on their way to a product (`rules.gather` is a custom_vjp_call)."""

log = logging.getLogger("jaxmodels")


class Stack(NamedTuple):
    """Layers of one kind, each with its own parameters."""

    block: Callable[[Any, Array, Any, Any, Array | None], tuple[Array, Any]]
    """(parameters, x, carried, shared, key) -> (x, outputs), for one layer."""
    layers: int
    remat: str = "none"
    unroll: int = 1


def staged(scanned: Any, block: Any, layers: int, remat: str, unroll: int) -> Callable[..., Any]:
    """A function that makes the stack of blocks: a scan over them, or a pipeline where the mesh has stages."""

    def make(*args: Any, name: str | None = None) -> Callable[..., Any]:
        scan = scanned(*args, name=name)
        mesh = rules.ambient()
        stages = Stages() if mesh is None else Stages.of(mesh.shape)
        if stages.stages == 1 or scan.is_initializing():
            return scan
        if remat == "offload":
            raise UserError(
                f"got model.remat offload with {stages.stages} stages, expected a mesh without stages, "
                "try --model.remat full"
            )

        def one(params: Any, x: Array, carried: Any, shared: Any, key: Array | None) -> tuple[Array, Any]:
            rngs = None if key is None else {"dropout": key}
            with recomputed(remat != "none"):
                return block(*args, parent=None).apply({"params": params}, x, carried, *shared, rngs=rngs)

        def run(x: Array, carried: Any, *shared: Any) -> tuple[Array, Any]:
            if any(leaf.ndim > 1 for leaf in jax.tree.leaves(carried)):  # a cache, which stays where its layers are
                return scan(x, carried, *shared)
            key = scan.make_rng("dropout") if scan.has_rng("dropout") else None
            stack = Stack(one, layers, remat, unroll)
            return run_pipeline(stack, stages, scan.variables["params"], x, carried, shared, key)

        return run

    return make


def microbatches(stages: Stages, rows: int, shards: int) -> int | None:
    """Return the number of microbatches of `rows` rows, each sharded over `shards`; None if they do not divide."""
    chosen = [stages.stages * n for n in range(CHOSEN, 0, -1)]
    choices = [stages.microbatches] if stages.microbatches else chosen
    return next((count for count in choices if rows % (count * shards) == 0), None)


def run_pipeline(
    stack: Stack, stages: Stages, params: Any, x: Array, carried: Any, shared: Any, key: Array | None = None
) -> tuple[Array, Any]:
    """Run x (B, …) through all layers; also the blocks' outputs, stacked by layer and summed over microbatches.

    This equals a scan of the block over `params` and `carried` (L, …), if its outputs are sums over rows. Arrays in
    `shared` whose first dimension is B travel with their rows; all others are the same for all rows. Dropout's masks
    differ from the scan's: `key` is folded by layer, then by microbatch. `remat` keeps of a block what it keeps in a
    scan.

    Raises:
        UserError: the batch does not divide.
    """
    (S, R, _), B = stages, x.shape[0]
    shards = rules.pieces("batch") // S
    M = microbatches(stages, B, shards)
    if M is None:
        least = (stages.microbatches or S) * shards
        better = -(-B // least) * least
        raise UserError(f"got {B} rows for {S} stages, expected a multiple of {least}, try --data.batch-size {better}")
    log_schedule(S, R, M, stack.layers // (S * R), B // M)
    with rules.inside(rules.STAGE):
        return _run_pipeline(stack, Stages(S, R, M), params, x, carried, shared, key)


def _run_pipeline(
    stack: Stack, stages: Stages, params: Any, x: Array, carried: Any, shared: Any, key: Array | None
) -> tuple[Array, Any]:
    (S, R, M), B = stages, x.shape[0]
    leaves, tree = jax.tree.flatten(shared)
    own = [leaf.ndim > 0 and leaf.shape[0] == B for leaf in leaves]
    with_rows = [leaf for leaf, travels in zip(leaves, own, strict=True) if travels]
    # a copy for each stage, so that its gradient is summed over stages once and not in each tick
    fixed = [pin(jnp.broadcast_to(x, (S, *x.shape)), "layers") for x, goes in zip(leaves, own, strict=True) if not goes]
    slices = jax.tree.map(lambda w: _slices(w, S, R), (params, carried))
    numbers = pin(jnp.arange(S), "layers")

    def stage(slices: Any, fixed: list[Array], number: Array, tick: Array, given: Any) -> tuple[Array, Any]:
        """One stage in one tick: its layers applied to the x that it is given."""
        x, traveling = given
        turn = tick - number
        rounds, microbatch = turn // S % R, turn // (S * R) * S + turn % S
        held = jax.tree.map(lambda w: _pick(w, rounds), slices)
        rest, rows = iter(fixed), iter(traveling)
        shared = tree.unflatten([next(rows if travels else rest) for travels in own])
        size = stack.layers // (S * R)
        first = (rounds * S + number) * size

        def layer(x: Array, each: Any) -> tuple[Array, Any]:
            (params, carried), index = each
            own_key = None if key is None else jax.random.fold_in(jax.random.fold_in(key, first + index), microbatch)
            return stack.block(params, x, carried, shared, own_key)

        if stack.remat != "none":
            layer = jax.checkpoint(layer, policy=remats.policy(stack.remat), prevent_cse=False)
        named: Any = lambda x, each: layer(checkpoint_name(x, INPUT), each)  # noqa: E731
        return jax.lax.scan(named, x, (held, jnp.arange(size)), unroll=min(stack.unroll, size))

    if R > 1:
        # otherwise a slice of the weights, and what is computed from it, would be saved for each tick
        stage = jax.checkpoint(stage, policy=_kept(stack.remat), prevent_cse=False)
    stage = jax.vmap(stage, in_axes=(0, 0, 0, None, 0), spmd_axis_name=rules.STAGE)

    def compute(tick: Array, state: Any) -> tuple[Any, Any]:
        """What each stage has received from the one before it after a tick, and the outputs (S, R, L / (S R), …)."""
        y, outputs = stage(slices, fixed, numbers, tick, state)
        turn = tick - numbers[:, None]
        at = (turn // S % R == jnp.arange(R)) & (turn >= 0) & (turn < M * R)
        # `where` and not a product, which would pass on nan
        outputs = jax.tree.map(lambda y: jnp.where(_beside(at, y.ndim + 1), y[:, None], 0), outputs)
        return jax.tree.map(lambda x: _staged(_turn(x, 1)), (y, state[1])), outputs

    # recomputed in the backward pass, or its masks would be saved for each tick
    exchange = jax.checkpoint(functools.partial(_exchange, rounds=R), prevent_cse=False)

    def tick(carry: Any, tick: Array) -> tuple[Any, None]:
        state, flow, sums = carry
        state, outputs = compute(tick, state)
        return (*exchange(tick + 1, state, flow), jax.tree.map(jnp.add, sums, outputs)), None

    flow = jax.tree.map(lambda x: _flow(x, S, M), (x, with_rows))
    state = jax.tree.map(lambda x: _staged(jnp.zeros_like(x[:, 0])), flow)
    shapes = jax.eval_shape(compute, jnp.int32(0), state)[1]
    sums = jax.tree.map(lambda y: pin(jnp.zeros(y.shape, y.dtype), "layers"), shapes)
    carry = (*exchange(jnp.int32(0), state, flow), sums)
    (_, (flow, _), sums), _ = jax.lax.scan(tick, carry, jnp.arange(M * R + S - 1))
    y = jnp.moveaxis(flow[:, 1:], 1, 2).reshape(x.shape)
    return y, jax.tree.map(lambda y: jnp.swapaxes(y, 0, 1).reshape(-1, *y.shape[3:]), sums)


def _exchange(tick: Array, state: Any, flow: Any, rounds: int) -> tuple[Any, Any]:
    """Give the first stage the microbatch that is due in a tick, and store the one that the last stage has finished.

    `flow` (S, N + 1, b, …) holds, by stage, the microbatches that wait and those that are done: group g of S
    microbatches lies at g until it is taken, and then at g + 1. While a group is taken, its row rotates past the first
    stage, so that each microbatch passes once, and is back on its own stage when the group is finished.
    """

    def one(state: Array, flow: Array) -> tuple[Array, Array]:
        S = state.shape[0]
        group, place = tick // (S * rounds), tick % (S * rounds)
        row = jax.lax.dynamic_index_in_dim(flow, group, 1, keepdims=False)
        first = _beside(jnp.arange(S) == 0, state.ndim)
        due = place < S
        turned = _staged(_turn(jnp.where(first, state, row), -1))
        flow = jax.lax.dynamic_update_index_in_dim(flow, jnp.where(due, turned, row), group, 1)
        return _staged(jnp.where(due & first, row, state)), flow

    pairs = [one(*each) for each in zip(jax.tree.leaves(state), jax.tree.leaves(flow), strict=True)]
    tree = jax.tree.structure(state)
    return tree.unflatten([a for a, _ in pairs]), tree.unflatten([b for _, b in pairs])


def _turn(x: Array, by: int) -> Array:
    """Roll over the stages; its gradient is a roll too, where that of `jnp.roll` sends one array in two pieces."""
    return _rolled(x, by) if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.roll(x, by, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _rolled(x: Array, by: int) -> Array:
    return jnp.roll(x, by, 0)


_rolled.defvjp(lambda x, by: (_rolled(x, by), None), lambda by, _, dx: (_rolled(dx, -by),))


def _slices(w: Array, stages: int, rounds: int) -> Array:
    """Reshape (L, …) to (S, R, L / (S R), …): consecutive layers are on consecutive stages, round by round."""
    w = w.reshape(rounds, stages, -1, *w.shape[1:])
    return pin(jnp.swapaxes(w, 0, 1), "layers")


def _pick(w: Array, index: Array) -> Array:
    return w[0] if w.shape[0] == 1 else jax.lax.dynamic_index_in_dim(w, index, 0, keepdims=False)


def _flow(x: Array, stages: int, microbatches: int) -> Array:
    """(B, …) as (S, N + 1, b, …), the last place free; rows are strided, so that none leaves its device."""
    rows = x.shape[0] // microbatches
    x = jnp.moveaxis(x.reshape(stages, rows, -1, *x.shape[1:]), 2, 1)
    x = jnp.concatenate([x, jnp.zeros_like(x[:, :1])], 1)
    return constrain(x, ("layers", None, *_names(x.ndim - 2)))


def _staged(x: Array) -> Array:
    """Pin the sharding of (S, b, …), what each stage has in a tick."""
    return constrain(x, ("layers", *_names(x.ndim - 1)))


def _names(rank: int) -> rules.Names:
    """Logical axes of an array with rows: the residual stream, or what travels with it."""
    return ("batch", "residual", *(None,) * (rank - 2)) if rank > 2 else ("batch", "seq")[:rank]


def _beside(x: Array, rank: int) -> Array:
    return x.reshape(*x.shape, *(1,) * (rank - x.ndim))


def _kept(remat: str) -> Callable[..., Any]:
    """The policy for what is saved of a stage whose weights change from tick to tick."""
    if remat == "none":
        return lambda primitive, *_, **__: primitive.name not in MOVES
    return jax.checkpoint_policies.save_only_these_names(INPUT, *[PRODUCT] * (remat == "dots"))


@functools.cache
def log_schedule(stages: int, rounds: int, microbatches: int, layers: int, rows: int) -> None:
    """Log how a stack is run, once for each way."""
    idle = (stages - 1) / (microbatches * rounds + stages - 1)
    log.info(
        "pipeline: microbatches %d (rows %d), stages %d, rounds %d, layers at a time %d; bubble %.1f %% of the time",
        *(microbatches, rows, stages, rounds, layers, 100 * idle),
    )
