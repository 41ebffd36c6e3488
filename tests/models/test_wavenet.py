"""WaveNet: sample by sample with a cache as at once, and exactly as far back as it says."""

import jax
import numpy as np
import pytest

import jaxmodels
from jaxmodels.errors import UserError
from jaxmodels.tasks.waveform import draw
from tests.zoo import arrays

B, T, V = 2, 40, 11


@pytest.fixture(scope="module")
def model():
    return jaxmodels.create("wavenet", levels=V, stacks=2, depth=3, width=8, skip=12, conditions=(3, 2))


@pytest.fixture(scope="module")
def given(model):
    samples = np.random.default_rng(0).integers(0, V, (B, T)).astype(np.int32)
    return arrays(model), samples, np.array([[0, 1], [2, 0]], np.int32)


def test_one_sample_at_a_time_with_a_cache_gives_what_all_at_once_give(model, given):
    params, samples, conditions = given

    @jax.jit
    def cached(params, samples):
        def step(cache, now):
            out, cache = model.apply(params, now[:, None], conditions, cache=cache)
            return cache, out[:, 0]

        return jax.lax.scan(step, model.cache(B, T), samples.T)[1].swapaxes(0, 1)

    whole = np.asarray(model.apply(params, samples, conditions))
    np.testing.assert_allclose(cached(params, samples), whole, atol=1e-5 * np.abs(whole).max())


def test_a_prediction_depends_on_as_many_samples_as_reach_says_and_on_no_later_one(model, given):
    params, samples, conditions = given
    last, reach = T - 5, model.config.reach
    apply = jax.jit(lambda x: model.apply(params, x, conditions)[:, last])
    before = np.asarray(apply(samples))

    def moved(at):
        other = samples.copy()
        other[:, at] = (other[:, at] + 1) % V
        return np.abs(np.asarray(apply(other)) - before).max()

    assert reach == 16
    assert moved(last - reach + 1) > 0 and moved(last) > 0
    assert moved(last - reach) == 0 and moved(last + 1) == 0


def test_a_sound_drawn_greedily_has_the_likeliest_code_at_each_place(given):
    model = jaxmodels.create("wavenet", stacks=1, depth=2, width=8, skip=8, conditions=(3, 2))
    params, conditions = arrays(model), given[2]
    codes = np.asarray(draw(model, {"model": params}, conditions, length=20, temperature=0))
    before = np.concatenate([np.full((B, 1), 128), codes[:, :-1]], 1).astype(np.int32)
    np.testing.assert_array_equal(np.asarray(model.apply(params, before, conditions)).argmax(-1), codes)
    # a row's draws do not depend on the rows beside it
    both = np.asarray(draw(model, {"model": params}, conditions, length=20, seed=3))
    one = np.asarray(draw(model, {"model": params}, conditions[:1], length=20, seed=3))
    np.testing.assert_array_equal(both[:1], one)
    assert (both != codes).any()


def test_published_sizes_follow_from_shapes():
    assert jaxmodels.create("wavenet-small").count() == 154176
    assert jaxmodels.create("wavenet-small").config.reach == 512


def test_several_samples_with_a_cache_and_missing_conditions_are_refused(model, given):
    params, samples, conditions = given
    with pytest.raises(UserError, match="got 40 samples of each row with a cache, expected 1"):
        model.apply(params, samples, conditions, cache=model.cache(B, T))
    with pytest.raises(UserError, match=r"got 0 conditions of each sound, expected 2, as model.conditions"):
        model.apply(params, samples)
