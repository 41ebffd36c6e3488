"""One training step: losses in order, gradients over microbatches, updates; `jit` on a mesh, or `pmap`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxmodels.parallel import distributed, rules
from jaxmodels.tasks.task import Aux, Batch, Loss, Task
from jaxmodels.train.state import Optimizers, State, move

Metrics = dict[str, Any]
Step = Callable[[State, Batch], tuple[State, Metrics]]

WEIGHT = "weight"
"""Key, among a step's metrics, of the number of tokens or examples that the loss is averaged over."""


def measured(metrics: Mapping[str, float]) -> tuple[dict[str, float], bool]:
    """Drop the weights and the means over nothing from a step's metrics; also return whether there were such means."""
    weights = {name: value for name, value in metrics.items() if name.rpartition("/")[2] == WEIGHT}
    empty = tuple(name.removesuffix(WEIGHT) for name, value in weights.items() if not value)
    kept = {name: value for name, value in metrics.items() if name not in weights and not name.startswith(empty)}
    return kept, bool(empty)


def split(task: Task, batch: Batch, parts: int) -> Batch:
    """Split a batch into equal parts, stacked: (B, …) becomes (parts, B / parts, …)."""

    def one(name: str, x: jax.Array) -> jax.Array:
        axes = (None, *task.batch_axes(name, x.ndim))
        # strided, so that each part has rows of every device
        x = jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)
        return rules.constrain(x, axes)

    return {name: one(name, x) for name, x in batch.items()}


def gradient(
    task: Task, loss: Loss, state: State, batch: Batch, rng: jax.Array, accumulate: int
) -> tuple[Any, jax.Array, Aux]:
    """Return the gradient of the loss's sum, the sum, and its auxiliary outputs, over `accumulate` microbatches.

    Where a step makes several passes over the parameters, for microbatches or for a pipeline's ticks, each replica
    accumulates its own gradients, and they are summed over `data` once.
    """

    def total(trained: Any, stats: Any, part: Batch, key: jax.Array) -> tuple[jax.Array, Aux]:
        params = dataclasses.replace(state, params={**state.params, loss.trains: trained}).whole
        return loss.fn(params, stats, part, key, state.step)

    grad = jax.value_and_grad(total, has_aux=True)
    trained, replicas = state.params[loss.trains], rules.pieces("replicas")
    passes = accumulate > 1 or rules.pieces("layers") > 1
    apart = passes and replicas > 1 and len(next(iter(batch.values()))) % (accumulate * replicas) == 0
    if apart:
        grad = mapped(grad, replicas)
    if accumulate == 1:
        (value, aux), grads = grad(trained, state.stats, batch, rng)
        stats, sums = aux.stats, (grads, value, aux.weight, aux.sums)
    else:

        def body(carry: tuple[Any, Any], part: tuple[Batch, jax.Array]) -> tuple[tuple[Any, Any], None]:
            sums, stats = carry
            (value, aux), grads = grad(trained, stats, *part)
            new = (grads, value, aux.weight, aux.sums)
            return (jax.tree.map(jnp.add, sums, new), aux.stats), None

        parts = (split(task, batch, accumulate), jax.random.split(rng, accumulate))
        first = jax.tree.map(lambda x: x[0], parts)
        (value, aux), grads = jax.eval_shape(grad, trained, state.stats, *first)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (grads, value, aux.weight, aux.sums))
        zeros = jax.tree.map(lambda x: rules.pin(x, "replicas"), zeros) if apart else zeros
        (sums, stats), _ = jax.lax.scan(body, (zeros, state.stats), parts)
    grads, value, weight, sums = jax.tree.map(lambda x: x.sum(0), sums) if apart else sums
    return grads, value, Aux(weight, sums, stats)


