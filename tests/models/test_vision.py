"""ResNet, VGG and the small CNN: what they refuse, what training changes, and layers by hand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmodels
from jaxmodels.errors import UserError
from jaxmodels.models import layers, vit
from jaxmodels.models.cnn import CNNConfig
from jaxmodels.models.kernels.convolution import convolve
from jaxmodels.models.resnet import ResNetConfig
from jaxmodels.models.vgg import VGGConfig
from jaxmodels.models.vit import ViTConfig
from jaxmodels.models.yolox import YOLOXConfig

# at these shapes LLVM's optimizations take longer than all else
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
B = 4
RESNET = ResNetConfig((8, 8, 2), 5, (1,), (6,), bottleneck=False, stem="small", stem_width=6)
VGG = VGGConfig((8, 8, 2), 5, (1, 1), (4, 6), (9, 8), batch_norm=True, dropout=0.0)
CNN = CNNConfig((8, 8, 2), 5, (4, 6), (9,))


class Case:
    def __init__(self, config):
        self.config, self.model = config, jaxmodels.create(config)
        rng = np.random.default_rng(0)

        def draw(path, leaf):
            return jnp.asarray(0.3 * rng.normal(size=leaf.shape) + (path[-1].key == "scale"), leaf.dtype)

        self.params = jax.tree_util.tree_map_with_path(draw, self.model.shapes())
        self.stats = jax.tree.map(lambda leaf: leaf + jnp.asarray(rng.uniform(size=leaf.shape)), self.model.stats())
        self.images = jnp.asarray(rng.normal(size=(B, *config.input_shape)), jnp.float32)
        self.compiled = jit(self.model.apply, static_argnames=("train", "head"))

    def apply(self, images, **options):
        out = self.compiled(self.params, images, stats=self.stats or None, **options)
        return out if self.stats else (out, {})


@pytest.fixture(scope="module", params=[RESNET, VGG, CNN], ids=["resnet", "vgg", "cnn"])
def case(request):
    return Case(request.param)


def close(got, expected, atol=1e-5):
    np.testing.assert_allclose(np.asarray(got), np.asarray(expected), rtol=0, atol=atol)


def test_features_times_the_head_are_the_logits(case):
    logits, _ = case.apply(case.images)
    features, _ = case.apply(case.images, head=False)
    assert logits.shape == (B, 5) and logits.dtype == jnp.float32 and features.ndim == 2
    head = case.params["head"]
    close(features @ head["w"] + head["b"], logits)
    half = jaxmodels.create(case.config, dtype="bfloat16")
    inputs = (case.params, case.images)
    out = jax.eval_shape(functools.partial(half.apply, stats=case.stats or None, head=False), *inputs)
    assert jax.tree.leaves(out)[0].dtype == jnp.bfloat16


def test_an_image_does_not_see_the_others_but_for_training_with_batch_norm(case):
    other = case.images.at[1:].multiply(-2)
    (logits, stats), (others, _) = case.apply(case.images), case.apply(other)
    close(others[0], logits[0])
    assert np.abs(others[1] - logits[1]).max() > 0.1
    jax.tree.map(np.testing.assert_array_equal, stats, case.stats)
    (logits, stats), (others, _) = case.apply(case.images, train=True), case.apply(other, train=True)
    seen = np.abs(others[0] - logits[0]).max()
    assert seen > 0.05 if case.stats else seen < 1e-5
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), stats, case.stats)
    assert all(size > 1e-3 for size in jax.tree.leaves(moved))


def test_inputs_of_another_shape_are_refused(case):
    with pytest.raises(UserError, match=r"got inputs of shape \(8, 8, 1\), expected \(8, 8, 2\), try --model"):
        case.model.apply(case.params, jnp.zeros((4, 8, 8, 1)), stats=case.stats or None)


@pytest.mark.parametrize("config", [RESNET, VGG], ids=["resnet", "vgg"])
def test_batch_norm_without_statistics_is_refused(config):
    model = jaxmodels.create(config)
    with pytest.raises(UserError, match="got no batch statistics .* expected apply"):
        jax.eval_shape(model.apply, model.shapes(), *model.inputs(2))


@pytest.mark.parametrize("config", [VGG, CNN], ids=["vgg", "cnn"])
def test_dropout_happens_in_training_only(config):
    case = Case(config)
    dropped = jit(jaxmodels.create(config, dropout=0.5).apply, static_argnames="train")

    def logits(**options):
        out = dropped(case.params, case.images, stats=case.stats or None, **options)
        return out[0] if case.stats else out

    close(logits(), case.apply(case.images)[0])
    one, same, other = (logits(train=True, rng=jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 0.1


def by_hand(x, params, stats):
    """A convolution in a window of 3×3 with zeros around, and normalization by running statistics."""
    x, w = np.pad(np.asarray(x, np.float64), ((0, 0), (1, 1), (1, 1), (0, 0))), np.asarray(params["conv"]["w"])
    height, width = x.shape[1] - 2, x.shape[2] - 2
    y = sum(x[:, i : i + height, j : j + width] @ w[i, j] for i in range(3) for j in range(3))
    y = (y - stats["norm"]["mean"]) / np.sqrt(stats["norm"]["var"] + 1e-5)
    return y * params["norm"]["scale"] + params["norm"]["bias"]


def test_a_small_stem_keeps_the_size_of_the_image():
    case = Case(RESNET)
    features, _ = case.apply(case.images, head=False)
    params, stats = case.params["stages"]["0"]["0"], case.stats["stages"]["0"]["0"]
    x = np.maximum(by_hand(case.images, case.params["stem"], case.stats["stem"]), 0)
    y = np.maximum(by_hand(x, params["unit0"], stats["unit0"]), 0)
    y = np.maximum(x + by_hand(y, params["unit1"], stats["unit1"]), 0)
    close(features, y.mean((1, 2)), 1e-4)


def test_recomputation_changes_neither_gradients_nor_statistics():
    found = []
    case = Case(RESNET)
    for remat in ("none", "full"):
        model = jaxmodels.create(RESNET, remat=remat)

        def loss(params, model=model):
            logits, stats = model.apply(params, case.images, stats=case.stats, train=True)
            return jnp.square(logits - 1).mean(), stats

        found.append(jit(jax.grad(loss, has_aux=True))(case.params))
        assert ("remat" in str(jax.make_jaxpr(jax.grad(loss, has_aux=True))(case.params))) == (remat == "full")
    jax.tree.map(close, *found)


def test_max_pool_is_the_greatest_of_each_window():
    x = np.random.default_rng(0).normal(size=(2, 7, 9, 3)).astype(np.float32)
    for window, stride, padding in ((2, 2, 0), (3, 2, 1), (3, 1, 1), (2, 3, 0)):
        around = ((0, 0), (padding, padding), (padding, padding), (0, 0))
        padded = np.pad(x, around, constant_values=-np.inf)
        windows = np.lib.stride_tricks.sliding_window_view(padded, (window, window), (1, 2))
        expected = windows[:, ::stride, ::stride].max((-2, -1))
        np.testing.assert_array_equal(layers.max_pool(jnp.asarray(x), window, stride, padding), expected)
        # the greatest of a window alone has its gradient
        grads = jax.grad(lambda x, w=window, s=stride, p=padding: layers.max_pool(x, w, s, p).sum())(x)
        times = (x[..., None] == expected.reshape(2, -1, 3).transpose(0, 2, 1)[:, None, None]).sum(-1)
        np.testing.assert_array_equal(grads, times)


@pytest.mark.parametrize(
    ("config", "deviation"),
    [
        # He et al. 2015 (rectifiers), by outputs; PyTorch's VGG has 0.01 for the classifier
        (
            VGGConfig((8, 8, 3), 300, (1, 2), (40, 50), (200,)),
            lambda w: (2 / (9 * w[-1])) ** 0.5 if len(w) > 2 else 0.01,
        ),
        (CNNConfig((8, 8, 3), 300, (40, 50), (200,)), lambda w: (2 / np.prod(w[:-1])) ** 0.5),
    ],
    ids=["vgg", "cnn"],
)
def test_initial_deviations_are_as_published(config, deviation):
    params = jit(jaxmodels.create(config).init)(jax.random.key(0))
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if path[-1].key == "w":
            assert np.std(leaf) == pytest.approx(deviation(leaf.shape), rel=0.06), path
        else:
            assert not np.any(leaf), path


def test_what_cannot_be_is_refused_at_once():
    with pytest.raises(
        UserError, match="got images of 28×28 for 5 stages.* at least 32 pixels .*try depths .2, 2, 3, 3."
    ):
        jaxmodels.create("vgg-16", input_shape=(28, 28, 1))
    jaxmodels.create("vgg-16", input_shape=(28, 28, 1), depths=(2, 2, 3, 3), widths=(64, 128, 256, 512))
    with pytest.raises(UserError, match="got images of 3×9 for 2 convolutions .* at least 4 .*try widths .32,."):
        jaxmodels.create("cnn-mnist", input_shape=(3, 9, 1))
    for name in ("resnet-50", "vgg-16"):
        with pytest.raises(UserError, match="got depths .1, 2. with widths"):
            jaxmodels.create(name, depths=(1, 2))
    for wrong in ({"depths": (3, 0, 6, 3)}, {"widths": (2, 8, 8, 8)}):
        with pytest.raises(UserError, match="expected (at least 1|depths from 1 and widths from 4 up)"):
            jaxmodels.create("resnet-50", **wrong)


VIT = ViTConfig((8, 8, 2), 4, 5, layers=3, heads=2, width=8, mlp_width=12)


@pytest.mark.parametrize("config", [VIT, dataclasses.replace(RESNET, depths=(3,))], ids=["vit", "resnet"])
def test_stochastic_depth_skips_the_later_blocks_more_often_and_in_training_only(config):
    case, rows = Case(config), 64
    images = jnp.repeat(case.images[:1], rows, 0)
    # every example would skip the last block if it could: 15 of 16 do, 10 of 16 the second, 5 of 16 the first
    model = jaxmodels.create(config, stochastic_depth=15 / 16)
    apply = jit(model.apply, static_argnames="train")

    def logits(**options):
        out = apply(case.params, images, stats=case.stats or None, **options)
        return np.asarray(out[0] if case.stats else out)

    close(logits(), case.apply(images)[0])
    one, same, other = (logits(train=True, rng=jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 0.1
    kinds = np.unique(np.round(one, 3), axis=0)
    assert 2 < len(kinds) < rows, "examples skip blocks of their own, and many skip the same"


def test_stochastic_depth_keeps_the_mean_and_skips_whole_examples():
    skip = layers.StochasticDepth()
    x = jnp.ones((4000, 3))
    found = np.asarray(skip.apply({}, x, 0.25, True, rngs={"dropout": jax.random.key(0)}))
    assert set(np.unique(found.round(4))) == {0.0, np.float32(1.3333)}
    assert (found == found[:, :1]).all() and found.mean() == pytest.approx(1, abs=0.03)
    for rate, train in ((0.0, True), (0.9, False)):
        np.testing.assert_array_equal(skip.apply({}, x, rate, train, rngs={"dropout": jax.random.key(0)}), x)
    np.testing.assert_allclose(vit.depths(0.3, 3), [0.1, 0.2, 0.3], rtol=1e-6)


def test_yolox_multiplies_in_bfloat16_where_it_is_told_to_and_gives_float32():
    """Its first outputs hardly depend on its weights, so that their rounding says nothing."""
    model = jaxmodels.create(YOLOXConfig((32, 32, 3), 2, depth=0.1, width=0.125, dtype="bfloat16"))
    traced = jax.make_jaxpr(model.apply)(model.shapes(), model.inputs(1)[0], stats=model.stats())
    products = [eqn for eqn in traced.eqns if eqn.primitive.name in ("conv_general_dilated", "dot_general")]
    assert {x.aval.dtype.name for eqn in products for x in eqn.invars} == {"bfloat16"} and len(products) > 40
    assert traced.out_avals[0].dtype == np.float32


def test_sides_that_the_strides_do_not_divide_are_refused_with_the_nearest():
    with pytest.raises(UserError, match="try --model.input-shape 256 320 3"):
        YOLOXConfig((240, 320, 3))


def test_places_of_yolox_are_the_centers_of_squares_of_each_stride():
    anchors = YOLOXConfig((64, 32, 3)).anchors()
    np.testing.assert_array_equal(np.bincount(anchors[:, 2].astype(int))[[8, 16, 32]], [32, 8, 2])
    np.testing.assert_array_equal(anchors[[0, 1, 4, -1]], [[4, 4, 8], [12, 4, 8], [4, 12, 8], [16, 48, 32]])


@pytest.mark.parametrize(
    ("stride", "padding"), [(1, ((1, 1), (1, 1))), (2, ((1, 1), (1, 1))), (2, "SAME"), (3, "VALID")]
)
def test_channels_by_themselves_are_convolved_as_xla_does(stride, padding):
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(2, 9, 10, 6)).astype(np.float32), rng.normal(size=(3, 3, 1, 6)).astype(np.float32)
    layout = ("NHWC", "HWIO", "NHWC")
    how = {"dimension_numbers": layout, "feature_group_count": 6}
    expected = jax.lax.conv_general_dilated(x, w, (stride, stride), padding, **how)
    np.testing.assert_allclose(convolve(x, w, (stride, stride), padding, 6), expected, rtol=1e-5, atol=1e-5)
