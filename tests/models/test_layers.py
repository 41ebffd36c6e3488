"""Leaf layers against numpy, and batch statistics that are explicit and global."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxmodels.errors import UserError
from jaxmodels.models import families, layers
from jaxmodels.models import model as models
from jaxmodels.models.kernels.dropout import drop
from jaxmodels.models.kernels.normalize import layer_norm, rms_norm
from jaxmodels.parallel import rules


def rand(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def close(got, expected, atol=1e-5):
    np.testing.assert_allclose(np.asarray(got), np.asarray(expected), rtol=0, atol=atol)


def made(layer, x):
    """Shapes and names of a layer's parameters; its own `init` is the initializer of its weights."""
    return jax.eval_shape(lambda key: nn.Module.init(layer, key, x), jax.random.key(0))["params"]


def run(layer, x, **params):
    return layer.apply({"params": {name: jnp.asarray(value) for name, value in params.items()}}, jnp.asarray(x))


@pytest.mark.parametrize(
    ("shape", "axes", "inputs", "formula"),
    [
        ((5,), ("embed", "mlp"), (4,), "btd,df->btf"),
        ((2, 3), ("embed", "heads", "head_dim"), (4,), "btd,dhk->bthk"),
        ((5,), ("heads", "head_dim", "embed"), (2, 3), "bthk,hkd->btd"),
        ((2, 2), ("heads", "head_dim", None, "embed"), (3, 2), "bthk,hkef->btef"),
    ],
)
def test_linear_contracts_as_its_axes_say(shape, axes, inputs, formula):
    x, w, b = rand(2, 3, *inputs), rand(*inputs, *shape, seed=1), rand(*shape, seed=2)
    layer = layers.Linear(shape, axes)
    params = made(layer, x)
    assert (params["w"].names, params["b"].names) == (axes, axes[len(inputs) :])
    assert params["w"].value.shape == w.shape
    product = np.einsum(formula, x, w)
    close(run(layer, x, w=w, b=b), product + b)
    close(run(layers.Linear(shape, axes, bias=False), x, w=w), product)


def test_embed_looks_up_rows_and_its_logits_are_products_with_them():
    w, x = rand(7, 4), rand(2, 3, 4, seed=1)
    table = layers.Embed(7, 4).bind({"params": {"w": jnp.asarray(w)}})
    np.testing.assert_array_equal(table(jnp.array([[6, 0], [3, 3]])), w[[[6, 0], [3, 3]]])
    close(table.logits(jnp.asarray(x)), x @ w.T)
    half = layers.Embed(7, 4, dtype="bfloat16").bind({"params": {"w": jnp.asarray(w)}})
    assert half(jnp.array([1])).dtype == jnp.bfloat16
    assert half.logits(jnp.asarray(x)).dtype == jnp.float32


@pytest.mark.parametrize(
    ("shape", "axes"),
    [((4,), ("embed",)), ((4,), ()), ((4,), ("features", "features", "embed")), (4, ("features", "embed"))],
)
def test_a_linear_layer_with_another_number_of_axes_is_refused(shape, axes):
    with pytest.raises(
        UserError,
        match=r"got parameter w with the outputs .* and the axes .* for an input of shape \(2, 3\), expected tuples",
    ):
        made(layers.Linear(shape, axes), jnp.ones((2, 3)))


def test_a_token_outside_the_table_gives_nan_and_not_some_other_row():
    table = layers.Embed(7, 4).bind({"params": {"w": jnp.asarray(rand(7, 4))}})
    assert np.isnan(table(jnp.array([7]))).all()


def test_norms_equal_their_formulas():
    x, scale, bias = 3 + 2 * rand(2, 3, 8), rand(8, seed=1), rand(8, seed=2)
    centered = x - x.mean(-1, keepdims=True)
    unit = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 0.1)
    close(run(layers.LayerNorm(0.1), x, scale=scale, bias=bias), unit * scale + bias)
    close(run(layers.LayerNorm(0.1, bias=False), x, scale=scale), unit * scale)
    close(run(layers.RMSNorm(0.1), x, scale=scale), x / np.sqrt((x**2).mean(-1, keepdims=True) + 0.1) * scale)


