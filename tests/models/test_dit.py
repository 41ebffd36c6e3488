"""DiT: published sizes, what it is told of a picture, and that it begins with nothing; tests/parity has the rest."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmodels
from jaxmodels.errors import UserError
from jaxmodels.models.dit import DiTConfig
from jaxmodels.models.patches import cut, join
from tests.zoo import arrays

# at these shapes LLVM's optimizations take longer than all else
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
SIZES = {"input_shape": (8, 4, 3), "patch": 2, "layers": 2, "heads": 2, "width": 16, "mlp_width": 24}
B = 3


@pytest.fixture(scope="module")
def by_class():
    model = jaxmodels.create(DiTConfig(classes=5, **SIZES))
    return arrays(model), jit(model.apply)


@pytest.fixture(scope="module")
def by_text():
    model = jaxmodels.create(DiTConfig(classes=0, vocab_size=11, **SIZES))
    return arrays(model), jit(model.apply)


def images():
    return jnp.asarray(np.random.default_rng(0).normal(size=(B, 8, 4, 3)), jnp.float32)


TIMES = jnp.array([0.0, 500.0, 999.0])


def test_presets_have_the_published_number_of_parameters():
    published = {"dit-s2": 33, "dit-b2": 130, "dit-l2": 458, "dit-xl2": 675}  # table 1 of the paper, in millions
    assert {name: round(jaxmodels.create(name).count() / 1e6) for name in published} == published


def test_patches_are_put_together_as_they_were_cut():
    x = images()
    patches = cut(x, 2)
    assert patches.shape == (B, 8, 2, 2, 3)
    np.testing.assert_array_equal(patches[:, 3], x[:, 2:4, 2:4])
    np.testing.assert_array_equal(join(patches, 4), x)


def test_it_begins_with_blocks_that_change_nothing_and_outputs_of_0():
    model = jaxmodels.create(DiTConfig(classes=5, **SIZES))
    params = jit(model.init)(jax.random.key(0))
    assert not model.apply(params, images(), TIMES, jnp.arange(B)).any()
    still = [name for name, leaf in params["layers"].items() if not any(np.any(x) for x in jax.tree.leaves(leaf))]
    assert still == ["modulation"]


def test_without_a_label_a_picture_is_one_of_no_class(by_class):
    params, apply = by_class
    nothing = apply(params, images(), TIMES, jnp.full(B, 5))
    np.testing.assert_array_equal(apply(params, images(), TIMES), nothing)
    assert np.abs(apply(params, images(), TIMES, jnp.arange(B)) - nothing).min(axis=(1, 2, 3)).max() > 0


def test_time_and_class_change_what_is_found_in_every_row_alone(by_class):
    params, apply = by_class
    found = np.asarray(apply(params, images(), TIMES, jnp.array([0, 1, 2])))
    for times, labels in ((TIMES.at[1].set(501.0), [0, 1, 2]), (TIMES, [0, 3, 2])):
        other = np.asarray(apply(params, images(), times, jnp.array(labels)))
        np.testing.assert_allclose(other[[0, 2]], found[[0, 2]], atol=1e-5)
        assert np.abs(other[1] - found[1]).max() > 1e-3


def test_a_text_is_the_mean_of_its_tokens_without_padding(by_text):
    params, apply = by_text
    ask = lambda tokens, marks=None: np.asarray(apply(  # noqa: E731
        params, images(), TIMES, jnp.array([tokens] * B), segment_ids=None if marks is None else jnp.array([marks] * B)
    ))  # fmt: skip
    words = ask([4, 7, 0, 0], [1, 1, 0, 0])
    np.testing.assert_allclose(ask([7, 4, 9, 9], [1, 1, 0, 0]), words, atol=1e-5)
    np.testing.assert_allclose(ask([4, 7, 4, 7]), words, atol=1e-5)
    assert np.abs(ask([4, 8, 0, 0], [1, 1, 0, 0]) - words).max() > 1e-3
    nothing = np.asarray(apply(params, images(), TIMES))
    np.testing.assert_allclose(ask([4, 7, 0, 0], [0, 0, 0, 0]), nothing, atol=1e-6)
    assert np.abs(nothing - words).max() > 1e-3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"classes": 5, "vocab_size": 11}, "got classes 5 and vocab_size 11, expected pictures by classes or by texts"),
        ({"width": 18}, "got width 18, expected a multiple of 4, .*, try --model.width 20"),
        ({"patch": 3}, "got patch 3 with images of 8x4"),
        ({"heads": 3}, "got width 16 with heads 3"),
    ],
)
def test_what_does_not_fit_together_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        DiTConfig(**{**SIZES, **fields})
