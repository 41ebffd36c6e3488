"""What every family keeps: the contract of a model, whatever it computes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmodels
from jaxmodels.models import families, flops
from jaxmodels.parallel import rules
from tests.zoo import ZOO, arrays, example, outputs

CONFIGS = {name: config for name, (_, config) in ZOO.items()}
ELSEWHERE = ("gpt2", "llama", "mistral", "qwen", "mixtral")
"""Whose scans, recomputation and rounding test_decoders.py and test_mixtral.py look at."""


ROUNDED = ("yolox", "rt-detr")
"""Whose outputs in bfloat16 test_vision.py and test_set_detection.py look at: the second chooses other queries."""


def having(*fields):
    """Names of the configs that have any of these fields; BERT once, since its heads are outside of its blocks."""
    others = {"bert-classifier", "bert-spans", "bert-sentences", *ELSEWHERE}
    rest = {name: config for name, config in CONFIGS.items() if name not in others}
    return [name for name, config in rest.items() if any(hasattr(config, field) for field in fields)]


def calm(config, **changes):
    """The config without dropout, changed."""
    still = {"dropout": 0.0} if hasattr(config, "dropout") else {}
    return dataclasses.replace(config, **{**still, **changes})


def close(got, expected, least=1):
    """Equal within 2e-5 of the largest number of each array, or of `least`."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(least, np.abs(b).max())), got, expected
    )


@functools.cache
def gradients(name, **changes):
    """Outputs in training, and the gradients of a sum of them over the parameters, with a fixed key."""
    model = jaxmodels.create(calm(CONFIGS[name], **changes))
    params, stats = arrays(model), model.stats() or None
    how = {"every": True} if name == "rt-detr" else {}  # the choice of its queries learns from outputs of its own

    @jax.jit
    def compute(params):
        def loss(params):
            out = outputs(model, params, stats, train=True, rng=jax.random.key(7), **how)
            return sum((jnp.sin(3 * x) * x).sum() for x in jax.tree.leaves(out)), out

        (_, out), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return out, grads

    return compute(params)


@functools.cache
def initial(name):
    """A compiled initialization."""
    return jax.jit(jaxmodels.create(CONFIGS[name]).init)


@functools.cache
def evaluate(name):
    """A compiled evaluation of parameters and inputs."""
    model = jaxmodels.create(CONFIGS[name])
    stats = model.stats() or None
    return jax.jit(lambda params, inputs: outputs(model, params, stats, inputs=inputs))


def test_every_family_is_here():
    assert {families.family_of(config).name for config in CONFIGS.values()} == set(families.FAMILIES.names())


@pytest.mark.parametrize("name", CONFIGS)
def test_axes_name_every_dimension_of_every_parameter(name):
    model = jaxmodels.create(CONFIGS[name])
    shapes, axes = model.shapes(), model.axes()
    is_names = lambda leaf: isinstance(leaf, tuple)  # noqa: E731
    assert jax.tree.structure(shapes) == jax.tree.structure(axes, is_leaf=is_names)
    for leaf, names in zip(jax.tree.leaves(shapes), jax.tree.leaves(axes, is_leaf=is_names), strict=True):
        assert len(names) == len(leaf.shape)
        assert set(names) <= set(rules.RULES)
        rules.spec(names)  # no two dimensions on the same mesh axis
    large = [leaf.size for leaf in jax.tree.leaves(shapes)]
    cut = [
        leaf.size
        for leaf, names in zip(jax.tree.leaves(shapes), jax.tree.leaves(axes, is_leaf=is_names), strict=True)
        if any(rules.RULES[name] for name in names)
    ]
    assert sum(cut) > 0.8 * sum(large), "all but norms and small tables can be sharded"


