"""FLOPs of a training step against closed forms."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import jaxmodels
from jaxmodels.config import GAN, Classification, Config, Stdlib, Synthetic
from jaxmodels.models import families, layers
from jaxmodels.models.flops import forward
from jaxmodels.models.gan import GANConfig
from jaxmodels.models.mlp import MLPConfig
from jaxmodels.tasks import flops
from tests.flops import GPT2, LLAMA, MIXTRAL, B, T, gpt2_by_hand, llama_by_hand


def per_step(cfg):
    return flops.per_step(cfg.task, cfg.model, cfg.data)


@pytest.mark.parametrize("change", [{}, {"remat": "full"}, {"attention": "blockwise"}, {"dtype": "bfloat16"}], ids=str)
def test_a_step_is_three_forwards_whatever_is_recomputed_or_skipped(change):
    for config, by_hand in ((GPT2, gpt2_by_hand), (LLAMA, llama_by_hand)):
        long = dataclasses.replace(config, context=1000)  # so long that a kernel in blocks skips some
        cfg = Config(model=dataclasses.replace(long, **change), data=Stdlib(seq_len=1000, batch_size=B))
        assert per_step(cfg).model == 3 * by_hand(long, 1000)


@pytest.mark.parametrize(("window", "band"), [(None, 1000), (100, 100)])
def test_of_attention_only_what_masks_show_must_be_computed(window, band):
    T, seen = 1000, sum(min(t + 1, window or 1000) for t in range(1000))
    long = dataclasses.replace(LLAMA, context=T, window=window)
    step = per_step(Config(model=long, data=Stdlib(seq_len=T, batch_size=B)))
    each = 3 * B * long.layers * 4 * long.heads * long.head_size  # FLOPs of a pair: two products, there and twice back
    assert step.attention == each * T * band
    assert step.model == 3 * llama_by_hand(long, T) - each * T * (T - band)
    assert step.model - step.visible == each * (T * band - seen)


def test_a_step_of_a_classifier_has_no_gradient_at_its_inputs():
    cfg = Config(
        model=MLPConfig((3, 3, 1), 4, (5,)),
        task=Classification(),
        data=Synthetic(batch_size=6),
    )
    assert per_step(cfg).model == 2 * 6 * (2 * 9 * 5 + 3 * 5 * 4)


def test_a_step_of_a_mixture_counts_the_experts_of_a_token_three_times():
    cfg = Config(model=MIXTRAL, data=Stdlib(seq_len=T, batch_size=B))
    dense = dataclasses.replace(LLAMA, mlp_width=MIXTRAL.experts_per_token * MIXTRAL.mlp_width)
    router = 2 * B * T * MIXTRAL.layers * MIXTRAL.width * MIXTRAL.experts
    balance = 2 * 2 * MIXTRAL.experts  # the product of two vectors, and its gradient
    assert per_step(cfg).model == 3 * (llama_by_hand(dense) + router) + balance


def test_a_step_of_a_gan_counts_all_that_its_losses_need():
    config = GANConfig(input_shape=(8, 8, 1), latents=6, channels=(8, 16))
    cfg = Config(model=config, task=GAN(), data=Synthetic(batch_size=6))
    generator, discriminator = (
        forward(jaxmodels.create(config, network=name), 6) for name in ("generator", "discriminator")
    )
    first = 2 * 6 * 6 * 2 * 2 * 16  # of latents, and of pixels, no gradient is needed in either network's own loss
    pixels = 2 * 6 * 4 * 4 * 8 * 4 * 4
    # the discriminator's: one generator, two discriminators and their gradients; the generator's: both, and back
    expected = generator + 2 * (3 * discriminator - pixels) + 3 * generator - first + 2 * discriminator
    assert per_step(cfg).model == expected


@dataclasses.dataclass(frozen=True)
class NetConfig(families.ModelConfig):
    classes: int = 4


class Net(nn.Module):
    config: NetConfig

    @nn.compact
    def __call__(self, x, *, train=False):
        x = layers.BatchNorm()(layers.Linear((5,), ("features", "embed"))(x), train)
        return layers.Linear((self.config.classes,), ("embed", "classes"))(x)


def test_a_step_of_a_model_with_batch_statistics(monkeypatch):
    monkeypatch.setattr(families, "_registered", dict(families._registered))
    monkeypatch.setattr(families.FAMILIES, "_registered", {})
    spec = lambda c, batch, length: (jax.ShapeDtypeStruct((batch, 3), jnp.float32),)  # noqa: E731
    families.register(families.Family("net", NetConfig, Net, spec, {}))
    cfg = Config(model=NetConfig(), task=Classification(), data=Synthetic(batch_size=6))
    assert per_step(cfg).model == 2 * 6 * (2 * 3 * 5 + 3 * 5 * 4)