def mapped(grad: Callable[..., Any], replicas: int) -> Callable[..., Any]:
    """Map `grad(params, stats, batch, key)` over replicas' rows; its outputs get a leading dimension of replicas.

    Replicas are joined by the axis `rules.REPLICAS`, as under pmap, so that batch statistics cover all rows.
    """

    def own(x: jax.Array) -> jax.Array:
        """Reshape (B, …) to (replicas, B / replicas, …). Rows stay where they are: the stages' axis is outermost."""
        outer = rules.pieces("layers")
        x = jnp.swapaxes(x.reshape(outer, replicas, -1, *x.shape[1:]), 0, 1)
        return rules.pin(x.reshape(replicas, -1, *x.shape[3:]), "replicas")

    def run(params: Any, stats: Any, batch: Batch, key: jax.Array) -> Any:
        with rules.inside(rules.DATA):
            return grad(params, stats, batch, jax.random.fold_in(key, jax.lax.axis_index(rules.REPLICAS)))

    out = ((0, Aux(0, 0, None)), 0)  # pyright: ignore[reportArgumentType]
    every = jax.vmap(
        run, in_axes=(None, None, 0, None), out_axes=out, axis_name=rules.REPLICAS, spmd_axis_name=rules.DATA
    )
    return lambda params, stats, batch, key: every(params, stats, jax.tree.map(own, dict(batch)), key)


def advance(
    task: Task,
    optimizers: Optimizers,
    state: State,
    batch: Batch,
    *,
    accumulate: int,
    ema: float | None,
    across: str | None = None,
) -> tuple[State, Metrics]:
    """Return the state after one step on a batch, and the step's metrics; pure.

    `across` names a mapped axis to sum gradients over (pmap); under `jit` the compiler does this. If nothing in the
    batch counts, the gradient is 0, the means are NaN, and the loss's `weight` among the metrics is 0.
    """
    metrics: Metrics = {}
    params, stats, opt_state = dict(state.params), state.stats, dict(state.opt_state)
    rng = jax.random.fold_in(state.rng, state.step)
    if across is not None:
        rng = jax.random.fold_in(rng, jax.lax.axis_index(across))

    def update(loss: Loss, carry: tuple[Any, Any, Any], batch: Batch, rng: jax.Array) -> tuple[Any, Any]:
        """Return params, statistics and optimizer state after one update of a loss's network, and its metrics."""
        params, stats, opt_state = carry
        now = dataclasses.replace(state, params=params, stats=stats)
        grads, value, aux = gradient(task, loss, now, batch, rng, accumulate)
        weight, sums, stats = aux.weight, aux.sums, aux.stats
        if across is not None:
            grads, value, weight, sums = jax.lax.psum((grads, value, weight, sums), across)
        share = jnp.where(weight > 0, 1.0 / jnp.where(weight > 0, weight, 1), 0.0)
        grads = jax.tree.map(lambda g: (g * share).astype(g.dtype), grads)
        trained = params[loss.trains]
        updates, opt_state = optimizers[loss.name].update(grads, opt_state, trained)
        params = {**params, loss.trains: optax.apply_updates(trained, updates)}
        return (params, stats, opt_state), (sums, weight, optax.tree.norm(grads))

    for index, loss in enumerate(task.losses):
        carry, own = (params, stats, opt_state[loss.name]), jax.random.fold_in(rng, index)
        if loss.updates == 1:
            carry, (sums, weight, norm) = update(loss, carry, batch, own)
        else:
            parts = (split(task, batch, loss.updates), jax.random.split(own, loss.updates))
            body = functools.partial(update, loss)
            carry, measured = jax.lax.scan(lambda carry, part, body=body: body(carry, *part), carry, parts)
            sums, weight = jax.tree.map(lambda x: x.sum(0), measured[:2])
            norm = measured[2][-1]
        params, stats, opt_state[loss.name] = carry
        prefix = "" if len(task.losses) == 1 else f"{loss.name}/"
        metrics |= {prefix + name: total / count for name, (total, count) in sums.items()}
        metrics |= {prefix + "grad_norm": norm, prefix + WEIGHT: weight}
    average = None
    if ema is not None:
        # early on, the average follows closely: min(decay, (1 + t) / (10 + t)), as in TensorFlow's moving averages
        t = state.step.astype(jnp.float32)
        decay = jnp.minimum(ema, (1 + t) / (10 + t))
        average = jax.tree.map(lambda a, p: (decay * a + (1 - decay) * p).astype(a.dtype), state.ema, params)
    after = {"params": params, "stats": stats, "opt_state": opt_state, "ema": average}
    return dataclasses.replace(state, step=state.step + 1, **after), metrics


