"""Layers split over `stage`: the same steps, with microbatches in sequence, in the time that theory predicts."""

import dataclasses
import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels import create, tasks
from jaxmodels.config import AdamW, CausalLM, Mesh, Stdlib
from jaxmodels.errors import UserError
from jaxmodels.models import pipeline
from jaxmodels.models.pipeline import Stack
from jaxmodels.parallel import rules
from jaxmodels.parallel.mesh import make_mesh, sizes
from jaxmodels.parallel.rules import Stages
from jaxmodels.plan import program
from jaxmodels.plan.groups import groups_of
from jaxmodels.train import state
from jaxmodels.train.job import check_batch_size
from tests.parallel import steps
from tests.parallel.steps import B, T, alone, measure
from tests.parallel.test_ring import collectives
from tests.quick import stacked

MODELS = {name: dataclasses.replace(model, layers=8 if name == "gpt2" else 4) for name, model in steps.MODELS.items()}


def mesh(**axes):
    return Mesh(**{"data": 1, **axes})


def place(cfg):
    count = int(np.prod([getattr(cfg, axis) for axis in rules.AXES]))
    return make_mesh(cfg, jax.devices()[:count])


@pytest.mark.parametrize(
    ("name", "cfg", "changes"),
    [
        ("gpt2", mesh(stage=4, rounds=2), {}),
        ("gpt2", mesh(stage=2, data=2, fsdp=2, rounds=2, microbatches=2), {"remat": "full"}),
        ("llama", mesh(stage=2, fsdp=2, rounds=2), {"remat": "dots"}),
        ("llama", mesh(stage=2, tensor=2, sequence=True), {}),
        ("llama", mesh(stage=2, context=2), {}),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_steps_are_those_of_one_device(name, cfg, changes):
    got = measure(dataclasses.replace(MODELS[name], **changes), cfg)
    expected = alone(MODELS[name])
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    assert expected[-1, 0] < expected[0, 0] - 0.1, "something must have been learned for this to mean anything"


FOUR = [
    {"data": 1, "stage": 2, "fsdp": 2, "expert": 2, "tensor": 2},
    {"data": 1, "fsdp": 2, "expert": 2, "context": 2, "tensor": 2, "sequence": True},
]


def test_four_axes_at_once_give_the_steps_of_one_device(root):
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=16")
    done = subprocess.run(
        [sys.executable, "-m", "tests.parallel.steps", "mixtral", *map(json.dumps, FOUR)],
        cwd=root,
        # two sends at once may each hold a thread of a device: with a thread a device, XLA's CPU backend may never end
        env={**os.environ, "XLA_FLAGS": flags, "PJRT_NPROC": "64"},
        capture_output=True,
        text=True,
        check=True,
    )
    for got in map(json.loads, done.stdout.splitlines()):
        np.testing.assert_allclose(got, alone(steps.MODELS["mixtral"]), rtol=1e-5, atol=1e-5)
    assert len(done.stdout.splitlines()) == len(FOUR)


def block(params, x, carried, shared, key):
    """Of a toy: it reads a row's own number and a common one, a number of its layer, and its key."""
    row, common = shared
    y = jnp.tanh(x @ params["w"] + row[:, None, None] * carried + common)
    noise = jnp.zeros(()) if key is None else jax.random.uniform(key)
    return y, {"sum": y.sum((0, 1)), "rows": jnp.ones(x.shape[0]).sum(), "noise": noise}


@pytest.mark.parametrize(
    ("stages", "unroll"),
    [(Stages(2), 2), (Stages(2, 3, 6), 1), (Stages(4, 2, 12), 1)],
)
def test_any_schedule_equals_a_scan_with_its_gradient(stages, unroll):
    L, rows, D, rng = 12 if stages.rounds != 2 else 16, 48, 4, np.random.default_rng(0)
    params = {"w": (rng.normal(size=(L, D, D)) / 2).astype(np.float32)}
    x = rng.normal(size=(rows, 3, D)).astype(np.float32)
    carried, shared = np.arange(L, dtype=np.float32), (rng.normal(size=rows).astype(np.float32), np.float32(0.1))

    def total(run):
        def loss(params, x, carried, shared):
            y, outputs = run(params, x, carried, shared)
            return (y**2).sum() + (outputs["sum"] * np.arange(D)).sum(), (y, outputs)

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))(params, x, carried, shared)

    def scan(params, x, carried, shared):
        return jax.lax.scan(lambda x, each: block(*each[:1], x, each[1], shared, None), x, (params, carried))

    expected = total(scan)
    with jax.set_mesh(place(mesh(stage=stages.stages, rounds=stages.rounds, microbatches=stages.microbatches))):
        got = total(functools.partial(pipeline.run_pipeline, Stack(block, L, "none", unroll), stages))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, expected)
    assert (got[0][1][1]["rows"] == rows).all(), "nothing of the bubble is counted"


