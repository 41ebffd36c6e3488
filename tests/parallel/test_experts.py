"""Experts that stay on their devices: tokens go to them, in as many rounds as it takes, and none is dropped."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.config import Mesh
from jaxmodels.models import experts, families
from jaxmodels.parallel import rules
from jaxmodels.parallel.mesh import make_mesh
from jaxmodels.plan import program
from tests.parallel import steps
from tests.parallel.steps import MODELS, measure
from tests.quick import stacked

B, T, E, K, D, F = 16, 8, 8, 2, 8, 12
MESHES = {
    "expert2": Mesh(data=1, expert=2),
    "expert8": Mesh(data=1, expert=8),
    "expert4-data2": Mesh(data=2, expert=4),
    "expert2-fsdp2-data2": Mesh(data=2, expert=2, fsdp=2),
    "expert2-tensor2": Mesh(data=1, expert=2, tensor=2),
    "expert2-tensor2-sequence": Mesh(data=1, expert=2, tensor=2, sequence=True),
    "expert2-context2": Mesh(data=1, expert=2, context=2),
}
ROUTINGS = ("even", "random", "one")


def place(cfg):
    return make_mesh(cfg, jax.devices()[: int(np.prod([getattr(cfg, axis) for axis in rules.AXES]))])


def route(routing):
    """Experts of each token: each as often as any other in each row, as it comes, or the same for all."""
    rng = np.random.default_rng(0)
    if routing == "random":
        return np.argsort(rng.normal(size=(B, T, E)), -1)[..., :K].astype(np.int32)
    if routing == "one":
        return np.broadcast_to(np.array([3, 2], np.int32), (B, T, K))
    return ((np.arange(B * T).reshape(B, T, 1) + np.array([0, 3])) % E).astype(np.int32)


def inputs(routing):
    rng = np.random.default_rng(1)
    x, gate, up, down = (
        0.4 * rng.normal(size=shape).astype(np.float32) for shape in ((B, T, D), (E, D, F), (E, D, F), (E, F, D))
    )
    return x, rng.random((B, T, K)).astype(np.float32), (gate, up, down), route(routing)


def total(x, share, weights, chosen):
    y = experts.dropless(x, chosen, share, weights, jax.nn.silu)
    return jnp.sin(y).sum(), y


close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


@functools.cache
def alone(routing):
    assert rules.ambient() is None
    return jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(*inputs(routing))


def sharded(mesh):
    """Where the arguments of `total` are."""
    weights = tuple(rules.sharding(mesh, names) for names in experts.AXES)
    return *(rules.sharding(mesh, ("batch", "seq", None)),) * 2, weights, rules.sharding(mesh, ("batch", "seq", None))


@pytest.mark.parametrize("name", MESHES)
def test_values_and_gradients_are_those_of_one_device_however_tokens_choose(name):
    mesh = place(MESHES[name])
    where = sharded(mesh)
    with jax.set_mesh(mesh):
        run = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True), out_shardings=((None, None), where[:3]))
        got = {routing: run(*jax.device_put(inputs(routing), where)) for routing in ROUTINGS}
    for routing in ROUTINGS:
        jax.tree.map(close, got[routing], alone(routing))


def test_in_bfloat16_too():
    x, share, weights, chosen = inputs("random")
    mesh = place(MESHES["expert2-fsdp2-data2"])
    with jax.set_mesh(mesh):
        args = jax.device_put((x.astype(jnp.bfloat16), share, weights, chosen), sharded(mesh))
        got = jax.tree.leaves(jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(*args))
    assert [leaf.dtype.name for leaf in got] == ["bfloat16"] * 3 + ["float32"] * 4
    for a, b in zip(got[1:], jax.tree.leaves(alone("random"))[1:], strict=True):
        assert np.abs(np.asarray(a, np.float32) - b).max() < 0.03 * np.abs(b).max()


def test_even_choices_take_one_round_and_others_as_many_as_they_need():
    mesh = place(MESHES["expert4-data2"])
    rows = rules.spec(("batch", None, None))

    def rounds(chosen):
        axes = experts.MeshAxes(expert=("expert",), every=mesh.axis_names)
        exchange, route = experts._route(axes, chosen.reshape(-1, K), E // 4)
        return jnp.full((1, 1, 1), route.rounds), jnp.full((1, 1, 1), exchange.most)

    run = jax.jit(jax.shard_map(rounds, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False))
    found = {routing: [set(np.ravel(x).tolist()) for x in run(route(routing))] for routing in ROUTINGS}
    assert found["even"] == [{1}, {2}]
    assert found["one"] == [{2}, {2}]
    mixed = route("even").copy()
    mixed[:2] = route("one")[:2]  # the rows of one device
    assert [set(np.ravel(x).tolist()) for x in run(mixed)] == [{2}, {2}], "all go on until the last is through"


def test_rows_travel_weights_stay_and_no_buffer_is_as_large_as_the_worst_case():
    cfg = MESHES["expert8"]
    mesh = place(cfg)
    where = sharded(mesh)
    args = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), inputs("one"), where)
    with jax.set_mesh(mesh):
        run = jax.jit(jax.grad(lambda *args: total(*args)[0], (0, 1, 2)), out_shardings=where[:3])
        text = run.lower(*args).compile().as_text()
    found = [each for _, each, _ in program.parse(text).walk() if each.kind]
    assert {each.kind for each in found} == {"all-to-all", "all-reduce"}
    # rows of x, their shares, and counts
    small = r"f32\[1,8\]|f32\[8,8\]|f32\[8\]|f32\[1\]|s32"
    assert all(re.search(small, each.shape) for each in found if each.kind == "all-to-all")
    rows = B * T // 8 * K
    whole = {int(n) for n, width in re.findall(r"f32\[(\d+),(\d+)\]", text) if int(width) in (D, F)}
    assert rows < max(whole) < B * T, "rows that come to a device if all tokens choose its expert"
    assert f"f32[{E},{D},{F}]" not in text and f"f32[{E},{F},{D}]" not in text


def test_stages_whose_tokens_choose_differently_go_on_until_all_are_through():
    """Each needs another number of rounds, and all devices take part in each."""
    both = ("even", "one")
    args = jax.tree.map(lambda *x: np.stack(x), *map(inputs, both))
    with jax.set_mesh(place(Mesh(data=1, stage=2, expert=4))), rules.inside(rules.STAGE):
        run = jax.value_and_grad(total, (0, 1, 2), has_aux=True)
        got = jax.jit(jax.vmap(run, spmd_axis_name=rules.STAGE))(*args)
    jax.tree.map(lambda a, *b: close(a, np.stack(b)), got, *map(alone, both))


def test_a_pipeline_of_several_rounds_keeps_no_weights_from_tick_to_tick_but_the_products():
    sizes = dict(experts=8, width=20, head_dim=6, mlp_width=28)  # as no other dimension
    model = families.create(dataclasses.replace(MODELS["mixtral"], layers=4, attention="xla", **sizes))
    mesh = place(Mesh(data=1, stage=2, fsdp=2, expert=2, rounds=2, microbatches=4))
    with jax.set_mesh(mesh):
        gradient = jax.grad(lambda params, tokens: (model.apply(params, tokens, head=False) ** 2).sum())
        jaxpr = jax.make_jaxpr(gradient)(model.shapes(), jax.ShapeDtypeStruct((16, 12), np.int32)).jaxpr
    forward = next(eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan" and eqn.params["length"] == 9)
    kept = [x.shape for x in stacked(forward)]
    assert not [shape for shape in kept if {20, 28} <= {*shape}]
    assert len([shape for shape in kept if 28 in shape]) == 2, "gate and up of the rows"


@pytest.mark.parametrize(
    ("axes", "changes"),
    [
        ({"tensor": 2}, {}),
        ({"fsdp": 2, "tensor": 2, "sequence": True}, {"remat": "dots"}),
    ],
    ids=lambda x: "-".join(x) or "alone",
)
def test_steps_are_those_of_one_device(axes, changes):
    got = measure(dataclasses.replace(MODELS["mixtral"], **changes), Mesh(data=1, expert=2, **axes))
    close(got, steps.alone(MODELS["mixtral"]))
