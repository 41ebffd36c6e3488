"""Schedules, decay by kind of parameter, and every update rule."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmodels import create
from jaxmodels.config import SGD, Adafactor, Adam, AdamW, Constant, Linear, Muon
from jaxmodels.errors import UserError
from jaxmodels.models.parameters import Axes
from jaxmodels.train import adafactor, groups
from jaxmodels.train.optim import OPTIMIZERS
from jaxmodels.train.schedules import SCHEDULES
from tests.quick import kind
from tests.zoo import ZOO, arrays

NAMES = tuple(OPTIMIZERS.builtin)


@pytest.fixture(scope="module")
def model():
    return create("gpt2", layers=2, width=16, heads=2, vocab_size=11, context=8, attention="xla")


@pytest.fixture(scope="module")
def params(model):
    return model.init(jax.random.key(0))


def gradients(params, seed=0):
    """A random gradient of each parameter."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: rng.normal(size=p.shape).astype(p.dtype), params)


LINE, COSINE = [1.0, 0.775, 0.55, 0.325, 0.1], [1.0, 0.868198, 0.55, 0.231802, 0.1]
RATES = {
    # schedule, steps of warm-up: the rate of each of five steps (of seven with a warm-up of two)
    ("linear", 0): LINE,
    ("cosine", 0): COSINE,
    ("wsd", 0): [1.0, 1.0, 1.0, 0.55, 0.1],  # the last two of five come down
    ("constant", 0): [1.0] * 5,
    ("linear", 2): [0.5, 1.0, *LINE],
    ("cosine", 2): [0.5, 1.0, *COSINE],
    ("wsd", 2): [0.5, 1.0, 1.0, 1.0, 0.7, 0.4, 0.1],
    ("constant", 2): [0.5, *[1.0] * 6],
}


@pytest.mark.parametrize(("shape", "warmup"), RATES)
def test_each_schedule_begins_and_ends_where_it_should(shape, warmup):
    """The first step moves, the peak is reached with the last step of warm-up, the last step has its share."""
    cfg = AdamW(
        peak_lr=2.0,
        schedule=kind(SCHEDULES, shape, decay_fraction=0.4, final_lr_fraction=0.1),
        warmup_steps=warmup,
    )
    wanted = RATES[shape, warmup]
    rate = cfg.rate(len(wanted))
    assert [float(rate(step)) / 2 for step in range(len(wanted))] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("shape", ["linear", "cosine", "wsd"])
@pytest.mark.parametrize(("steps", "warmup"), [(1000, 0), (1000, 100), (7, 6), (2, 0), (2, 1)])
@pytest.mark.parametrize("final", [0.0, 0.1])
def test_the_last_step_has_the_final_share_whatever_the_length(shape, steps, warmup, final):
    cfg = AdamW(peak_lr=1.0, schedule=kind(SCHEDULES, shape, final_lr_fraction=final), warmup_steps=warmup)
    rates = jax.jit(jax.vmap(cfg.rate(steps)))(jnp.arange(steps)).tolist()
    assert rates[-1] == pytest.approx(final, abs=1e-7) and max(rates) == pytest.approx(1)
    assert rates[0] == pytest.approx(1 / warmup if warmup else 1)
    top = rates.index(max(rates))
    assert rates[top:] == sorted(rates[top:], reverse=True) and rates[:top] == sorted(rates[:top])


def test_the_only_step_of_a_run_has_the_peak():
    for shape in ("linear", "cosine", "wsd", "constant"):
        assert float(AdamW(peak_lr=0.5, schedule=kind(SCHEDULES, shape)).rate(1)(0)) == pytest.approx(0.5)


def test_a_run_may_end_within_its_warm_up():
    rate = AdamW(peak_lr=1.0, warmup_steps=50).rate(40)
    assert [float(rate(s)) for s in (0, 24, 39)] == pytest.approx([0.02, 0.5, 0.8])


def test_all_updates_of_a_step_have_the_step_s_rate(model, params):
    """A critic with three updates a step comes down with the generator, not three times as fast."""
    cfg = SGD(peak_lr=1.0, weight_decay=0.0, clip_norm=None, schedule=Linear())
    tx = cfg.build(5, model.axes(), updates=3)
    ones, opt_state, seen = jax.tree.map(jnp.ones_like, params), tx.init(params), []
    update = jax.jit(tx.update)
    for _ in range(15):
        updates, opt_state = update(ones, opt_state, params)
        seen.append(-float(updates["norm"]["bias"][0]))
    assert seen == pytest.approx(np.repeat(LINE, 3), rel=1e-5)


def test_kinds_are_those_that_parameters_say(model):
    kinds = groups.kinds(model.axes())
    assert kinds["embed"]["w"] == kinds["positions"]["w"] == "embedding"
    assert kinds["layers"]["attn"]["q"] == {"b": "bias", "w": "matrix"}
    assert kinds["layers"]["attn_norm"] == {"bias": "norm", "scale": "norm"}


