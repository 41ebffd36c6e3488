"""FLOPs against closed forms."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import jaxmodels
from jaxmodels.models import flops
from jaxmodels.models.gpt2 import GPT2Config
from jaxmodels.models.kernels.grouped import grouped
from tests.flops import GPT2, LLAMA, MIXTRAL, B, T, gpt2_by_hand, llama_by_hand


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


def forward(config):
    model = jaxmodels.create(config, attention="xla")
    return flops.count(model.apply, model.shapes(), jax.ShapeDtypeStruct((B, T), jnp.int32))


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
