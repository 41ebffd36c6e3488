"""Parameters sharded by fsdp are whole on a device only while they are used."""

import dataclasses

import jax
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
