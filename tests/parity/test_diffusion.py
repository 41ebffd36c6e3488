"""Diffusion beside diffusers: the network DiT, and each step of the samplers DDPM, DDIM and Euler."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmodels
from jaxmodels.models.dit import DiTConfig
from jaxmodels.tasks.noise import Process
from tests.zoo import arrays

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="needs the parity extra: torch")
diffusers = pytest.importorskip("diffusers", reason="needs the parity extra: diffusers")

SHAPE, CLASSES = (8, 8, 3), 5
SIZES = {"layers": 2, "heads": 4, "width": 32, "mlp_width": 128}


def theirs(params):
    """diffusers' DiT with our parameters: each of its blocks has its own copy of the conditions' embeddings."""
    net = diffusers.DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=3, num_layers=2, sample_size=8, patch_size=2,
        num_embeds_ada_norm=CLASSES, norm_eps=1e-6,
    ).eval()  # fmt: skip
    p = jax.tree.map(np.asarray, params)
    found = {
        "pos_embed.proj.weight": p["patches"]["w"].transpose(3, 2, 0, 1),
        "pos_embed.proj.bias": p["patches"]["b"],
        "proj_out_1.weight": p["modulation"]["w"].reshape(32, -1).T,
        "proj_out_1.bias": p["modulation"]["b"].reshape(-1),
        "proj_out_2.weight": p["head"]["w"].reshape(32, -1).T,
        "proj_out_2.bias": p["head"]["b"].reshape(-1),
    }
    for i in range(2):
        b, own = f"transformer_blocks.{i}.", jax.tree.map(lambda x, i=i: x[i], p["layers"])
        embed = b + "norm1.emb."
        found |= {
            embed + "timestep_embedder.linear_1.weight": p["time"]["up"]["w"].T,
            embed + "timestep_embedder.linear_1.bias": p["time"]["up"]["b"],
            embed + "timestep_embedder.linear_2.weight": p["time"]["down"]["w"].T,
            embed + "timestep_embedder.linear_2.bias": p["time"]["down"]["b"],
            embed + "class_embedder.embedding_table.weight": p["classes"]["w"],
            b + "norm1.linear.weight": own["modulation"]["w"].reshape(32, -1).T,
            b + "norm1.linear.bias": own["modulation"]["b"].reshape(-1),
            b + "attn1.to_out.0.weight": own["attn"]["o"]["w"].reshape(32, 32).T,
            b + "attn1.to_out.0.bias": own["attn"]["o"]["b"],
            b + "ff.net.0.proj.weight": own["mlp"]["up"]["w"].T,
            b + "ff.net.0.proj.bias": own["mlp"]["up"]["b"],
            b + "ff.net.2.weight": own["mlp"]["down"]["w"].T,
            b + "ff.net.2.bias": own["mlp"]["down"]["b"],
        }
        for name in "qkv":
            found[f"{b}attn1.to_{name}.weight"] = own["attn"][name]["w"].reshape(32, 32).T
            found[f"{b}attn1.to_{name}.bias"] = own["attn"][name]["b"].reshape(-1)
    net.load_state_dict({name: torch.tensor(np.ascontiguousarray(x)) for name, x in found.items()}, strict=True)
    return net


def test_the_network_is_that_of_diffusers():
    model = jaxmodels.create(DiTConfig(input_shape=SHAPE, classes=CLASSES, **SIZES))
    params = jax.tree.map(lambda x: 0.5 * x, arrays(model))
    rng = np.random.default_rng(0)
    images = rng.normal(size=(4, *SHAPE)).astype(np.float32)
    times, labels = np.array([0.0, 3.0, 500.0, 999.0], np.float32), np.array([0, 4, 2, CLASSES])
    with torch.no_grad():
        given = torch.tensor(images.transpose(0, 3, 1, 2)), torch.tensor(times).long(), torch.tensor(labels)
        expected = theirs(params)(*given).sample.numpy().transpose(0, 2, 3, 1)
    found = jax.jit(model.apply)(params, images, times, labels)
    assert 0.5 < np.abs(expected).max() < 10
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction"}


@functools.cache
def predicted(kind):
    """A prediction that depends on x and on the time, large enough that images are clipped."""
    return lambda x, time: np.sin(3 * x + time / 100) + 0.3 * x


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("objective", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_each_step_of_diffusion_is_that_of_diffusers(objective, schedule, eta):
    process, count = Process(objective, schedule), 10
    how = {
        "beta_schedule": SCHEDULES[schedule],
        "prediction_type": PREDICTIONS[objective],
        "timestep_spacing": "trailing",
        "clip_sample": True,
    }
    ancestral = diffusers.DDPMScheduler(**how)
    scheduler = ancestral if eta else diffusers.DDIMScheduler(**how)
    scheduler.set_timesteps(count)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 4, 4, 1)).astype(np.float32)
    times = process.grid(count)
    assert [int(process.timestep(time)) for time in times[:-1]] == scheduler.timesteps.tolist()
    step = jax.jit(process.step, static_argnums=4)
    for time, after in itertools.pairwise(times):
        found = predicted(objective)(x, float(time)).astype(np.float32)
        state = torch.random.get_rng_state()
        given = torch.tensor(found), int(time) - 1, torch.tensor(x)
        if eta:
            expected = scheduler.step(*given).prev_sample.numpy()
        else:
            expected = scheduler.step(*given, use_clipped_model_output=True).prev_sample.numpy()
        torch.random.set_rng_state(state)
        drawn = torch.randn(x.shape).numpy()
        got = np.asarray(step(found, x, time, after, eta, drawn))
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=2e-4)
        x = expected


def test_each_step_of_a_flow_is_that_of_diffusers():
    process, count = Process("flow"), 7
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / count, count))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 4, 4, 1)).astype(np.float32)
    times = process.grid(count)
    np.testing.assert_allclose(process.timestep(times[:-1]), scheduler.timesteps.numpy(), rtol=1e-6)
    for told, time, after in zip(scheduler.timesteps, times[:-1], times[1:], strict=True):
        found = predicted("flow")(x, float(time)).astype(np.float32)
        expected = scheduler.step(torch.tensor(found), told, torch.tensor(x)).prev_sample.numpy()
        np.testing.assert_allclose(process.step(found, x, time, after, 0.0, x), expected, rtol=0, atol=1e-5)
        x = expected


@pytest.mark.parametrize("objective", ["epsilon", "v", "flow"])
def test_mixtures_and_targets_are_those_of_diffusers(objective):
    process = Process(objective, "cosine")
    rng = np.random.default_rng(1)
    images, noise = (rng.normal(size=(3, 4, 4, 1)).astype(np.float32) for _ in range(2))
    if objective == "flow":
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        told = scheduler.timesteps[[0, 400, 998]]
        time = jnp.asarray(told.numpy())
        expected = scheduler.scale_noise(torch.tensor(images), told, torch.tensor(noise)).numpy()
        target = noise - images
    else:
        scheduler = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
        told = torch.tensor([0, 400, 998])
        time = jnp.asarray(told.numpy() + 1.0)
        given = torch.tensor(images), torch.tensor(noise), told
        expected = scheduler.add_noise(*given).numpy()
        target = noise if objective == "epsilon" else scheduler.get_velocity(*given).numpy()
    np.testing.assert_allclose(process.mix(images, noise, time), expected, rtol=0, atol=2e-5)
    np.testing.assert_allclose(process.target(images, noise, time), target, rtol=0, atol=2e-5)
