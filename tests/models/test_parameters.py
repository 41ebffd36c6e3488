"""What a parameter says of itself where it is made: logical axes, kind, and whether it comes before the stack."""

import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import jaxmodels
from jaxmodels.errors import UserError
from jaxmodels.models import layers
from jaxmodels.models.families import family_of
from jaxmodels.models.model import Family, functional
from jaxmodels.models.parameters import Axes
from tests.zoo import ZOO

BEFORE = ("embed", "embed_norm", "patches", "positions", "relative", "types", "class_token")

TOLD_BY_NAMES = set("gpt2 llama mixtral mlp transformer cnn resnet vgg lstm vae gan bert vit clip".split())
"""Families of which there may be runs from when a parameter's kind was told by its name."""


def paths(tree):
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


@pytest.mark.parametrize("name", [name for name, (_, config) in ZOO.items() if family_of(config).name in TOLD_BY_NAMES])
def test_the_kinds_of_the_first_families_are_what_the_optimizer_has_always_taken_them_for(name):
    """Runs that go on after an update of this package must decay, factor and scale the same parameters."""
    found = paths(jaxmodels.create(ZOO[name][1]).axes())
    assert found
    for path, axes in found.items():
        *modules, leaf = path.split("/")
        kind = {"b": "bias", "w": "matrix"}.get(leaf, "norm")
        if kind == "matrix" and {"vocab", "positions"} & set(axes):
            kind = "embedding"
        assert axes.kind == kind, path
        assert axes.before_stack == (axes[:1] != ("layers",) and bool(set(modules) & set(BEFORE))), path


def test_axes_are_a_tuple_of_names_that_is_a_leaf_of_trees_and_survives_pickling():
    axes = Axes(("embed", None), "matrix", before_stack=True)
    assert axes == ("embed", None) and jax.tree.leaves({"w": axes}) == [axes]
    again = pickle.loads(pickle.dumps(axes))
    assert (again, again.kind, again.before_stack) == (axes, "matrix", True)


class Foreign(nn.Module):
    """A network with a parameter that nothing is said of."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        return nn.Dense(3)(layers.Linear((4,), ("features", "embed"), name="first")(x))


def test_a_parameter_of_unknown_kind_is_refused_by_name():
    family = Family(
        "foreign", dict, lambda c: Foreign(), lambda c, batch, length: (jax.ShapeDtypeStruct((batch, 2), jnp.float32),)
    )
    model = functional({}, family)
    assert model.apply(model.init(jax.random.key(0)), jnp.ones((1, 2))).shape == (1, 3)
    with pytest.raises(
        UserError, match="got parameter Dense_0/(bias|kernel) without logical axes and kind, expected one"
    ):
        model.axes()