def test_dropout_has_a_key_of_its_own_for_each_layer_and_microbatch():
    stages, L, key = Stages(2, 2, 4), 8, jax.random.key(3)
    args = {"w": np.zeros((L, 1, 1), np.float32)}, np.ones((8, 1, 1), np.float32), np.zeros(L, np.float32)
    with jax.set_mesh(place(mesh(stage=2, rounds=2, microbatches=4))):
        run = jax.jit(functools.partial(pipeline.run_pipeline, Stack(block, L), stages))
        _, outputs = run(*args, (np.zeros(8, np.float32), np.float32(0)), key)
    keys = [[jax.random.fold_in(jax.random.fold_in(key, layer), m) for m in range(4)] for layer in range(L)]
    expected = [sum(float(jax.random.uniform(k)) for k in row) for row in keys]
    np.testing.assert_allclose(outputs["noise"], expected, rtol=1e-5)


def test_what_is_not_a_number_in_the_bubble_reaches_nothing():
    def block(params, x, carried, shared, key):
        return x * params, {"root": jnp.log(x).sum()}  # -inf of the zeros before the first microbatch

    with jax.set_mesh(place(mesh(stage=4))):
        run = jax.jit(functools.partial(pipeline.run_pipeline, Stack(block, 4), Stages(4)))
        y, outputs = run(np.ones(4, np.float32), np.full((16, 2), 2.0, np.float32), None, ())
    np.testing.assert_array_equal(y, 2)
    np.testing.assert_allclose(outputs["root"], 32 * np.log(2), rtol=1e-5)


FAMILIES = {
    "clip": {
        **{f"{tower}_{size}": n for tower in ("image", "text") for size, n in (("layers", 4), ("heads", 2))},
        **{"input_shape": (8, 8, 3), "patch": 4, "vocab_size": 64, "context": 16, "embedding": 8},
        **{"image_width": 16, "image_mlp_width": 32, "text_width": 16, "text_mlp_width": 32},
    },
    "transformer": {"layers": 4, "width": 16, "heads": 2, "mlp_width": 32, "vocab_size": 64, "variant": "t5"},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_towers_and_translators_give_what_they_give_on_one_device(name):
    model, rng = create(name, **FAMILIES[name]), np.random.default_rng(0)
    params = jax.jit(model.init)(jax.random.key(0))
    inputs = [
        rng.integers(0, 64, x.shape).astype(np.int32) if x.dtype == jnp.int32 else rng.normal(size=x.shape)
        for x in model.inputs(B, T)
    ]
    ids = np.sort(rng.integers(0, 3, (B, T)), 1)[:, ::-1].astype(np.int32)
    expected = jax.jit(model.apply)(params, *inputs, segment_ids=ids)
    cfg = place(mesh(stage=2, rounds=2))
    with jax.set_mesh(cfg):
        placed = jax.device_put(params, rules.shardings_of(cfg, model.axes(), model.shapes()))
        got = jax.jit(model.apply)(placed, *inputs, segment_ids=ids)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, expected)


def compiled(cfg, **changes):
    """The compiled gradient of a GPT-2's features on a mesh: blocks, with nothing else that multiplies."""
    model, placed = create(dataclasses.replace(MODELS["gpt2"], attention="xla", **changes)), place(cfg)
    where = rules.shardings_of(placed, model.axes(), model.shapes())
    params = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), model.shapes(), where)
    tokens = jax.ShapeDtypeStruct((B, T), np.int32, sharding=rules.sharding(placed, ("batch", "seq")))
    with jax.set_mesh(placed):
        total = jax.grad(lambda params, tokens: (model.apply(params, tokens, head=False) ** 2).sum())
        return jax.jit(total, out_shardings=where).lower(params, tokens).compile()


def flops(text):
    found = program.parse(text)
    return sum(times * program.flops(found, inside, each) for inside, each, times in found.walk())


@functools.cache
def work():
    return flops(compiled(mesh()).as_text())


@pytest.mark.parametrize(("rounds", "microbatches"), [(1, 8), (2, 4)], ids=str)
def test_a_stage_works_for_so_many_ticks_as_theory_says_and_sends_to_its_neighbors(rounds, microbatches):
    text = compiled(mesh(stage=4, rounds=rounds, microbatches=microbatches)).as_text()
    turns = rounds * microbatches
    assert flops(text) == work() / 4 * (turns + 3) / turns
    found = program.parse(text)
    moves = [each for _, each, times in found.walk() if each.kind == "collective-permute" and times == turns + 3]
    pairs = {tuple(map(tuple, groups_of(each.attributes, 4))) for each in moves}
    up, down = tuple((i, (i + 1) % 4) for i in range(4)), tuple((i, (i - 1) % 4) for i in range(4))
    assert {frozenset(p) for p in pairs} == {frozenset(up), frozenset(down)}, "along the ring of stages"
    gathered = [each.shape for _, each, _ in found.walk() if each.kind == "all-gather"]
    assert not gathered, "no weights are collected, of several rounds neither"
    assert ("all-to-all" in collectives(text)) <= (rounds > 1)


