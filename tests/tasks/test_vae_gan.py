"""Variational and adversarial training: losses in closed form, each network its own, equal on any number of devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels import tasks
from jaxmodels.config import GAN, SGD, Config, Constant, Mesh, Stdlib, Synthetic, Text
from jaxmodels.data import open_source
from jaxmodels.errors import UserError
from jaxmodels.models.gan import GANConfig
from jaxmodels.models.mlp import MLPConfig
from jaxmodels.models.vae import VAEConfig
from jaxmodels.parallel.mesh import make_mesh
from jaxmodels.tasks.losses import binary_cross_entropy, gaussian_kl, gradient_penalty
from jaxmodels.tasks.task import noise_of, uniform_of
from jaxmodels.train import job, state, step
from tests.sections import drawn, task_of

# at these shapes LLVM's optimizations take longer than all else
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
SHAPE = (8, 8, 1)
CONFIGS = {
    "vae-mlp": VAEConfig(input_shape=SHAPE, hidden=(16,), latents=3),
    "vae-conv": VAEConfig(kind="conv", input_shape=SHAPE, hidden=(8, 16), latents=3),
    "dcgan": GANConfig(input_shape=SHAPE, latents=5, channels=(8, 16), hidden=8),
    "wgan-gp": GANConfig(kind="wgan-gp", input_shape=SHAPE, latents=5, channels=(8, 16)),
}


def batch(rows=16, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (rows, *SHAPE)).astype(np.uint8)
    return {"inputs": images, "labels": np.zeros(rows, np.int32)}


def build(name, **fields):
    return tasks.build(task_of(name.split("-")[0].replace("dc", "").replace("w", ""), **fields), CONFIGS[name],
                       Stdlib())  # fmt: skip


def still(tree):
    """Names of the arrays that are 0; a critic's last bias is, since a distance does not depend on it."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/") for path, x in leaves if not np.any(x)}


def test_binary_cross_entropy_is_that_of_the_probability():
    logits, targets = jnp.array([-2.0, 0.5, 3.0, 200.0, -200.0]), jnp.array([0.0, 1.0, 0.3, 0.0, 1.0])
    p = 1 / (1 + np.exp(-np.asarray(logits[:3], np.float64)))
    t = np.asarray(targets[:3])
    found = binary_cross_entropy(logits, targets)
    np.testing.assert_allclose(found[:3], -(t * np.log(p) + (1 - t) * np.log(1 - p)), rtol=1e-5)
    np.testing.assert_allclose(found[3:], [200, 200])


def test_the_divergence_is_the_mean_of_log_ratios_of_densities():
    mean, log_variance = np.array([[0.3, -1.0, 0.0], [0.0, 0.0, 0.0]]), np.array([[0.5, -1.0, 0.0], [0.0, 0.0, 0.0]])
    z = mean + np.exp(0.5 * log_variance) * np.random.default_rng(0).normal(size=(200_000, 2, 3))
    ratio = 0.5 * (z**2 - (z - mean) ** 2 / np.exp(log_variance) - log_variance)
    found = gaussian_kl(jnp.asarray(mean), jnp.asarray(log_variance))
    np.testing.assert_allclose(found, ratio.sum(-1).mean(0), atol=0.01)
    assert found[1] == 0


def test_the_penalty_of_a_linear_critic_is_that_of_its_weights():
    rng = np.random.default_rng(0)
    w, real, fake = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((4, 3), (2, 4, 3), (2, 4, 3)))
    found = gradient_penalty(lambda x: (x * w).sum((1, 2)), real, fake, jnp.array([0.2, 0.9]))
    np.testing.assert_allclose(found, [(np.linalg.norm(w) - 1) ** 2] * 2, rtol=1e-5)
    flat = jax.grad(lambda v: gradient_penalty(lambda x: (x * v).sum((1, 2)), real, fake, jnp.zeros(2)).sum())
    assert np.isfinite(flat(jnp.zeros((4, 3)))).all(), "where the gradient is 0 its norm still has one"