@pytest.mark.parametrize("decayed", [("matrix",), ("matrix", "embedding"), ("bias", "norm")])
def test_weight_decay_touches_the_chosen_kinds_alone(model, params, decayed):
    cfg = AdamW(peak_lr=1.0, weight_decay=0.5, decay_on=decayed, clip_norm=None, schedule=Constant())
    tx = cfg.build(10, model.axes())
    ones = jax.tree.map(jnp.ones_like, params)
    updates, _ = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, params), tx.init(params), ones)
    got = jax.tree.map(lambda u: float(u.max()), updates)
    want = jax.tree.map(lambda kind: -0.5 if kind in decayed else 0.0, groups.kinds(model.axes()))
    assert got == want


def test_adam_never_decays(model, params):
    tx = Adam(clip_norm=None).build(10, model.axes())
    updates, _ = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    assert all(float(jnp.abs(u).max()) == 0 for u in jax.tree.leaves(updates))


def test_adamw_is_the_published_rule(model, params):
    cfg = AdamW(
        peak_lr=0.1,
        b1=0.8,
        b2=0.9,
        eps=1e-6,
        weight_decay=0.3,
        decay_on=("matrix",),
        clip_norm=1.0,
        schedule=Constant(),
    )
    tx = cfg.build(10, model.axes())
    grads = gradients(params)
    norm = np.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(grads)))
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    g, p = (np.asarray(tree["layers"]["mlp"]["up"]["w"]) for tree in (grads, params))
    g = g / norm  # clipped to norm 1; after one step the corrected moments are g and g²
    np.testing.assert_allclose(
        updates["layers"]["mlp"]["up"]["w"], -0.1 * (g / (np.abs(g) + 1e-6) + 0.3 * p), rtol=1e-4, atol=1e-7
    )


def reference(name, grads, cfg):
    """Where a parameter that starts at 0 is after updates along these gradients, in double precision, as published."""
    p = m = v = 0.0
    for t, g in enumerate(grads.astype(np.float64), 1):
        if name in ("adam", "adamw"):
            m, v = cfg.b1 * m + (1 - cfg.b1) * g, cfg.b2 * v + (1 - cfg.b2) * g**2
            p -= cfg.peak_lr * (m / (1 - cfg.b1**t)) / (np.sqrt(v / (1 - cfg.b2**t)) + cfg.eps)
        elif name == "rmsprop":
            v = cfg.b2 * v + (1 - cfg.b2) * g**2
            p -= cfg.peak_lr * g / (np.sqrt(v) + cfg.eps)
        elif name == "momentum":
            m = cfg.b1 * m + g
            p -= cfg.peak_lr * m
        elif name == "lion":
            p -= cfg.peak_lr * np.sign(cfg.b1 * m + (1 - cfg.b1) * g)
            m = cfg.b2 * m + (1 - cfg.b2) * g
        else:
            p -= cfg.peak_lr * g
    return p


@pytest.mark.parametrize("name", ["adam", "adamw", "rmsprop", "momentum", "lion", "sgd"])
def test_ten_updates_are_those_of_the_published_rule(name):
    """With an epsilon as large as the gradients, so that it matters where it stands."""
    cfg = kind(
        OPTIMIZERS, name, peak_lr=0.1, b1=0.8, b2=0.9, eps=0.01, weight_decay=0.0, clip_norm=None, schedule=Constant()
    )
    tx = cfg.build(10, {"w": Axes(("embed", "mlp"), "matrix")})
    grads = (0.01 * np.random.default_rng(0).normal(size=(10, 4, 3))).astype(np.float32)
    params = {"w": jnp.zeros((4, 3))}
    opt_state, update = tx.init(params), jax.jit(tx.update)
    for g in grads:
        updates, opt_state = update({"w": g}, opt_state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["w"], reference(name, grads, cfg), rtol=2e-5, atol=1e-7)


