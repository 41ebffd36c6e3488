"""FLOPs against closed forms."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import jaxmodels
from jaxmodels.config import Config, DataConfig, TaskConfig
from jaxmodels.models import functional, layers
from jaxmodels.models.gan import GANConfig
from jaxmodels.models.gpt2 import GPT2Config
from jaxmodels.models.kernels.grouped import grouped
from jaxmodels.models.llama import LlamaConfig
from jaxmodels.models.mixtral import MixtralConfig
from jaxmodels.models.mlp import MLPConfig
from jaxmodels.plan import flops


def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def multiply(x, w):
    return x @ w


X, W, SQUARE = array(3, 5), array(5, 7), array(5, 5)
PRODUCT = 2 * 3 * 5 * 7
STEP = 2 * 3 * 5 * 5


def loop(x, w):
    return jax.lax.scan(lambda c, _: (c @ w, None), x, None, length=6)[0]


def nested(x, w):
    return jax.lax.scan(lambda c, _: (loop(c, w), None), x, None, length=4)[0]


def branches(x, w):
    return jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w)


@pytest.mark.parametrize(
    ("fn", "args", "expected"),
    [
        (multiply, (X, W), PRODUCT),
        (jax.jit(multiply), (X, W), PRODUCT),
        (lambda x, w: jnp.einsum("btd,dhk->bthk", x, w), (array(2, 3, 5), array(5, 7, 4)), 2 * 2 * 3 * 5 * 7 * 4),
        (lambda q, k: jnp.einsum("bthk,bshk->bhts", q, k), (array(2, 3, 5, 7),) * 2, 2 * 2 * 5 * 3 * 3 * 7),
        (lambda x: x + x, (X,), 0),
        (loop, (X, SQUARE), 6 * STEP),
        (nested, (X, SQUARE), 24 * STEP),
        (lambda x, w: jax.lax.fori_loop(0, 9, lambda _, c: c @ w, x), (X, SQUARE), 9 * STEP),
        (lambda x, w: jax.lax.while_loop(lambda c: c.sum() < 0, lambda c: c @ w, x), (X, SQUARE), STEP),
        (branches, (X, SQUARE), 2 * STEP),
        (jax.vmap(multiply, (0, None)), (array(8, 3, 5), W), 8 * PRODUCT),
        (jax.grad(lambda x, w: (x @ w).sum(), (0, 1)), (X, W), 3 * PRODUCT),
        (jax.grad(lambda x, w: jnp.sin(loop(x, w)).sum(), (0, 1)), (X, SQUARE), 3 * 6 * STEP),
        (jax.checkpoint(multiply), (X, W), PRODUCT),
    ],
    ids=[
        "product",
        "jit",
        "contraction",
        "batch",
        "sum",
        "scan",
        "scan in scan",
        "fori",
        "while",
        "cond",
        "vmap",
        "grad",
        "grad of scan",
        "checkpoint",
    ],
)
def test_products_count_two_for_each_multiply_and_add(fn, args, expected):
    assert flops.count(fn, *args) == expected


def test_recomputation_is_counted_where_it_is_asked_for():
    def two(x, w):
        return jnp.sin(jnp.sin(x @ w) @ w)

    args = (X, SQUARE)
    plain = flops.count(jax.grad(lambda x, w: two(x, w).sum(), (0, 1)), *args)
    again = flops.count(jax.grad(lambda x, w: jax.checkpoint(two)(x, w).sum(), (0, 1)), *args)
    assert (plain, again) == (3 * 2 * STEP, 4 * 2 * STEP)


def test_custom_gradients_are_seen_through():
    @jax.custom_vjp
    def twice(x, w):
        return x @ w @ w

    twice.defvjp(lambda x, w: (twice(x, w), w), lambda w, g: (g @ w.T, None))
    assert flops.count(twice, X, SQUARE) == 2 * STEP
    assert flops.count(jax.grad(lambda x, w: twice(x, w).sum()), X, SQUARE) == 3 * STEP


def conv(x, w, stride=1, groups=1, padding="SAME", dilation=None):
    return jax.lax.conv_general_dilated(
        x,
        w,
        (stride, stride),
        padding,
        lhs_dilation=dilation,
        feature_group_count=groups,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def test_convolutions_count_their_taps():
    x, w = array(2, 8, 6, 4), array(3, 5, 4, 10)
    full = 2 * 2 * 8 * 6 * 10 * (3 * 5 * 4)
    assert flops.count(conv, x, w) == full
    assert flops.count(lambda x, w: conv(x, w, 2), x, w) == full // 4
    assert flops.count(lambda x, w: conv(x, w, groups=2), x, array(3, 5, 2, 10)) == full // 2
    assert flops.count(jax.grad(lambda w, x: conv(x, w).sum()), w, x) == 2 * full


def test_zeros_between_inputs_are_no_products():
    x, w = array(2, 8, 6, 4), array(3, 5, 4, 10)
    up = flops.count(lambda x, w: conv(x, w, padding=((1, 1), (2, 2)), dilation=(2, 2)), x, w)
    assert up == 2 * 2 * 15 * 11 * 10 * (3 * 5 * 4) // 4
    # the gradient of a strided convolution costs what the convolution does
    strided = flops.count(lambda x, w: conv(x, w, 2), x, w)
    assert flops.count(jax.grad(lambda x, w: conv(x, w, 2).sum()), x, w) == 2 * strided


def test_rows_of_ragged_products_count_once_each():
    x, w, sizes = array(30, 5), array(4, 5, 7), jax.ShapeDtypeStruct((4,), jnp.int32)
    once = 2 * 30 * 5 * 7
    assert flops.count(jax.lax.ragged_dot, x, w, sizes) == once
    assert flops.count(jax.grad(lambda x, w, n: jax.lax.ragged_dot(x, w, n).sum(), (0, 1)), x, w, sizes) == 3 * once
    for fn in (grouped, jax.jit(grouped)):
        assert flops.count(fn, x, w, sizes) == once
        assert flops.count(jax.grad(lambda x, w, n, fn=fn: fn(x, w, n).sum(), (0, 1)), x, w, sizes) == 3 * once


GPT2 = GPT2Config(layers=2, width=24, heads=3, vocab_size=37, context=16)
LLAMA = LlamaConfig(layers=2, width=24, heads=6, kv_heads=2, head_dim=8, mlp_width=40, vocab_size=37)
MIXTRAL = MixtralConfig(
    layers=2, width=24, heads=6, kv_heads=2, head_dim=8, mlp_width=40, vocab_size=37, experts=5, experts_per_token=3
)
B, T = 2, 10


def forward(config):
    model = jaxmodels.create(config, attention="xla")
    return flops.count(model.apply, model.shapes(), jax.ShapeDtypeStruct((B, T), jnp.int32))


def gpt2_by_hand(c, T=T):
    D, F = c.width, c.mlp_width or 4 * c.width
    weights = 4 * D * D + 2 * D * F
    return B * (c.layers * (2 * T * weights + 4 * T * T * D) + 2 * T * D * c.vocab_size)


def llama_by_hand(c, T=T):
    D, F, q, kv = c.width, c.mlp_width, c.heads * c.head_size, (c.kv_heads or c.heads) * c.head_size
    weights = 2 * D * q + 2 * D * kv + 3 * D * F
    return B * (c.layers * (2 * T * weights + 4 * T * T * q) + 2 * T * D * c.vocab_size)


def test_gpt2_counts_its_closed_form():
    assert forward(GPT2) == gpt2_by_hand(GPT2)


def test_llama_with_grouped_heads_counts_its_closed_form():
    assert forward(LLAMA) == llama_by_hand(LLAMA)


@pytest.mark.parametrize("routing", ["dropless", "capacity"])
def test_mixtral_counts_the_experts_that_a_token_is_sent_to(routing):
    c = MIXTRAL
    dense = dataclasses.replace(LLAMA, mlp_width=c.experts_per_token * c.mlp_width)
    expected = llama_by_hand(dense) + 2 * B * T * c.layers * c.width * c.experts
    assert flops.forward(jaxmodels.create(c, routing=routing), B, T) == expected


def test_each_layer_of_the_scan_counts():
    deep = GPT2Config(layers=8, width=24, heads=3, vocab_size=37, context=16)
    head = B * 2 * T * 24 * 37
    assert forward(deep) - head == 4 * (forward(GPT2) - head)


@pytest.mark.parametrize("change", [{}, {"remat": "full"}, {"attention": "blockwise"}, {"dtype": "bfloat16"}], ids=str)
def test_a_step_is_three_forwards_whatever_is_recomputed_or_skipped(change):
    for config, by_hand in ((GPT2, gpt2_by_hand), (LLAMA, llama_by_hand)):
        long = dataclasses.replace(config, context=1000)  # so long that a kernel in blocks skips some
        cfg = Config(model=dataclasses.replace(long, **change), data=DataConfig(seq_len=1000, batch_size=B))
        assert flops.per_step(cfg).model == 3 * by_hand(long, 1000)


@pytest.mark.parametrize(("window", "band"), [(None, 1000), (100, 100)])
def test_of_attention_only_what_masks_show_must_be_computed(window, band):
    T, seen = 1000, sum(min(t + 1, window or 1000) for t in range(1000))
    long = dataclasses.replace(LLAMA, context=T, window=window)
    step = flops.per_step(Config(model=long, data=DataConfig(seq_len=T, batch_size=B)))
    each = 3 * B * long.layers * 4 * long.heads * long.head_size  # FLOPs of a pair: two products, there and twice back
    assert step.attention == each * T * band
    assert step.model == 3 * llama_by_hand(long, T) - each * T * (T - band)
    assert step.model - step.visible == each * (T * band - seen)


def test_a_step_of_a_classifier_has_no_gradient_at_its_inputs():
    cfg = Config(
        model=MLPConfig((3, 3, 1), 4, (5,)),
        task=TaskConfig(name="classification"),
        data=DataConfig(source="synthetic", batch_size=6),
    )
    assert flops.per_step(cfg).model == 2 * 6 * (2 * 9 * 5 + 3 * 5 * 4)


def test_a_step_of_a_mixture_counts_the_experts_of_a_token_three_times():
    cfg = Config(model=MIXTRAL, data=DataConfig(seq_len=T, batch_size=B))
    dense = dataclasses.replace(LLAMA, mlp_width=MIXTRAL.experts_per_token * MIXTRAL.mlp_width)
    router = 2 * B * T * MIXTRAL.layers * MIXTRAL.width * MIXTRAL.experts
    balance = 2 * 2 * MIXTRAL.experts  # the product of two vectors, and its gradient
    assert flops.per_step(cfg).model == 3 * (llama_by_hand(dense) + router) + balance


def test_a_step_of_a_gan_counts_all_that_its_losses_need():
    config = GANConfig(input_shape=(8, 8, 1), latents=6, channels=(8, 16))
    cfg = Config(model=config, task=TaskConfig(name="gan"), data=DataConfig(source="synthetic", batch_size=6))
    generator, discriminator = (
        flops.forward(jaxmodels.create(config, network=name), 6) for name in ("generator", "discriminator")
    )
    first = 2 * 6 * 6 * 2 * 2 * 16  # of latents, and of pixels, no gradient is needed in either network's own loss
    pixels = 2 * 6 * 4 * 4 * 8 * 4 * 4
    # the discriminator's: one generator, two discriminators and their gradients; the generator's: both, and back
    expected = generator + 2 * (3 * discriminator - pixels) + 3 * generator - first + 2 * discriminator
    assert flops.per_step(cfg).model == expected


@dataclasses.dataclass(frozen=True)
class NetConfig:
    classes: int = 4


class Net(nn.Module):
    config: NetConfig

    @nn.compact
    def __call__(self, x, *, train=False):
        x = layers.BatchNorm()(layers.Linear((5,), ("features", "embed"))(x), train)
        return layers.Linear((self.config.classes,), ("embed", "classes"))(x)


def test_a_step_of_a_model_with_batch_statistics(monkeypatch):
    monkeypatch.setattr(functional, "_registered", dict(functional._registered))
    spec = lambda c, batch, length: (jax.ShapeDtypeStruct((batch, 3), jnp.float32),)  # noqa: E731
    functional.register(functional.Family("net", NetConfig, Net, spec, {}))
    cfg = Config(
        model=NetConfig(), task=TaskConfig(name="classification"), data=DataConfig(source="synthetic", batch_size=6)
    )
    assert flops.per_step(cfg).model == 2 * 6 * (2 * 3 * 5 + 3 * 5 * 4)