def test_the_penalty_is_that_of_finite_differences():
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=s) for s in ((6, 4), (4,)))
    real, fake, share = rng.normal(size=(3, 6)), rng.normal(size=(3, 6)), np.array([0.0, 0.4, 1.0])

    def critic(x, np=np):
        return np.tanh(x @ a) @ b

    at, h = (1 - share)[:, None] * real + share[:, None] * fake, 1e-5
    slopes = np.stack([(critic(at + h * e) - critic(at - h * e)) / (2 * h) for e in np.eye(6)], 1)
    given = (jnp.asarray(x, jnp.float32) for x in (real, fake, share))
    found = gradient_penalty(functools.partial(critic, np=jnp), *given)
    np.testing.assert_allclose(found, (np.linalg.norm(slopes, axis=1) - 1) ** 2, rtol=1e-4)


def test_noise_of_an_example_is_its_own_and_normal():
    images = jnp.asarray(batch(256)["inputs"])
    noise = noise_of(images, 40)
    np.testing.assert_array_equal(noise_of(images[::-1][:7], 40), noise[::-1][:7])
    assert len(np.unique(np.asarray(noise)[:, 0])) == 256
    assert abs(float(noise.mean())) < 0.05 and float(noise.std()) == pytest.approx(1, abs=0.03)


def test_the_loss_of_a_vae_is_the_negative_bound():
    task = build("vae-mlp", beta=3.0)
    params = jit(task.init)(jax.random.key(0))
    rows = batch()
    rows["labels"][5:] = -1
    total, aux = jit(task.losses[0].fn)(params, {}, rows, jax.random.key(1))
    model = task.networks["model"]
    x = rows["inputs"].astype(np.float32) / 255
    logits, mean, log_variance = model.apply(params["model"], jnp.asarray(x), rng=jax.random.key(1))
    pixels = binary_cross_entropy(logits, x).sum((1, 2, 3))[:5].sum()
    divergence = gaussian_kl(mean, log_variance)[:5].sum()
    np.testing.assert_allclose(total, pixels + 3 * divergence, rtol=1e-5)
    assert aux.weight == 5
    np.testing.assert_allclose(aux.sums["kl"][0], divergence, rtol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_evaluation_is_a_sum_over_examples(name):
    task = build(name)
    params, stats, rows = jit(task.init)(jax.random.key(0)), task.stats(), batch()
    measure = jit(task.metrics)
    whole = measure(params, stats, rows)
    assert "loss" in whole and all(float(count) == 16 for _, count in whole.values())
    padded = {"inputs": np.roll(rows["inputs"], 8, 0), "labels": np.repeat(np.int32([0, -1]), 8)}
    halves = [measure(params, stats, padded), measure(params, stats, {**padded, "labels": padded["labels"][::-1]})]
    for key, (total, _) in whole.items():
        np.testing.assert_allclose(sum(half[key][0] for half in halves), total, rtol=1e-4)
        assert halves[0][key][1] == 8


@pytest.mark.parametrize("name", ["dcgan", "wgan-gp"])
def test_each_loss_trains_its_own_network_and_its_statistics(name):
    task = build(name, **({"gradient_penalty": 7.0} if name == "wgan-gp" else {}))
    params, stats, rows = jit(task.init)(jax.random.key(0)), task.stats(), batch()
    assert [(loss.name, loss.trains) for loss in task.losses] == [("discriminator",) * 2, ("generator",) * 2]
    for loss in task.losses:
        (total, aux), grads = jit(jax.value_and_grad(loss.fn, has_aux=True))(params, stats, rows, jax.random.key(2))
        assert still(grads[loss.trains]) == ({"head/b"} if (name, loss.name) == ("wgan-gp", "discriminator") else set())
        for network, tree in stats.items():
            same = all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), tree, aux.stats[network])))
            assert same == (network != loss.trains)
        assert float(aux.weight) == 16
        sums = {key: float(value) / 16 for key, (value, _) in aux.sums.items()}
        if loss.name == "discriminator" and name == "wgan-gp":
            assert float(total) / 16 == pytest.approx(sums["fake"] - sums["real"] + 7 * sums["penalty"], rel=1e-4)
        assert ("penalty" in sums) == (loss.name == "discriminator" and name == "wgan-gp")


