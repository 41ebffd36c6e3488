"""Diffusion and flow matching: closed forms, exact samplers for known distributions, guidance, and what is drawn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels import tasks
from jaxmodels.config import Stdlib
from jaxmodels.errors import UserError
from jaxmodels.models.dit import DiTConfig
from jaxmodels.models.vit import ViTConfig
from jaxmodels.tasks.noise import Process, guided
from tests.sections import task_of
from tests.zoo import arrays

# at these shapes LLVM's optimizations take longer than all else
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
SHAPE, CLASSES, T = (4, 4, 1), 3, 5
SIZES = {"input_shape": SHAPE, "patch": 2, "layers": 1, "heads": 2, "width": 8, "mlp_width": 8}
MODELS = {"class": DiTConfig(classes=CLASSES, **SIZES), "text": DiTConfig(classes=0, vocab_size=7, **SIZES)}
KINDS = [("epsilon", "linear"), ("epsilon", "cosine"), ("v", "cosine"), ("flow", "linear")]


def build(by="class", **fields):
    return tasks.build(task_of("diffusion", **fields), MODELS[by], Stdlib(seq_len=T))


def batch(rows=6):
    rng = np.random.default_rng(0)
    return {"inputs": rng.integers(0, 256, (rows, *SHAPE)).astype(np.uint8), "labels": np.arange(rows) % CLASSES}


def params_of(task):
    return {"model": arrays(task.networks["model"])}


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_signals_are_the_papers(schedule):
    found = Process("epsilon", schedule).signals
    if schedule == "linear":  # Ho et al. 2020, section 4
        expected = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    else:  # Nichol & Dhariwal 2021, equation 17, with variances of at most 0.999
        f = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
        expected = np.append(f[1:-1] / f[0], f[-2] / f[0] * 0.001)
    assert found[0] == 1
    np.testing.assert_allclose(found[1:], expected, rtol=1e-9)


@pytest.mark.parametrize(("objective", "schedule"), KINDS)
def test_a_perfect_prediction_means_the_image_and_the_noise(objective, schedule):
    process = Process(objective, schedule)
    rng = np.random.default_rng(0)
    images, noise = (jnp.asarray(rng.uniform(-1, 1, (4, *SHAPE)), jnp.float32) for _ in range(2))
    for share in (0.0005, 0.3, 0.9):
        time = process.time(jnp.full(4, share))
        x, target = process.mix(images, noise, time), process.target(images, noise, time)
        found, drawn = process.parts(target, x, time[0])
        np.testing.assert_allclose(found, images, atol=2e-4)
        np.testing.assert_allclose(drawn, noise, atol=2e-3 if share < 0.001 else 2e-4)
    a, s = process.level(process.grid(10))
    np.testing.assert_allclose(a + s if objective == "flow" else a**2 + s**2, 1, rtol=1e-5)
    assert (np.diff(a) > 0).all() and (a[-1], s[-1]) == (1, 0)


@pytest.mark.parametrize(("objective", "schedule", "eta"), [(*kind, 0.0) for kind in KINDS] + [("v", "cosine", 1.0)])
def test_the_exact_prediction_for_a_normal_distribution_gives_that_distribution(objective, schedule, eta):
    """Pixels with mean 0.3 and deviation 0.1, of which the best prediction is known."""
    process, mean, variance = Process(objective, schedule), 0.3, 0.01

    def predict(x, told):
        time = told[0] if objective == "flow" else told[0] + 1
        a, s = process.level(time)
        image = mean + variance * a / (variance * a**2 + s**2) * (x - a * mean)
        return process.target(image, (x - a * image) / s, jnp.full(len(x), time))

    x = jax.random.normal(jax.random.key(0), (4000, 1))
    found = np.asarray(jit(lambda x: process.sample(predict, x, jax.random.key(1), 1000, eta))(x))
    assert found.mean() == pytest.approx(mean, abs=0.01)
    assert found.std() == pytest.approx(variance**0.5, rel=0.06)
    if not eta:
        assert np.corrcoef(found[:, 0], x[:, 0])[0, 1] > 0.999, "noise decides alone"


def test_guidance_moves_away_from_what_is_found_of_anything():
    x, times = jnp.ones((2, 1)), jnp.zeros(2)

    def predict(x, times, asked):
        return jnp.where(asked[:, None], 3.0, 1.0) * x

    np.testing.assert_array_equal(guided(predict, 1.0)(x, times), 3 * x)
    np.testing.assert_array_equal(guided(predict, 2.5)(x, times), 6 * x)
    np.testing.assert_array_equal(guided(predict, 0.0)(x, times), x)


@pytest.mark.parametrize("objective", ["epsilon", "flow"])
def test_the_loss_is_the_mean_squared_error_of_the_rows_that_count(objective):
    task = build(objective=objective, label_dropout=0.0)
    params, rows, key = params_of(task), batch(), jax.random.key(1)
    total, aux = jit(task.losses[0].fn)(params, {}, rows, key)
    keys, process = jax.random.split(key, 4), Process(objective)
    noise, share = jax.random.normal(keys[0], (6, *SHAPE)), jax.random.uniform(keys[1], (6,))
    images, time = rows["inputs"] / 127.5 - 1, process.time(share)
    x = process.mix(images, noise, time)
    found = task.networks["model"].apply(params["model"], x, process.timestep(time), rows["labels"])
    each = np.square(found - (noise - images if objective == "flow" else noise)).mean((1, 2, 3))
    np.testing.assert_allclose(total, each.sum(), rtol=1e-4)
    assert aux.weight == 6
    rows["labels"] = np.where([1, 0, 1, 1, 0, 1], rows["labels"], -1)
    total, aux = jit(task.losses[0].fn)(params, {}, rows, key)
    np.testing.assert_allclose(total, each[[0, 2, 3, 5]].sum(), rtol=1e-4)
    assert aux.weight == 4


@pytest.mark.parametrize("by", MODELS)
def test_a_share_of_what_is_asked_for_is_withheld(by):
    """With all of it withheld the table of classes or words learns nothing, but for the row of no class."""
    task = build(by, label_dropout=1 - 1e-7)
    rows = batch()
    if by == "text":
        words = np.arange(6 * T).reshape(6, T) % 7
        rows = {"images": rows["inputs"], "tokens": words, "segment_ids": np.ones_like(words)}
    grads = jit(jax.grad(lambda p: task.losses[0].fn(p, {}, rows, jax.random.key(0))[0]))(params_of(task))["model"]
    table = np.abs(grads["words" if by == "text" else "classes"]["w"]).max(-1)
    assert not table[:CLASSES].any()
    assert by == "text" or table[CLASSES] > 0


def test_evaluation_is_a_function_of_the_examples():
    task = build()
    params, rows = params_of(task), batch()
    measure = jit(task.metrics)
    whole = measure(params, {}, rows)["loss"]
    halves = [measure(params, {}, {name: x[i::2] for name, x in rows.items()})["loss"] for i in (0, 1)]
    np.testing.assert_allclose(whole[0], sum(total for total, _ in halves), rtol=1e-5)
    assert whole[1] == 6


@pytest.fixture(scope="module")
def drawing():
    task = build(guidance=2.0, sample_steps=3)
    return task, params_of(task)


def test_pictures_are_of_the_classes_that_are_given_or_of_all_in_turn(drawing):
    task, params = drawing
    turn = np.asarray(task.samples(params, {}, 4, 1))
    given = np.asarray(task.samples(params, {}, 4, 1, given={"labels": jnp.array([0, 1, 2, 0])}))
    np.testing.assert_array_equal(turn, given)
    assert turn.shape == (4, *SHAPE) and turn.min() >= 0 and turn.max() <= 1
    other = np.asarray(task.samples(params, {}, 4, 1, given={"labels": jnp.array([0, 1, 1, 0])}))
    assert [bool(np.any(a != b)) for a, b in zip(other, turn, strict=True)] == [False, False, True, False]
    two = build(guidance=2.0, sample_steps=3, draw=(2, 1))
    np.testing.assert_array_equal(
        two.samples(params, {}, 4, 1), task.samples(params, {}, 4, 1, given={"labels": jnp.array([2, 1, 2, 1])})
    )


def test_the_path_leads_from_noise_to_the_pictures(drawing):
    task, params = drawing
    path = np.asarray(task.path(params, {}, 4, 1))
    assert path.shape == (4, 4, *SHAPE)
    np.testing.assert_allclose(path[-1], task.samples(params, {}, 4, 1), atol=1e-6)
    noise = jax.random.normal(jax.random.split(jax.random.key(1))[0], (4, *SHAPE))
    np.testing.assert_allclose(path[0], np.clip((noise + 1) / 2, 0, 1), atol=1e-6)


def test_pictures_by_text_without_one_are_of_anything():
    task = build("text", sample_steps=2)
    params = params_of(task)
    words = {"tokens": jnp.array([[3, 4]] * 2), "segment_ids": jnp.array([[1, 1]] * 2)}
    nothing = {"tokens": words["tokens"], "segment_ids": jnp.zeros((2, 2), int)}
    anything = task.samples(params, {}, 2, 1)
    np.testing.assert_allclose(task.samples(params, {}, 2, 1, given=nothing), anything, atol=1e-6)
    assert np.abs(task.samples(params, {}, 2, 1, given=words) - anything).max() > 1e-3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schedule": "cosine"}, "got task.schedule cosine for a flow, .*, try --task.objective v"),
        ({"eta": 1.0}, "got task.eta 1.0 for a flow"),
        (
            {"objective": "v", "sample_steps": 2000},
            "got task.sample_steps 2000, expected at most task.noise_steps 1000",
        ),
        ({"guidance": 2.0, "label_dropout": 0.0}, "got task.guidance 2.0 with task.label_dropout 0, at which"),
        ({"draw": (1, 3)}, "got class 3 in task.draw, expected classes below model.classes 3"),
    ],
)
def test_what_has_no_meaning_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        build(**fields)


def test_other_models_are_refused():
    nothing = DiTConfig(classes=0, **SIZES)
    with pytest.raises(UserError, match=r"got task.guidance 2.0 for a model of neither classes nor texts"):
        tasks.build(task_of("diffusion", guidance=2.0), nothing, Stdlib())
    with pytest.raises(UserError, match="got task diffusion with ViTConfig, expected a network that gives"):
        tasks.build(task_of("diffusion"), ViTConfig(layers=1), Stdlib())
