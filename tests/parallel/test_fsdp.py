"""Parameters sharded by fsdp are whole on a device only while they are used."""

import dataclasses

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.config import Mesh
from jaxmodels.models import families
from jaxmodels.models.gpt2 import GPT2Config
from jaxmodels.models.llama import LlamaConfig
from jaxmodels.models.mixtral import MixtralConfig
from jaxmodels.parallel import rules
from jaxmodels.parallel.mesh import make_mesh

# wide and short: the weights of all layers are many times the activations
SPARSE = MixtralConfig(
    layers=8, width=128, heads=4, kv_heads=4, mlp_width=128, experts=8, vocab_size=64, attention="xla"
)
MODELS = {
    "gpt2": GPT2Config(layers=8, width=128, heads=4, vocab_size=64, context=8, attention="xla", unroll=1),
    "llama": LlamaConfig(layers=8, width=128, heads=4, kv_heads=4, mlp_width=512, vocab_size=64, attention="xla"),
    "mixtral": SPARSE,
    "mixtral with a capacity": dataclasses.replace(SPARSE, routing="capacity"),
}


def compiled(model, mesh):
    """Gradients of a sum over the logits, and the shapes of parameters."""
    axes, shapes = model.axes(), model.shapes()
    placed = rules.shardings_of(mesh, axes, shapes)
    params = jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes, placed)
    tokens = jax.ShapeDtypeStruct((8, 8), jnp.int32, sharding=rules.sharding(mesh, ("batch", "seq")))
    with jax.set_mesh(mesh):
        gradients = jax.jit(jax.grad(lambda p, t: model.apply(p, t).sum()), out_shardings=placed)
        return gradients.lower(params, tokens).compile(), shapes


@pytest.mark.parametrize("name", MODELS)
def test_the_backward_pass_gathers_weights_again_and_keeps_none(name):
    program, shapes = compiled(families.create(MODELS[name]), make_mesh(Mesh(data=1, fsdp=8)))
    stack = sum(np.prod(leaf.shape) * 4 for leaf in jax.tree.leaves(shapes["layers"]))
    # its own gradients, an eighth, and a layer or two at a time
    assert program.memory_analysis().temp_size_in_bytes < 0.75 * stack


def gathers(jaxpr, shape):
    """Number of weights of a shape that are gathered whole in a jaxpr and in those inside it."""
    found = 0
    for each in jaxpr.eqns:
        if each.primitive.name == "sharding_constraint" and each.outvars[0].aval.shape == shape:
            found += "fsdp" not in str(each.params["sharding"].spec)
        found += sum(gathers(inner, shape) for inner in jax.extend.core.jaxprs_in_params(each.params))
    return found


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_a_block_gathers_its_weights_once_forward_and_once_backward_also_if_it_is_computed_again(remat):
    """A GPU's compiler does not see that a gather for the gradients equals that of the recomputation."""
    model = families.create(dataclasses.replace(MODELS["llama"], remat=remat))
    tokens = jnp.zeros((8, 8), jnp.int32)
    with jax.set_mesh(make_mesh(Mesh(data=1, fsdp=8))):
        gradients = jax.make_jaxpr(jax.grad(lambda p: model.apply(p, tokens).sum()))(model.shapes())
    assert gathers(gradients.jaxpr, (128, 512)) == 2 * 2, "gate and up"


def test_gradients_of_a_block_that_is_computed_again_are_those_of_one_that_is_not():
    mesh = make_mesh(Mesh(data=1, fsdp=8))
    tokens = jnp.arange(64).reshape(8, 8)
    params = families.create(dataclasses.replace(MODELS["llama"], layers=2)).init(jax.random.key(0))
    found = []
    for remat in ("none", "full"):
        model = families.create(dataclasses.replace(MODELS["llama"], remat=remat, layers=2))
        with jax.set_mesh(mesh):
            placed = jax.device_put(params, rules.shardings_of(mesh, model.axes(), model.shapes()))
            found.append(jax.jit(jax.grad(lambda p, model=model: jnp.square(model.apply(p, tokens)).mean()))(placed))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), *found)
