"""Products in eight bits: which they are, how near they come, and that a mesh changes nothing of them."""

import argparse
import collections
import contextlib
import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmodels import cli, tasks
from jaxmodels.config import CausalLM, Mesh, Stdlib, Train
from jaxmodels.errors import UserError
from jaxmodels.models import families
from jaxmodels.models import model as models
from jaxmodels.models.gpt2 import GPT2Config
from jaxmodels.models.kernels import quantized
from jaxmodels.models.kernels.quantized import KINDS, Rule
from jaxmodels.models.llama import LlamaConfig
from jaxmodels.parallel import rules
from jaxmodels.parallel.mesh import make_mesh

B, T, V = 8, 16, 64
LLAMA = LlamaConfig(vocab_size=V, layers=2, width=32, heads=4, kv_heads=2, mlp_width=64, attention="xla", remat="full")
GPT2 = GPT2Config(vocab_size=256, context=32, layers=2, width=64, heads=4)
TOKENS = np.random.default_rng(0).integers(0, V, (B, T)).astype(np.int32)
FORWARD = {"int8": ("int8", "int8"), "float8": ("float8_e4m3fn", "float8_e4m3fn")}


def products(jaxpr, found=None):
    """How often products of each pair of types occur in a jaxpr, a loop's body once."""
    found = collections.Counter() if found is None else found
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            found[tuple(str(x.aval.dtype) for x in eqn.invars)] += 1
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    products(inner, found)
    return found


def gradients(model, params, mesh=None):
    """The loss on TOKENS and its gradients, compiled for a mesh of two devices or for none."""

    def loss(params):
        logits = model.apply(params, TOKENS[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, TOKENS[:, 1:]).mean()

    where = contextlib.nullcontext()
    if mesh is not None:
        placed = make_mesh(mesh, jax.devices()[:2])
        params = jax.device_put(params, rules.shardings_of(placed, model.axes(), model.shapes()))
        where = jax.set_mesh(placed)
    with where:
        return jax.jit(jax.value_and_grad(loss))(params)


def cosines(one, other):
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return [float(np.vdot(a, b) / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in pairs]


@pytest.fixture(scope="module")
def params():
    return families.create(LLAMA).init(jax.random.key(0))


@pytest.fixture(scope="module")
def alone(params):
    """On one device, by kind."""
    plain = families.create(LLAMA)
    return {"none": gradients(plain, params)} | {
        kind: gradients(models.quantized(plain, Rule(kind)), params) for kind in KINDS
    }


def test_rounding_is_as_near_as_the_type_allows():
    x = jax.random.normal(jax.random.key(0), (16, 64)) * jnp.logspace(-8, 8, 16)[:, None]
    rows = quantized.quantize(x, "int8", (1,))
    assert rows.scale.shape == (16, 1)
    assert (abs(rows.values * rows.scale - x) <= 0.5001 * rows.scale).all(), "to the nearest of 255 values of a row"
    assert (abs(rows.values.astype(int)).max(1) == 127).all()
    y = x[8]
    whole = quantized.quantize(y, "float8_e4m3fn", None)
    near = whole.values.astype(jnp.float32) * whole.scale
    assert whole.scale.shape == (1,)
    # three bits behind the first, and below 2^-6 steps of 2^-9
    assert (abs(near - y) <= jnp.maximum(abs(y) / 16, whole.scale * 2**-10) * 1.0001).all()


@pytest.mark.parametrize("kind", KINDS)
def test_all_products_with_weights_of_blocks_and_no_others_are_in_eight_bits(kind, params):
    model = models.quantized(families.create(dataclasses.replace(LLAMA, remat="none")), Rule(kind))
    found = products(jax.make_jaxpr(jax.grad(lambda p: model.apply(p, TOKENS).sum()))(params).jaxpr)
    inside = 7  # q, k, v, o, gate, up, down
    attention, output = 2, 1
    assert found.pop(("float32", "float32")) == 3 * (attention + output)
    assert found[FORWARD[kind]] >= inside
    assert found.total() == 3 * inside
    if kind == "float8":
        assert found == {
            FORWARD[kind]: inside, ("float8_e5m2", "float8_e4m3fn"): inside, ("float8_e4m3fn", "float8_e5m2"): inside
        }  # fmt: skip


def test_the_rule_may_leave_attention_out(params):
    model = models.quantized(families.create(LLAMA), Rule("int8", ("embed", "mlp")))
    found = products(jax.make_jaxpr(lambda p: model.apply(p, TOKENS))(params).jaxpr)
    assert found[FORWARD["int8"]] == 3
    assert found["float32", "float32"] == 4 + 2 + 1


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_point_where_those_of_float32_do(kind, alone):
    (exact, expected), (loss, found) = alone["none"], alone[kind]
    assert abs(loss / exact - 1) < 2e-3
    assert min(cosines(found, expected)) > (0.999 if kind == "int8" else 0.98)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "mesh",
    [Mesh(data=1, fsdp=2), Mesh(data=1, tensor=2), Mesh(data=1, stage=2, microbatches=2)],
    ids=["fsdp", "tensor", "stage"],
)
def test_two_devices_compute_what_one_does(kind, mesh, params, alone):
    model = models.quantized(families.create(LLAMA), Rule(kind))
    (exact, expected), (loss, found) = alone[kind], gradients(model, params, mesh)
    if mesh.stage == 1:
        # sums in another order; what lay between two roundings may then fall to the other side
        assert abs(loss / exact - 1) < 1e-5
        assert min(cosines(found, expected)) > 0.9999
    else:
        # a microbatch has scales of its own: as far from one device's as those are from float32
        assert abs(loss / exact - 1) < 1e-3
        assert min(cosines(found, expected)) > (0.999 if kind == "int8" else 0.98)
        assert products(jax.make_jaxpr(lambda p: model.apply(p, TOKENS))(params).jaxpr)[FORWARD[kind]] == 7


@pytest.mark.parametrize("kind", KINDS)
def test_what_fsdp_gathers_is_in_eight_bits(kind, params):
    model = models.quantized(families.create(LLAMA), Rule(kind))
    mesh = make_mesh(Mesh(data=1, fsdp=2), jax.devices()[:2])
    shapes = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        model.shapes(), rules.shardings_of(mesh, model.axes(), model.shapes()),
    )  # fmt: skip
    with jax.set_mesh(mesh):
        text = jax.jit(jax.grad(lambda p: model.apply(p, TOKENS).sum())).lower(shapes).compile().as_text()
    gathered = re.findall(r"= (\w+)\[([\d,]+)\]\S* all-gather\(", text)
    weights = {"32,64", "64,32", "32,4,8", "4,8,32", "32,2,8"}
    # CPUs have no float8: there it travels as float16; the output layer, 64 by 32, stays in float32
    narrow = collections.Counter(dims for kind, dims in gathered if kind in ("s8", "f16"))
    assert narrow.keys() == weights
    assert narrow.total() >= 2 * 7, "in the forward pass and again in the backward pass"
    assert {dims for kind, dims in gathered if kind == "f32"} & weights == {"64,32"}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_a_number_stays_none(kind):
    x, w = jnp.ones((4, 8)).at[0, 0].set(jnp.nan), jnp.ones((8, 8))
    y, vjp = jax.vjp(lambda x, w: quantized.quantized_product(x, w, ("embed", "mlp"), 1, "float32", KINDS[kind]), x, w)
    assert jnp.isnan(y).any()
    assert jnp.isnan(vjp(jnp.ones_like(y))[1]).any()