def plain(x, scale, bias, centered):
    """Normalization as JAX differentiates it."""
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True) if centered else y
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + 1e-5)
    return (y * scale + bias).astype(x.dtype) if centered else y.astype(x.dtype) * scale.astype(x.dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("centered", [True, False])
def test_a_norm_has_the_gradients_of_its_formula_and_keeps_its_input_alone(centered, dtype):
    x, scale, bias = 3 * rand(4, 5, 16) + 1, rand(16, seed=1), rand(16, seed=2)
    x, weights = jnp.asarray(x, dtype), rand(4, 5, 16, seed=3)

    def ours(x, scale, bias):
        return layer_norm(x, scale, bias, 1e-5) if centered else rms_norm(x, scale, 1e-5)

    def total(f):
        return jax.grad(lambda *args: (f(*args).astype("float32") * weights).sum(), (0, 1, 2))(x, scale, bias)

    for got, expected in zip(total(ours), total(lambda *args: plain(*args, centered)), strict=True):
        largest = float(jnp.abs(expected).max())
        close(got.astype("float32"), expected.astype("float32"), (1e-5 if dtype == "float32" else 0.02) * largest)
    _, backward = jax.vjp(ours, x, scale, bias)
    kept = [leaf for leaf in jax.tree.leaves(backward) if leaf.size == x.size]
    assert [leaf.dtype for leaf in kept] == [x.dtype]


@pytest.mark.parametrize("layer", [layers.LayerNorm(bias=False), layers.RMSNorm()])
def test_norms_of_bfloat16_are_computed_in_float32(layer):
    x = jnp.asarray(100 + rand(4, 64), jnp.bfloat16)
    got = run(layer, x, scale=np.ones(64, np.float32))
    assert got.dtype == jnp.bfloat16
    exact = run(layer, x.astype(jnp.float32), scale=np.ones(64, np.float32))
    np.testing.assert_array_equal(got, exact.astype(jnp.bfloat16))


def direct(x, w, strides, padding, groups):
    """Convolution as its definition has it: a loop over outputs."""
    (B, _, _, C), (h, v, _, F) = x.shape, w.shape
    x = np.pad(x, ((0, 0), *padding, (0, 0)))
    tall, wide = ((n - k) // s + 1 for n, k, s in zip(x.shape[1:3], (h, v), strides, strict=True))
    out = np.zeros((B, tall, wide, F))
    for i in range(tall):
        for j in range(wide):
            patch = x[:, i * strides[0] :, j * strides[1] :][:, :h, :v]
            for f in range(F):
                group = slice(f // (F // groups) * (C // groups), (f // (F // groups) + 1) * (C // groups))
                out[:, i, j, f] = np.tensordot(patch[..., group], w[..., f], 3)
    return out


@pytest.mark.parametrize(
    ("window", "strides", "padding", "pads", "groups"),
    [
        ((3, 3), None, "SAME", ((1, 1), (1, 1)), 1),
        ((3, 2), (2, 1), "VALID", ((0, 0), (0, 0)), 1),
        ((3, 3), (2, 2), ((2, 0), (1, 3)), ((2, 0), (1, 3)), 2),
        ((1, 3), None, "SAME", ((0, 0), (1, 1)), 4),
    ],
)
def test_convolution_equals_its_definition(window, strides, padding, pads, groups):
    x, w, b = rand(2, 7, 6, 4), rand(*window, 4 // groups, 8, seed=1), rand(8, seed=2)
    layer = layers.Conv(8, window, strides, padding, groups)
    assert made(layer, x)["w"].value.shape == w.shape
    close(run(layer, x, w=w, b=b), direct(x, w, strides or (1, 1), pads, groups) + b)


@pytest.mark.parametrize(
    ("size", "window", "strides", "padding", "pads"),
    [
        ((2, 2), (3, 3), None, "SAME", ((1, 1), (1, 1))),
        ((1, 1), (3, 3), None, "SAME", ((1, 1), (1, 1))),
        ((2, 1), (3, 3), (2, 2), "SAME", ((0, 1), (1, 1))),
        ((2, 3), (7, 7), (2, 2), ((3, 3), (3, 3)), ((3, 3), (3, 3))),
        ((3, 1), (4, 2), (3, 3), ((5, 6), (3, 2)), ((5, 6), (3, 2))),
    ],
)
def test_a_convolution_of_a_map_no_larger_than_the_window_is_a_product_and_equals_its_definition(
    size, window, strides, padding, pads
):
    x, w = rand(2, *size, 3), rand(*window, 3, 5, seed=1)
    strides = strides or (1, 1)
    layer = layers.Conv(5, window, strides, padding, bias=False)
    program = str(jax.make_jaxpr(lambda x, w: run(layer, x, w=w))(jnp.asarray(x), jnp.asarray(w)))
    assert "conv_general_dilated" not in program and program.count("dot_general") == 1
    close(run(layer, x, w=w), direct(x, w, strides, pads, 1))
    alone = layers.Conv(5, window, (99, 99), ((9, 0), (9, 0)), bias=False)  # its one window lies in the padding
    close(run(alone, x, w=w), np.zeros((2, 1, 1, 5)))

    def gradients(convolution):
        def total(x, w):
            y = convolution(x, w)
            return (y * jnp.cos(jnp.arange(y.size).reshape(y.shape))).sum()

        return jax.grad(total, (0, 1))(jnp.asarray(x), jnp.asarray(w))

    def reference(x, w):
        return jax.lax.conv_general_dilated(x, w, strides, pads, dimension_numbers=("NHWC", "HWIO", "NHWC"))

    for got, expected in zip(gradients(lambda x, w: run(layer, x, w=w)), gradients(reference), strict=True):
        close(got, expected, 1e-4)


def test_convolution_of_sequences_and_volumes():
    x, w = rand(2, 9, 3), rand(4, 3, 5, seed=1)
    flat = direct(x[:, :, None], w[:, None], (2, 1), ((0, 0), (0, 0)), 1)[:, :, 0]
    close(run(layers.Conv(5, (4,), (2,), "VALID", bias=False), x, w=w), flat)
    volume, w = rand(1, 3, 4, 5, 2), rand(3, 4, 5, 2, 6, seed=1)
    whole = run(layers.Conv(6, (3, 4, 5), padding="VALID", bias=False), volume, w=w)
    close(whole, np.tensordot(volume, w, 4)[:, None, None, None], 1e-4)


def test_dropout_keeps_the_mean_and_drops_its_share():
    x, layer = jnp.ones((200, 200)), layers.Dropout(0.3)
    got = np.asarray(layer.apply({}, x, True, rngs={"dropout": jax.random.key(0)}))
    assert (got == 0).mean() == pytest.approx(0.3, abs=0.01)
    assert got.mean() == pytest.approx(1, abs=0.015)
    np.testing.assert_allclose(got[got != 0], 1 / 0.7, rtol=1e-6)
    assert layer.apply({}, x, False) is x


@pytest.mark.parametrize("shape", [(3, 20_001), (60_000, 1)])
def test_neighbors_are_dropped_apart_though_they_share_random_bits(shape):
    kept = np.asarray(drop(jnp.ones(shape, jnp.bfloat16), 0.4, jax.random.key(1))) != 0
    assert kept.shape == shape and kept.mean() == pytest.approx(0.6, abs=0.01)
    kept = kept.reshape(len(kept), -1) if shape[-1] > 1 else kept.T
    for apart in (1, 2):
        assert (kept[:, apart:] & kept[:, :-apart]).mean() == pytest.approx(0.36, abs=0.015)


def test_dropout_differs_from_layer_to_layer_of_a_scan():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, cache, shared):
            return layers.Dropout(0.5)(x, True), cache

    two = layers.scan_layers(Block, 2, "none")()
    got, _ = two.apply({}, jnp.ones((100, 100)), None, None, rngs={"dropout": jax.random.key(0)})
    assert (np.asarray(got) != 0).mean() == pytest.approx(0.25, abs=0.02)


def test_gelu_is_the_tanh_form():
    x = np.linspace(-6, 6, 101)
    expected = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    close(layers.gelu(jnp.asarray(x, jnp.float32)), expected, 2e-6)


@dataclasses.dataclass(frozen=True)
class NetConfig(families.ModelConfig):
    width: int = 3
    momentum: float = 0.8


class Net(nn.Module):
    """A convolution, batch normalization, and a product: enough to have parameters beside statistics."""

    config: NetConfig

    @nn.compact
    def __call__(self, x, *, train=False):
        y = layers.Conv(self.config.width, name="conv")(x)
        y = layers.BatchNorm(self.config.momentum, name="norm")(y, train)
        return layers.Linear((2,), ("embed", "classes"), name="head")(y.mean((1, 2)))


FAMILY = families.Family(
    "net", NetConfig, Net, lambda c, batch, length: (jax.ShapeDtypeStruct((batch, 4, 4, 2), jnp.float32),), {}
)


@pytest.fixture(scope="module")
def net():
    model = models.functional(NetConfig(), FAMILY)
    return model, model.init(jax.random.key(0)), jnp.asarray(rand(16, 4, 4, 2, seed=3))


def test_a_registered_family_is_known_by_its_config(monkeypatch):
    monkeypatch.setattr(families, "_registered", dict(families._registered))
    monkeypatch.setattr(families.FAMILIES, "_registered", {})
    with pytest.raises(UserError, match="got model config NetConfig"):
        families.create(NetConfig())
    families.register(FAMILY)
    assert families.create(NetConfig(), width=5).config == NetConfig(width=5)


def test_statistics_are_a_tree_of_their_own(net):
    model, params, x = net
    assert {leaf.shape for leaf in jax.tree.leaves(model.stats())} == {(3,)}
    assert jax.tree.structure(model.stats()) == jax.tree.structure({"norm": {"mean": 0, "var": 0}})
    assert set(params["norm"]) == {"scale", "bias"} == set(model.axes()["norm"])
    assert set(params) == {"conv", "norm", "head"}
    out, stats = model.apply(params, x, stats=model.stats(), train=True)
    assert jax.tree.structure(stats) == jax.tree.structure(model.stats()) and out.shape == (16, 2)
    np.testing.assert_array_equal(model.stats()["norm"]["mean"], 0)
    _, same = model.apply(params, x, stats=stats)
    jax.tree.map(np.testing.assert_array_equal, same, stats)


def norm(x, stats, train, **options):
    variables = {"params": {"scale": jnp.array([1.0, 2.0]), "bias": jnp.array([0.0, 5.0])}, "stats": stats}
    out, new = layers.BatchNorm(**options).apply(variables, jnp.asarray(x), train, mutable=["stats"])
    return out, new["stats"]


def test_batch_statistics_by_hand():
    x = np.array([[1, 2], [3, 2], [5, 8]], np.float32)  # means 3 and 4, variances 8/3 and 8, unbiased 4 and 12
    before = {"mean": jnp.array([10.0, 0.0]), "var": jnp.array([1.0, 2.0])}
    out, after = norm(x, before, True, momentum=0.75, eps=1e-6)
    close(after["mean"], [0.75 * 10 + 0.25 * 3, 0.25 * 4])
    close(after["var"], [0.75 * 1 + 0.25 * 4, 0.75 * 2 + 0.25 * 12])
    close(out[:, 0], (x[:, 0] - 3) / np.sqrt(8 / 3))
    close(out[:, 1], 2 * (x[:, 1] - 4) / np.sqrt(8) + 5)
    out, same = norm(x, after, False, eps=1e-6)
    jax.tree.map(np.testing.assert_array_equal, same, after)
    close(out[:, 0], (x[:, 0] - 8.25) / np.sqrt(1.75))


def test_batch_norm_of_values_far_from_zero_is_not_lost_in_rounding():
    x = 3000 + rand(512, 2)
    out, stats = norm(x, {"mean": jnp.zeros(2), "var": jnp.ones(2)}, True, momentum=0.0)
    exact = x.astype(np.float64)
    np.testing.assert_allclose(stats["var"], exact.var(0, ddof=1), rtol=1e-3)
    close(out[:, 0], (exact[:, 0] - exact[:, 0].mean()) / np.sqrt(exact[:, 0].var() + 1e-5), 1e-3)


def step(model, params, stats, x):
    def loss(params):
        out, new = model.apply(params, x, stats=stats, train=True)
        return jnp.square(out - 1).sum(), (out, new)

    grads, (out, new) = jax.grad(loss, has_aux=True)(params)
    return grads, out, new


def test_batch_norm_over_replicas_equals_one_device(net):
    model, params, x = net
    grads, out, stats = jax.jit(lambda x: step(model, params, model.stats(), x))(x)

    def replica(x):
        grads, out, new = step(model, params, model.stats(), x)
        return jax.lax.psum(grads, rules.REPLICAS), out, new

    grads2, out2, stats2 = jax.pmap(replica, axis_name=rules.REPLICAS)(x.reshape(8, 2, 4, 4, 2))
    close(out2.reshape(16, 2), out)
    for device in range(8):
        jax.tree.map(lambda a, b, d=device: close(a[d], b), stats2, stats)
    jax.tree.map(lambda a, b: close(a[0], b, 1e-4), grads2, grads)


def test_batch_norm_of_a_sharded_batch_equals_one_device(net):
    model, params, x = net
    compute = jax.jit(lambda x: step(model, params, model.stats(), x))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharded = compute(jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))))
    assert len(sharded[1].sharding.device_set) == 8
    jax.tree.map(lambda a, b: close(a, b, 1e-4), sharded, compute(x))