def build_step(
    task: Task,
    optimizers: Optimizers,
    mesh: Mesh,
    layout: State,
    batch: Mapping[str, Any],
    *,
    strategy: str = "jit",
    accumulate: int = 1,
    ema: float | None = None,
    offload: bool = False,
    xla: Sequence[str] = (),
) -> Step:
    """Build the step from shapes alone. It compiles in the background; its state argument is donated.

    `layout` and `batch` are `jax.ShapeDtypeStruct`s with shardings.
    """
    options: dict[str, Any] = {"accumulate": accumulate, "ema": ema}
    if strategy == "pmap":
        return replicated(task, optimizers, mesh, layout, options)
    lowered = lower(task, optimizers, mesh, layout, batch, offload=offload, xla=xla, **options)
    pool = ThreadPoolExecutor(1)
    compiling = pool.submit(lowered.compile)
    pool.shutdown(wait=False)

    @functools.cache
    def program() -> Callable[[State, Batch], Any]:
        compiled = compiling.result()
        # the first collective fails if processes reach it far apart: all begin together
        distributed.barrier("step compiled")
        return compiled

    return lambda state, batch: program()(state, batch)


def lower(
    task: Task,
    optimizers: Optimizers,
    mesh: Mesh,
    layout: State,
    batch: Mapping[str, Any],
    *,
    accumulate: int = 1,
    ema: float | None = None,
    offload: bool = False,
    xla: Sequence[str] = (),
    platforms: tuple[str, ...] | None = None,
) -> Any:
    """Lower the step for XLA, from shapes alone. Its state argument is donated.

    With `offload` the optimizer's arrays come from host memory and return there. `xla` has NAME=VALUE options, as in
    `Train`. `platforms` are those to compile for, if they are not those of this machine.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, layout)

    def run(state: State, batch: Batch) -> tuple[State, Metrics]:
        if offload:  # an argument, since the layout loses its memory kinds on devices that are not here
            state = dataclasses.replace(state, opt_state=move(state.opt_state, jax.memory.Space.Device))
        state, metrics = advance(task, optimizers, state, batch, accumulate=accumulate, ema=ema)
        if offload:
            state = dataclasses.replace(state, opt_state=move(state.opt_state, jax.memory.Space.Host))
        return state, metrics

    with jax.set_mesh(mesh):
        given = compiler_options(xla)
        jitted = jax.jit(run, out_shardings=(shardings, None), donate_argnums=0, compiler_options=given)
        return jitted.trace(layout, batch).lower(lowering_platforms=platforms)


def compiler_options(given: Sequence[str]) -> dict[str, bool | int | str]:
    """Parse NAME=VALUE options into what the compiler takes."""
    pairs = (option.partition("=")[::2] for option in given)
    known = {"true": True, "false": False}
    return {name: known.get(value.lower(), int(value) if value.isdecimal() else value) for name, value in pairs}


def replicated(task: Task, optimizers: Optimizers, mesh: Mesh, layout: State, options: dict[str, Any]) -> Step:
    """Build the step under `jax.pmap`: each device holds the whole state and takes its rows of the batch."""
    devices = list(mesh.devices.flat)

    def run(state: State, batch: Batch) -> tuple[State, Metrics]:
        return advance(task, optimizers, state, batch, across=rules.REPLICAS, **options)

    # axes None: the state is one replicated value, as under jit, so that checkpoints agree
    compiled = jax.pmap(run, axis_name=rules.REPLICAS, in_axes=(None, 0), out_axes=None, devices=devices)
    rows = jax.jit(lambda batch: jax.tree.map(lambda x: x.reshape(len(devices), -1, *x.shape[1:]), batch))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, layout)

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        state, metrics = compiled(state, rows(batch))
        return jax.device_put(state, shardings), metrics

    return step