def test_a_device_holds_its_stages_share_of_layers_and_their_optimizer():
    task = tasks.build(CausalLM(), MODELS["gpt2"], Stdlib(seq_len=T, batch_size=B))
    optimizers = {"loss": AdamW().build(1, task.axes()["model"])}

    def held(cfg):
        """Numbers of a device in parameters and moments of the layers."""
        layout = state.layout(task, optimizers, place(cfg))
        leaves = [x for x in jax.tree.leaves((layout.params, layout.opt_state)) if x.ndim and x.shape[0] == 8]
        return sum(int(np.prod(leaf.sharding.shard_shape(leaf.shape))) for leaf in leaves)

    whole = sum(x.size for x in jax.tree.leaves(create(MODELS["gpt2"]).shapes()["layers"]))
    assert held(mesh()) == 3 * whole
    assert held(mesh(stage=8)) == 3 * whole / 8


@pytest.mark.parametrize(("remat", "kept"), [("none", None), ("dots", 7), ("full", 1)])
def test_of_several_rounds_no_weights_and_no_more_than_asked_for_is_kept_from_tick_to_tick(remat, kept):
    model, length = create(dataclasses.replace(MODELS["llama"], remat=remat, attention="xla")), 12  # as no weight has
    with jax.set_mesh(place(mesh(stage=2, fsdp=2, rounds=2, microbatches=4))):
        total = jax.grad(lambda params, tokens: (model.apply(params, tokens, head=False) ** 2).sum())
        jaxpr = jax.make_jaxpr(total)(model.shapes(), jax.ShapeDtypeStruct((B, length), np.int32)).jaxpr
    forward = next(eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan" and eqn.params["length"] == 9)
    floats = [x.shape for x in stacked(forward) if x.dtype == np.float32]
    assert all(length in shape[3:] for shape in floats), "of each something that has tokens"
    assert kept is None or len(floats) == kept


@pytest.mark.parametrize(
    ("cfg", "said"),
    [
        (mesh(rounds=2), r"got rounds=2 on a mesh with stage=1, expected more stages, try --mesh.stage 2$"),
        (mesh(stage=4, microbatches=6), r"microbatches 6, expected a multiple of mesh.stage 4, try .*microbatches 8$"),
    ],
)
def test_what_a_mesh_cannot_do_is_refused(cfg, said):
    with pytest.raises(UserError, match=said):
        sizes(cfg, cfg.stage)


def test_layers_rows_and_models_that_do_not_fit_are_refused():
    def lay(model, cfg):
        return rules.shardings_of(place(cfg), model.axes(), model.shapes())

    with pytest.raises(UserError, match=r"layers=4, expected a multiple of mesh axis stage=8, try .*--mesh.stage 1$"):
        lay(create(MODELS["llama"]), mesh(stage=8))
    with pytest.raises(UserError, match=r"layers=4, expected a multiple of mesh.stage 4 x mesh.rounds 2, try"):
        lay(create(MODELS["llama"]), mesh(stage=4, rounds=2))
    with pytest.raises(UserError, match=r"mesh.stage 2 for a model without stacked layers.*try --mesh.stage 1$"):
        lay(create("mlp"), mesh(stage=2))
    where = sizes(mesh(stage=2, fsdp=4), 8)
    check_batch_size(where, 32, 4, "jit")
    with pytest.raises(UserError, match=r"20, expected a multiple of 8 \(mesh stage\*data\*fsdp\*expert = 8, train"):
        check_batch_size(where, 20, 1, "jit")
    with pytest.raises(UserError, match=r"16, expected a multiple of 32 .*expert = 4, .*, mesh.microbatches = 8\)"):
        check_batch_size(sizes(mesh(stage=2, fsdp=4, microbatches=8), 8), 16, 1, "jit")
    with jax.set_mesh(place(mesh(stage=2))), pytest.raises(UserError, match=r"got 7 rows for 2 stages.*-size 8"):
        model = create(MODELS["llama"])
        jax.eval_shape(model.apply, model.shapes(), jax.ShapeDtypeStruct((7, T), np.int32))


def test_a_cache_stays_with_its_layers():
    model = create(MODELS["gpt2"])
    params, tokens = jax.jit(model.init)(jax.random.key(0)), np.arange(6, dtype=np.int32).reshape(1, 6)
    expected, _ = jax.jit(model.apply)(params, tokens, cache=model.cache(1, 8))
    with jax.set_mesh(place(mesh(stage=2))):
        got, _ = jax.jit(model.apply)(params, tokens, cache=model.cache(1, 8))
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("stages", "rows", "shards", "count"),
    [(Stages(4), 64, 2, 16), (Stages(4), 24, 2, 12), (Stages(4), 8, 2, 4), (Stages(4), 12, 2, None)],
)
def test_microbatches_are_as_many_as_divide_up_to_four_a_stage(stages, rows, shards, count):
    assert pipeline.microbatches(stages, rows, shards) == count