def train(name, mesh_cfg, devices, steps=3):
    mesh = make_mesh(mesh_cfg, jax.devices()[:devices])
    task = build(name)
    # plain gradients: Adam's first steps would blow up rounding where a gradient is near 0
    cfg = SGD(peak_lr=0.05 if "gan" in name else 1e-3, weight_decay=0.0, clip_norm=None)
    optimizers = {loss.name: cfg.build(steps, task.axes()[loss.trains]) for loss in task.losses}
    layout = state.layout(task, optimizers, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, layout)
    now = jax.jit(lambda key: state.init(task, optimizers, key), out_shardings=shardings)(jax.random.key(0))
    first = jax.tree.map(np.asarray, now.params)

    def place(batch):
        return jax.device_put(batch, task.shardings(mesh, batch))

    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
                            place(batch()))  # fmt: skip
    take = step.build_step(task, optimizers, mesh, layout, abstract)
    seen = []
    for seed in range(steps):
        now, metrics = take(now, place(batch(seed=seed)))
        seen.append({key: float(value) for key, value in metrics.items()})
    return seen, first, jax.tree.map(np.asarray, (now.params, now.stats))


@pytest.mark.parametrize("name", CONFIGS)
def test_steps_on_eight_devices_are_those_on_one(name):
    one, before, end = train(name, Mesh(), 1)
    unmoved = still(jax.tree.map(np.subtract, before, end[0]))
    assert unmoved == ({"discriminator/head/b"} if name == "wgan-gp" else set())
    for mesh in (Mesh(data=8), Mesh(data=2, fsdp=2, tensor=2)):
        eight, start, other = train(name, mesh, 8)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), start, before)
        for a, b in zip(eight, one, strict=True):
            assert a == pytest.approx(b, rel=1e-4, abs=1e-4)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), other, end)


@pytest.mark.parametrize("name", ["vae", "gan"])
def test_synthetic_images_are_what_the_task_takes(name):
    config = VAEConfig(input_shape=SHAPE) if name == "vae" else GANConfig(input_shape=SHAPE, channels=(8,))
    source = drawn(task_of(name), config)
    assert source.batch(np.arange(4), np.zeros(4, np.int64))["inputs"].shape == (4, *SHAPE)
    with pytest.raises(UserError, match="got data text, expected a source of records"):
        open_source(Text(), "train", task_of(name), inputs_shape=SHAPE)


@pytest.mark.parametrize(("name", "wanted"), [("vae", "a variational autoencoder"), ("gan", "a GAN")])
def test_another_model_is_refused(name, wanted):
    with pytest.raises(UserError, match=f"got task {name} with MLPConfig, expected {wanted}"):
        tasks.build(task_of(name), MLPConfig(), Stdlib())