@pytest.mark.parametrize("name", CONFIGS)
def test_initial_params_are_a_plain_dict_and_a_function_of_the_key(name):
    model = jaxmodels.create(CONFIGS[name])
    init = initial(name)
    params, again, other = init(jax.random.key(0)), init(jax.random.key(0)), init(jax.random.key(1))
    kinds = set()

    def walk(tree):
        kinds.add(type(tree))
        for value in tree.values():
            walk(value) if isinstance(value, dict) else kinds.add(type(value))

    walk(params)
    assert kinds == {dict, type(jnp.zeros(()))}
    given = jax.tree.map(lambda x: (x.shape, x.dtype), params)
    assert given == jax.tree.map(lambda x: (x.shape, x.dtype), model.shapes())
    assert {dtype for _, dtype in jax.tree.leaves(given, is_leaf=lambda x: isinstance(x, tuple))} == {
        np.dtype("float32")
    }
    jax.tree.map(np.testing.assert_array_equal, params, again)
    assert any(not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(other), strict=True))


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ELSEWHERE])
def test_every_parameter_matters(name):
    _, grads = gradients(name)
    silent = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in jax.tree_util.tree_leaves_with_path(grads)
        if not np.abs(np.asarray(leaf)).max() > 1e-6
    ]
    # keys' biases add the same to all of a query's scores, so softmax does not see them; a bias before batch
    # normalization is taken away with the mean; Whisper's positions of sounds are given, not learned
    assert all(path.endswith(("/k/b", "conv/b", "encoder/positions")) for path in silent), silent


@pytest.mark.parametrize("name", having("unroll", "remat"))
def test_unrolled_and_recomputed_it_is_the_same_and_costs_what_it_says(name):
    changes = {field: value for field, value in (("unroll", 2), ("remat", "full")) if hasattr(CONFIGS[name], field)}
    (out, grads), (out2, grads2) = gradients(name), gradients(name, **changes)
    close(out2, out)
    close(grads2, grads, least=5)  # a bias in front of a batch normalization has a gradient of rounding alone
    if "remat" not in changes:
        return

    def cost(remat):
        model = jaxmodels.create(calm(CONFIGS[name], remat=remat))
        stats = model.stats() or None

        def loss(params):
            return sum(
                x.sum() for x in jax.tree.leaves(outputs(model, params, stats, train=True, rng=jax.random.key(0)))
            )

        return flops.count(jax.grad(loss), model.shapes())

    assert cost("full") > cost("none")


@pytest.mark.parametrize("name", [name for name in having("dtype") if name not in ROUNDED])
def test_bfloat16_is_float32_to_within_its_rounding(name):
    half = jaxmodels.create(CONFIGS[name], dtype="bfloat16")
    # DiT's outputs are 0 at first
    params = arrays(half) if name == "dit" else initial(name)(jax.random.key(0))
    inputs, stats = example(half), half.stats() or None
    exact = evaluate(name)(params, inputs)
    rounded = jax.jit(functools.partial(outputs, half))(params, stats)
    pairs = list(zip(jax.tree.leaves(exact), jax.tree.leaves(rounded), strict=True))
    assert all(a.dtype == b.dtype == jnp.float32 for a, b in pairs)
    errors = [float(np.abs(np.asarray(a - b)).max() / np.abs(np.asarray(a)).max()) for a, b in pairs]
    assert max(errors) < 2**-4, "rounding in the last of 8 bits, added up over the layers"
    assert max(errors) > 2**-14, "it was computed in bfloat16"


@pytest.mark.parametrize("name", having("dropout"))
def test_dropout_happens_in_training_only_and_is_a_function_of_the_key(name):
    model = jaxmodels.create(dataclasses.replace(CONFIGS[name], dropout=0.5))
    params, stats = arrays(model), model.stats() or None

    def run(rng, train):
        return jnp.concatenate(
            [x.ravel() for x in jax.tree.leaves(outputs(model, params, stats, train=train, rng=rng))]
        )

    training = jax.jit(functools.partial(run, train=True))
    one, same, other = (np.asarray(training(jax.random.key(seed))) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 1e-3
    if not hasattr(CONFIGS[name], "latents"):  # a key means sampling there, training or not
        drawn = [str(jax.make_jaxpr(functools.partial(run, train=train))(jax.random.key(0))) for train in (True, False)]
        assert ["random_bits" in text for text in drawn] == [True, False]


@pytest.mark.parametrize("name", CONFIGS)
def test_examples_do_not_see_one_another_in_evaluation(name):
    model = jaxmodels.create(CONFIGS[name])
    params, inputs = arrays(model), example(model)
    other = jax.tree.map(lambda x: np.concatenate([x[:1], x[:0:-1]]), inputs)
    run = evaluate(name)
    for a, b in zip(jax.tree.leaves(run(params, inputs)), jax.tree.leaves(run(params, other)), strict=True):
        if a.ndim:
            np.testing.assert_allclose(a[0], b[0], rtol=0, atol=1e-5)