def test_text_is_learned_as_well_as_in_float32():
    text = np.frombuffer(Path(argparse.__file__).read_bytes(), np.uint8).astype(np.int32)
    begins = np.random.default_rng(0).integers(0, len(text) - 32, (60, 8, 1))
    steps = text[begins + np.arange(33)]
    plain = families.create(GPT2)

    def learn(model):
        tx = optax.adamw(1e-3)

        def loss(params, rows):
            logits = model.apply(params, rows[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:]).mean()

        def step(carry, rows):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params, rows)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        params = plain.init(jax.random.key(0))
        return np.asarray(jax.jit(lambda carry: jax.lax.scan(step, carry, steps)[1])((params, tx.init(params))))

    exact = learn(plain)
    assert exact[-16:].mean() < exact[0] - 2, "the model must have learned something for this to mean anything"
    for kind in KINDS:
        assert abs(learn(models.quantized(plain, Rule(kind)))[-16:].mean() / exact[-16:].mean() - 1) < 0.003


def test_the_task_of_an_experiment_is_quantized():
    assert Train().quantize_axes == quantized.AXES
    task = tasks.build(CausalLM(), LLAMA, Stdlib(seq_len=T), Train(quantize="int8"))
    batch = {"tokens": TOKENS, "targets": TOKENS}
    shapes = {"model": task.networks["model"].shapes()}
    found = products(jax.make_jaxpr(lambda p: task.metrics(p, {}, batch))(shapes).jaxpr)
    assert found[FORWARD["int8"]] == 7


def test_a_model_without_such_products_is_refused_in_one_line(root, capsys, tmp_path):
    arguments = ["--train.quantize", "int8", "--eval.batch-size", "8", "--run-dir", str(tmp_path / "run")]
    assert cli.main(["train", str(root / "configs" / "wgan_mnist.py"), *arguments]) == 2
    assert "try --train.quantize none" in capsys.readouterr().err
    with pytest.raises(UserError, match="ResNetConfig"):
        models.quantized(families.create("resnet"), Rule("int8"))