def test_binarised_evaluation_is_a_function_of_the_example_and_training_draws_anew():
    task = build("vae-mlp", binarise=True)
    params, rows = jit(task.init)(jax.random.key(0)), batch(8)
    measure, loss = jit(task.metrics), jit(task.losses[0].fn)
    whole = measure(params, {}, rows)
    mixed = measure(params, {}, {name: x[::-1].copy() for name, x in rows.items()})
    one = [{**rows, "labels": np.where(np.arange(8) == i, 0, -1).astype(np.int32)} for i in range(2)]
    for name, (total, _) in whole.items():
        assert float(mixed[name][0]) == pytest.approx(float(total), rel=1e-5)
    a, b = (float(measure(params, {}, x)["loss"][0]) for x in one)
    same = {"inputs": np.repeat(rows["inputs"][:1], 8, 0), "labels": rows["labels"]}
    assert float(measure(params, {}, same)["loss"][0]) == pytest.approx(8 * a, rel=1e-5) and a != b
    draws = [float(loss(params, {}, rows, jax.random.key(seed))[1].sums["kl"][0]) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_binarised_pixels_are_1_as_often_as_they_are_bright():
    images = jnp.asarray(batch(256)["inputs"])
    drawn = np.asarray(uniform_of(images, SHAPE)) < np.asarray(images) / 255
    np.testing.assert_array_equal(drawn[::-1][:5], uniform_of(images[::-1][:5], SHAPE) < images[::-1][:5] / 255)
    bright = np.asarray(images) > 200
    assert drawn[bright].mean() == pytest.approx(float((np.asarray(images)[bright] / 255).mean()), abs=0.03)
    assert drawn.mean() == pytest.approx(float(images.mean()) / 255, abs=0.02)


def test_the_weight_of_the_divergence_grows_from_0_over_the_warm_up():
    task = build("vae-mlp", beta=3.0, beta_warmup_steps=10)
    params, rows = jit(task.init)(jax.random.key(0)), batch()
    loss = jit(task.losses[0].fn)
    for at, beta in ((0, 0.0), (5, 1.5), (10, 3.0), (25, 3.0)):
        total, aux = loss(params, {}, rows, jax.random.key(1), jnp.int32(at))
        sums = {name: float(value) for name, (value, _) in aux.sums.items()}
        assert float(total) == pytest.approx(sums["reconstruction"] + beta * sums["kl"], rel=1e-5) and sums["kl"] > 0


def test_gaussian_pixels_cost_half_their_squared_error_and_a_constant():
    task = build("vae-mlp", pixels="gaussian")
    params, rows = jit(task.init)(jax.random.key(0)), batch()
    _, aux = jit(task.losses[0].fn)(params, {}, rows, jax.random.key(1))
    x = rows["inputs"].astype(np.float32) / 255
    outputs, _, _ = task.networks["model"].apply(params["model"], jnp.asarray(x), rng=jax.random.key(1))
    expected = 0.5 * np.square(outputs - x).sum() + 0.5 * np.log(2 * np.pi) * x.size
    assert float(aux.sums["reconstruction"][0]) == pytest.approx(float(expected), rel=1e-5)
    found = task.summarize(task.metrics(params, {}, rows), ())
    assert found["elbo"] == -found["loss"] and found["loss"] == pytest.approx(found["reconstruction"] + found["kl"])
    with pytest.raises(UserError, match="got task.binarise with task.pixels gaussian"):
        build("vae-mlp", pixels="gaussian", binarise=True)
    with pytest.raises(UserError, match="got task.beta_warmup_steps 5 with task.beta 0"):
        build("vae-mlp", beta=0.0, beta_warmup_steps=5)


@pytest.mark.parametrize("name", ["vae-conv", "dcgan"])
def test_samples_are_images_of_the_same_latents_each_time(name):
    task = build(name)
    params, stats = jit(task.init)(jax.random.key(0)), task.stats()
    first, again = (np.asarray(task.samples(params, stats, 5)) for _ in range(2))
    assert first.shape == (5, *SHAPE) and first.min() >= 0 and first.max() <= 1
    np.testing.assert_array_equal(first, again)
    assert np.abs(first[0] - first[1]).max() > 0, "one image for each latent"


def test_three_updates_of_the_critic_are_of_three_shares_of_the_batch_and_then_one_of_the_generator():
    task, rows = build("wgan-gp", critic_steps=3), batch(12)
    rate = 0.05
    cfg = SGD(peak_lr=rate, weight_decay=0.0, clip_norm=None, schedule=Constant())
    optimizers = {loss.name: cfg.build(1, task.axes()[loss.trains]) for loss in task.losses}
    now = jit(lambda key: state.init(task, optimizers, key))(jax.random.key(0))
    advance = jit(functools.partial(step.advance, task, optimizers, accumulate=1, ema=None))
    after, metrics = advance(now, jax.tree.map(jnp.asarray, rows))

    params, stats, seen = now.params, now.stats, []
    rng = jax.random.fold_in(now.rng, 0)
    grads = {loss.name: jit(jax.value_and_grad(loss.fn, has_aux=True)) for loss in task.losses}
    keys = jax.random.split(jax.random.fold_in(rng, 0), 3)
    updates = [("discriminator", {name: x[k::3] for name, x in rows.items()}, keys[k]) for k in range(3)]
    updates.append(("generator", rows, jax.random.fold_in(rng, 1)))
    for name, part, key in updates:
        (value, aux), gradient = grads[name](params, stats, part, key)
        moved = jax.tree.map(lambda p, g: p - rate * g / 4, params[name], gradient[name])
        params, stats = {**params, name: moved}, aux.stats
        assert float(aux.weight) == 4, "of each share, and as many latents"
        seen.append(float(value) / 4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), after.params, params)
    assert float(metrics["discriminator/loss"]) == pytest.approx(np.mean(seen[:3]), rel=1e-4)
    assert float(metrics["generator/loss"]) == pytest.approx(seen[3], rel=1e-4, abs=1e-5)


def test_a_batch_that_has_no_such_shares_is_refused():
    data = Synthetic(batch_size=16)
    cfg = Config(CONFIGS["wgan-gp"], task=GAN(critic_steps=3), data=data, mesh=Mesh(data=8))
    with pytest.raises(UserError, match="got data.batch_size 16, expected a multiple of 24 .*try --data.batch-size 24"):
        job.assemble(cfg)