def test_adafactor_is_optax_s_of_each_layer_s_matrix_by_itself():
    axes = {
        "q": {"w": Axes(("layers", "embed", "heads", "head_dim"), "matrix")},
        "o": {"w": Axes(("heads", "head_dim", "embed"), "matrix")},
        "norm": {"scale": Axes(("layers", "embed"), "norm")},
    }
    shapes = {"q": {"w": (2, 128, 4, 64)}, "o": {"w": (4, 64, 128)}, "norm": {"scale": (2, 8)}}
    params = jax.tree.map(jnp.zeros, shapes, is_leaf=lambda x: isinstance(x, tuple))

    def apart(tree):
        """Each matrix or vector by itself."""
        q, o, norm = tree["q"]["w"], tree["o"]["w"], tree["norm"]["scale"]
        return [q[0].reshape(128, 256), q[1].reshape(128, 256), o.reshape(256, 128), norm[0], norm[1]]

    own = adafactor.scale_by_adafactor(axes)
    other = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
    mine, theirs = own.init(params), other.init(apart(params))
    own_update, other_update = jax.jit(own.update), jax.jit(other.update)
    for seed in range(3):
        grads = gradients(params, seed)
        grads["norm"]["scale"] *= np.array([[1.0], [100.0]], np.float32)
        updates, mine = own_update(grads, mine, params)
        expected, theirs = other_update(apart(grads), theirs, apart(params))
        for a, b in zip(apart(updates), expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_adafactor_keeps_rows_and_columns_of_64_wide_heads_and_of_embeddings():
    """Less than a fiftieth of the parameters' bytes, where Adam keeps twice of them."""
    model = create("gpt2", layers=2, width=256, heads=4, vocab_size=1024, context=256, attention="xla")
    shapes = model.shapes()
    opt_state = jax.eval_shape(Adafactor().build(1, model.axes()).init, shapes)
    kept, whole = (sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) for tree in (opt_state, shapes))
    assert kept < whole / 50
    rows, columns = (optax.tree.get(opt_state, name)["layers"]["attn"]["q"]["w"] for name in ("rows", "columns"))
    assert rows.shape == (2, 256, 1, 1) and columns.shape == (2, 1, 4, 64)


@pytest.mark.parametrize("name", NAMES)
def test_every_rule_lowers_the_loss(name):
    rates = {"sgd": 0.5, "momentum": 0.1, "adafactor": 0.05, "lion": 3e-3}
    model = create("mlp", input_shape=(8,), classes=4, hidden=(16,))
    params = model.init(jax.random.key(0))
    tx = kind(OPTIMIZERS, name, peak_lr=rates.get(name, 1e-2), schedule=Constant()).build(60, model.axes())
    rng = np.random.default_rng(0)
    inputs, labels = rng.normal(size=(12, 8)).astype(np.float32), rng.integers(0, 4, 12)

    @jax.jit
    def step(carry, _):
        params, opt_state = carry

        def loss(params):
            return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, inputs), labels).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    _, losses = jax.lax.scan(step, (params, tx.init(params)), None, length=60)
    assert np.isfinite(losses).all() and float(losses[-1]) < float(losses[0]) - 0.3


def test_muon_makes_updates_of_matrices_orthogonal_and_leaves_the_rest_to_adam(model, params):
    cfg = Muon(peak_lr=1.0, weight_decay=0.0, clip_norm=None, schedule=Constant())
    tx = cfg.build(10, model.axes())
    grads = gradients(params)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    matrix = np.asarray(updates["layers"]["attn"]["o"]["w"]).reshape(2, 16, 16)  # layers are a batch
    for layer in matrix:
        values = np.linalg.svd(layer, compute_uv=False)
        assert values.max() / values.min() < 3, "Newton-Schulz brings all singular values near one size"
    first = np.asarray(updates["embed"]["w"]) * -np.sign(grads["embed"]["w"])  # Adam's first step: one size, each sign
    np.testing.assert_allclose(first, first[0, 0], rtol=1e-3)
    assert first[0, 0] > 0


def named(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x)
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def steps(model, params, cfg, count=2):
    """Parameters by name before and after so many steps along random gradients."""
    tx = cfg.build(count, model.axes(), model.shapes())
    before, opt_state, update = params, tx.init(params), jax.jit(tx.update)
    for step in range(count):
        updates, opt_state = update(gradients(params, step), opt_state, params)
        params = optax.apply_updates(params, updates)
    return named(before), named(params)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_what_is_frozen_keeps_its_bits(model, params, name):
    cfg = kind(OPTIMIZERS, name, peak_lr=0.1, weight_decay=0.5, freeze=("embed/*", "layers[:1]/*", "norm/bias"))
    before, after = steps(model, params, cfg)
    for path in before:
        moved = before[path] != after[path]
        if path == "embed/w" or path == "norm/bias":
            assert not moved.any(), path
        elif path.startswith("layers/"):
            assert not moved[0].any() and moved[1].any(), path
        else:
            assert moved.any(), path


def test_frozen_layers_are_counted_as_in_a_slice():
    for pattern, expected in (("[:2]", "1100"), ("[2:]", "0011"), ("[-1:]", "0001"), ("[1:3]", "0110"), ("", "1111")):
        hold = groups.frozen((f"layers{pattern}/*",), "layers/attn/q/w", 4)
        assert "".join(str(int(h)) for h in hold) == expected
    assert not groups.frozen(("layers[:2]/mlp/*",), "layers/attn/q/w", 4).any()


