"""Steps of small decoders on a mesh: what the tests of stages, and of context and sequence sharding compare.

Run as a script (MODEL, and meshes as JSON) it prints losses and gradient norms, a line for each mesh, which may have
more devices than the tests' own process.
"""

import dataclasses
import functools
import itertools
import json
import sys

import jax
import numpy as np

from jaxmodels import tasks
from jaxmodels.config import AdamW, CausalLM, Mesh, Stdlib
from jaxmodels.models.gpt2 import GPT2Config
from jaxmodels.models.llama import LlamaConfig
from jaxmodels.models.mixtral import MixtralConfig
from jaxmodels.parallel import rules
from jaxmodels.parallel.mesh import make_mesh
from jaxmodels.train import state, step

B, T, V, STEPS = 8, 16, 64, 10
SMALL = {"vocab_size": V, "layers": 2, "width": 16, "heads": 4}
ADAM = AdamW(peak_lr=1e-2, warmup_steps=1)
MODELS = {
    "gpt2": GPT2Config(**SMALL, context=T),
    "llama": LlamaConfig(**SMALL, kv_heads=2, mlp_width=32),
    "mixtral": MixtralConfig(**SMALL, kv_heads=2, mlp_width=32, experts=4, z_loss=0.01),
}


def batches():
    """Packed rows with padding: segment ids, and targets that are ignored in unequal numbers."""
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        rows = (rng.integers(0, V, (B, T + 1)) % 8).astype(np.int32)
        ids = 1 + (np.arange(T) >= rng.integers(3, T - 3, (B, 1))).astype(np.int32)
        ids[:3, T - 2 :] = 0
        yield {"tokens": rows[:, :-1], "targets": np.where(ids == 0, -1, rows[:, 1:]), "segment_ids": ids}


@functools.cache
def first(model):
    """The state before the first step without its key, and the key's data: the same on any mesh (test_zoo_steps.py)."""
    task = tasks.build(CausalLM(), model, Stdlib(seq_len=T, batch_size=B))
    optimizers = {loss.name: ADAM.build(STEPS, task.axes()[loss.trains]) for loss in task.losses}
    made = jax.jit(lambda key: state.init(task, optimizers, key))(jax.random.key(0))
    return jax.device_get((dataclasses.replace(made, rng=None), jax.random.key_data(made.rng)))


def prepare(model, mesh_cfg, **options):
    """The compiled step, its layout's state and the mesh, from a config of a model and of a mesh."""
    devices = int(np.prod([getattr(mesh_cfg, axis) for axis in rules.AXES]))
    mesh = make_mesh(mesh_cfg, jax.devices()[:devices])
    task = tasks.build(CausalLM(), model, Stdlib(seq_len=T, batch_size=B))
    optimizers = {loss.name: ADAM.build(STEPS, task.axes()[loss.trains]) for loss in task.losses}
    layout = state.layout(task, optimizers, mesh)
    began, rng = first(model)
    # copies, since the step donates its state
    now = jax.tree.map(
        lambda leaf, x: jax.device_put(np.array(x), leaf.sharding), dataclasses.replace(layout, rng=None), began
    )
    now = dataclasses.replace(now, rng=jax.device_put(jax.random.wrap_key_data(rng), layout.rng.sharding))
    rows = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rules.sharding(mesh, ("batch", "seq")))
        for name, x in next(batches()).items()
    }
    return step.build_step(task, optimizers, mesh, layout, rows, **options), now, mesh


def measure(model, mesh_cfg, steps=STEPS, **options):
    """Loss and gradient norm of each step, (steps, 2)."""
    take, now, mesh = prepare(model, mesh_cfg, **options)
    found = []
    for batch in itertools.islice(batches(), steps):
        now, metrics = take(
            now, {name: jax.device_put(x, rules.sharding(mesh, ("batch", "seq"))) for name, x in batch.items()}
        )
        found.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    return np.array(found)


@functools.cache
def alone(model, **options):
    """Loss and gradient norm of each step on one device."""
    return measure(model, Mesh(data=1), **options)


if __name__ == "__main__":
    name, *meshes = sys.argv[1:]
    for mesh in meshes:
        print(json.dumps(measure(MODELS[name], Mesh(**json.loads(mesh))).tolist()), flush=True)
