"""One train step of every family is equal on one device and on eight: statistics, dropout and two networks included."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels import tasks
from jaxmodels.config import SGD, Constant, Mesh, Stdlib
from jaxmodels.parallel.mesh import make_mesh
from jaxmodels.train import state, step
from tests.sections import task_of
from tests.zoo import ZOO, B, T, arrays, fill

ELSEWHERE = {"llama", "mistral", "qwen", "mixtral", "mixtral-capacity", "vgg", "dcgan-discriminator"}
"""Whose steps test_equivalence.py, test_mixtral.py or another row of the zoo takes: vgg's are those of vgg-bn."""
LARGE = {"yolox": 1e-4}
"""How far parameters may be apart where gradients, and so their rounding, are tens of times those of others."""
# plain gradient descent: Adam's first step is the gradient's sign, which rounding decides where it is nearly 0
DESCENT = SGD(peak_lr=0.1, weight_decay=0.0, clip_norm=None, schedule=Constant())


def begin(task, optimizers):
    """The state before the first step, drawn by NumPy: to compile an initialization takes as long as a step."""
    params = {network: arrays(model) for network, model in task.networks.items()}
    shapes = jax.eval_shape(lambda: state.init(task, optimizers, jax.random.key(0)))
    assert not [leaf for leaf in jax.tree.leaves(shapes.opt_state) if leaf.ndim], "plain descent keeps counts alone"
    counts = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes.opt_state)
    return state.State(jnp.zeros((), jnp.int32), params, task.stats(), counts, None, jax.random.key(0))


@functools.cache
def train(name, mesh_cfg, devices, **options):
    """State and metrics after one step, and the parameters before it."""
    kind, config = ZOO[name]
    mesh = make_mesh(mesh_cfg, jax.devices()[:devices])
    task = tasks.build(task_of(kind), config, Stdlib(seq_len=T, batch_size=B))
    optimizers = {loss.name: DESCENT.build(1, task.axes()[loss.trains]) for loss in task.losses}
    layout = state.layout(task, optimizers, mesh)
    began = begin(task, optimizers)
    # copies, since the step donates its state
    now = jax.device_put(began, jax.tree.map(lambda leaf: leaf.sharding, layout), may_alias=False)
    before = jax.tree.map(np.asarray, began.params)
    batch = fill(task.batch_spec(B))
    batch = jax.device_put(batch, task.shardings(mesh, batch))
    rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), batch)
    now, metrics = step.build_step(task, optimizers, mesh, layout, rows, **options)(now, batch)
    held = {
        jax.tree_util.keystr(path, simple=True, separator="/"): x.addressable_shards[0].data.size / x.size
        for path, x in jax.tree_util.tree_leaves_with_path(now.params)
    }
    return (now.params, now.stats), {key: float(value) for key, value in metrics.items()}, before, held


def test_initial_parameters_are_those_of_one_device_on_any_mesh():
    """Of layers in a scan and of two networks: how numbers are drawn on a mesh is jax's, not a family's."""
    for kind, config in (ZOO["gpt2"], ZOO["dcgan"]):
        task, found = tasks.build(task_of(kind), config, Stdlib(seq_len=T, batch_size=B)), []
        for mesh in (make_mesh(Mesh(), jax.devices()[:1]), make_mesh(Mesh(data=2, fsdp=2, tensor=2))):
            optimizers = {loss.name: DESCENT.build(1, task.axes()[loss.trains]) for loss in task.losses}
            shardings = jax.tree.map(lambda leaf: leaf.sharding, state.layout(task, optimizers, mesh).params)
            found.append(jax.jit(task.init, out_shardings=shardings)(jax.random.key(0)))
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), *found)


@pytest.mark.parametrize("name", [name for name in ZOO if name not in ELSEWHERE])
def test_one_step_is_equal_on_one_device_and_on_eight(name):
    (params, stats), metrics, before, _ = train(name, Mesh(), 1)
    (params8, stats8), metrics8, _, held = train(name, Mesh(data=2, fsdp=2, tensor=2), 8)
    assert metrics.keys() == metrics8.keys()
    for key, value in metrics.items():
        assert metrics8[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=LARGE.get(name, 2e-5))
    params8, params, stats8, stats = jax.tree.map(np.asarray, (params8, params, stats8, stats))
    jax.tree.map(close, params8, params)
    jax.tree.map(close, stats8, stats)
    moved = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - b).max()), params, before)
    assert max(jax.tree.leaves(moved)) > 1e-4
    assert min(held.values()) <= (1 / 4 if name != "vae" else 1 / 2), "the largest are cut, by fsdp and by tensor"


def test_pairs_of_a_step_under_pmap_are_those_of_all_devices():
    (params, _), metrics, _, _ = train("clip", Mesh(), 1)
    (params8, _), metrics8, _, _ = train("clip", Mesh(), 8, strategy="pmap")
    assert metrics8 == pytest.approx(metrics, rel=1e-4, abs=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=2e-5), params8, params)