def test_what_is_frozen_has_no_part_in_the_norm_that_is_clipped(model, params):
    sgd = SGD(peak_lr=1.0, weight_decay=0.0, schedule=Constant(), clip_norm=1.0, freeze=("embed/*",))
    tx = sgd.build(1, model.axes(), model.shapes())
    grads = jax.tree.map(jnp.ones_like, params)
    grads["embed"]["w"] *= 1e6
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    assert float(optax.tree.norm(updates)) == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("patterns", [("layer/*",), ("embed/*", "head[:2]/*"), ("embed/*", "layers[2:]/*")])
def test_a_pattern_of_nothing_is_refused_by_name(model, patterns):
    with pytest.raises(UserError, match=r"which matches no parameter, expected some of embed") as caught:
        groups.check_freeze(patterns, {"model": model.shapes()})
    assert f"got optim.freeze {patterns[-1]!r}" in str(caught.value)


def test_a_pattern_may_hold_one_of_two_networks_but_not_all_of_both():
    networks = {name: create(config).shapes() for name, (_, config) in ZOO.items() if name.startswith("dcgan")}
    assert len(networks) == 2
    groups.check_freeze(("head/*",), networks)
    with pytest.raises(UserError, match="which match every parameter, expected some to train"):
        groups.check_freeze(("head/*", "*"), networks)


def test_each_layer_moves_less_than_the_one_above_and_embeddings_least(model, params):
    cfg = SGD(peak_lr=1.0, weight_decay=0.0, clip_norm=None, layer_decay=0.5, schedule=Constant())
    tx = cfg.build(1, model.axes(), model.shapes())
    updates, _ = jax.jit(tx.update)(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    for path, update in named(updates).items():
        if path.startswith("layers/"):
            np.testing.assert_allclose(update[0], -0.5, err_msg=path)
            np.testing.assert_allclose(update[1], -1.0, err_msg=path)
        else:
            np.testing.assert_allclose(update, -0.25 if path.startswith(("embed", "positions")) else -1.0, err_msg=path)


@pytest.mark.parametrize(
    ("family", "lowest"),
    [
        ("bert", "embed embed_norm positions types"),
        ("vit", "class_token patches positions"),
        ("llama", "embed"),
        ("t5", "embed encoder/relative decoder/relative"),
    ],
)
def test_all_that_comes_before_the_layers_moves_least_and_the_head_in_full(family, lowest):
    model = create(ZOO[family][1])
    scales = named(groups.factors((), 0.5, model.shapes(), model.axes()))
    for path, scale in scales.items():
        if "layers/" in path:
            np.testing.assert_array_equal(scale.reshape(-1), [0.5, 1.0], err_msg=path)
        else:
            assert scale.reshape(-1) == (0.25 if path.rpartition("/")[0] in lowest.split() else 1.0), path


def test_towers_have_depths_of_their_own():
    model = create(ZOO["clip"][1], image_layers=3)
    scales = named(groups.factors((), 0.5, model.shapes(), model.axes()))
    assert scales["image/patches/w"] == scales["image/embed_norm/bias"] == 0.125 and scales["text/embed/w"] == 0.25
    assert scales["scale/log"] == scales["text/projection/w"] == scales["image/norm/scale"] == 1


def test_a_stack_is_known_by_its_axes_whatever_it_is_called():
    made = Axes(("layers", "embed"), "matrix"), Axes(("embed",), "embedding", before_stack=True)
    axes = {"far": {"blocks": {"w": made[0]}, "start": made[1]}, "near": {"inner": {"w": made[0]}}, "first": made[1]}
    depths = {"far": {"blocks": {"w": 3}, "start": 1}, "near": {"inner": {"w": 2}}, "first": 1}
    shapes = jax.tree.map(lambda n: jax.ShapeDtypeStruct((n, 4) if n > 1 else (4,), jnp.float32), depths)
    scales = named(groups.factors((), 0.5, shapes, axes))
    assert scales["far/start"] == 0.5**3 and scales["first"] == 0.5**3  # of its own tower, of the deepest that it feeds
    np.testing.assert_array_equal(scales["near/inner/w"].reshape(-1), [0.5, 1.0])


def test_a_single_number_is_frozen_too():
    model = create(ZOO["clip"][1])
    cfg = SGD(freeze=("scale/*", "image/*"), weight_decay=0.0)
    before, after = steps(model, arrays(model), cfg, 1)
    assert all(before[path].shape == after[path].shape for path in before)
    for path in before:
        assert (before[path] == after[path]).all() == path.startswith(("scale", "image")), path


def test_layers_decay_is_refused_where_there_are_no_layers():
    model = create("mlp")
    with pytest.raises(UserError, match="got optim.layer_decay 0.5 for a model without a stack of layers, expected 1"):
        AdamW(layer_decay=0.5).build(1, model.axes(), model.shapes())
