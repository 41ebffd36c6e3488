"""States to save, and what is asked of the checkpoints that come of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmodels.train.checkpoint import Checkpointer


class State(NamedTuple):
    step: Any
    params: Any
    stats: Any
    opt_state: Any
    ema: Any
    rng: Any


def make_mesh(*shape: int) -> jax.sharding.Mesh:
    auto = (jax.sharding.AxisType.Auto,) * len(shape)
    return jax.make_mesh(
        shape, ("data", "fsdp")[: len(shape)], axis_types=auto, devices=jax.devices()[: np.prod(shape)]
    )


def shardings(tree, mesh: jax.sharding.Mesh):
    def rule(leaf):
        fits = leaf.ndim == 2 and leaf.shape[0] % mesh.devices.size == 0 and leaf.size
        return jax.sharding.NamedSharding(mesh, jax.P(mesh.axis_names) if fits else jax.P())

    return jax.tree.map(rule, tree)


def make_state(mesh: jax.sharding.Mesh, seed: int = 0) -> State:
    rng = np.random.default_rng(seed)
    params = {
        "embed": {"w": rng.normal(size=(16, 8)).astype(np.float32)},
        "layers": [
            {"w": jnp.asarray(rng.normal(size=(8, 8)), jnp.bfloat16), "b": np.array([seed, np.inf, -0.0], np.float16)}
        ],
        "counts": {
            "i": np.array([seed, -1], np.int8),
            "mask": np.array([True, False]),
            "none": None,
            "empty": {},
            "tuple": (),
        },
        "nothing": np.zeros((0, 8), np.float32),
    }
    params = jax.tree.map(jnp.asarray, params)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    keys = {"loop": jax.random.key(seed), "layers": jax.random.split(jax.random.key(seed, impl="rbg"), 3)}
    state = State(jnp.int32(seed), params, {}, tx.init(params["embed"]), None, keys)
    return jax.device_put(state, shardings(state, mesh))


def abstract_of(state: State, mesh: jax.sharding.Mesh) -> State:
    shapes = jax.eval_shape(lambda: state)
    return jax.tree.map(lambda s, sharding: s.update(sharding=sharding), shapes, shardings(shapes, mesh))


def bits(tree) -> dict[str, tuple]:
    def raw(leaf):
        leaf = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        return str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes()

    return {jax.tree_util.keystr(path): raw(leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def save(checkpointer: Checkpointer, step: int, state: State, *, best: bool = False) -> None:
    checkpointer.save(step, state, {"step": step, "metric": 1 / (step + 1)}, best=best)
    checkpointer.wait()


def restored_step(folder: Path, state: State) -> int:
    found = Checkpointer(folder).restore(abstract_of(state, make_mesh(1)))
    assert found is not None
    return found[2]


def some_file(folder: Path, name: str) -> Path:
    return max((path for path in folder.rglob(name) if path.is_file()), key=lambda path: path.stat().st_size)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
