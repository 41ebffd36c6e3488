"""Tokens sent to experts: products with their weights, places while there is room, and devices that hold them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.config import Mesh
from jaxmodels.models import experts
from jaxmodels.models.kernels import grouped
from jaxmodels.models.mixtral import MixtralConfig
from jaxmodels.parallel import rules
from jaxmodels.parallel.mesh import make_mesh
from jaxmodels.plan import program

B, T = 2, 12


def close(got, expected, atol=2e-5):
    np.testing.assert_allclose(np.asarray(got), np.asarray(expected), rtol=0, atol=atol)


def by_hand(x, w, sizes):
    ends = np.cumsum(sizes)
    return np.concatenate([x[end - size : end] @ w[e] for e, (size, end) in enumerate(zip(sizes, ends, strict=True))])


@pytest.mark.parametrize(
    "sizes",
    [(10, 10, 10, 10), (0, 40, 0, 0), (40, 0, 0, 0), (0, 0, 1, 39), (1, 0, 0, 0), (7, 9, 8, 16), (100, 1, 0, 99)],
    ids=str,
)
def test_each_row_meets_its_experts_weights(sizes):
    rng = np.random.default_rng(0)
    rows = sum(sizes)
    x, w, dy = (rng.normal(size=shape).astype(np.float32) for shape in ((rows, 6), (4, 6, 5), (rows, 5)))
    n = jnp.array(sizes, jnp.int32)
    y, pull = jax.vjp(lambda x, w: grouped.grouped(x, w, n), jnp.asarray(x), jnp.asarray(w))
    close(y, by_hand(x, w, sizes), 1e-5)
    dx, dw = pull(dy)
    close(dx, by_hand(dy, w.swapaxes(1, 2), sizes), 1e-5)
    ends = np.cumsum(sizes)
    close(dw, [x[end - size : end].T @ dy[end - size : end] for size, end in zip(sizes, ends, strict=True)], 1e-4)


def test_what_a_tpu_computes_is_the_same():
    rng = np.random.default_rng(0)
    x, w, dy = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((20, 6), (3, 6, 5), (20, 5)))
    sizes = jnp.array([5, 0, 15], jnp.int32)
    close(grouped.grouped(x, w, sizes), jax.lax.ragged_dot(x, w, sizes), 1e-5)
    close(grouped._block_outer(x, dy, sizes), grouped._ragged_outer(x, dy, sizes), 1e-5)
    program = jax.jit(jax.grad(lambda x, w: grouped.grouped(x, w, sizes).sum(), (0, 1)))
    text = program.trace(x, w).lower(lowering_platforms=("tpu",)).as_text()
    assert "ragged_dot" in text
    # weights' gradients are a loop over blocks where the compiler would multiply all rows with all experts
    assert ("while" in text) != grouped.RAGGED_OUTER


@pytest.mark.parametrize("sent", ["anywhere", "all to the same two"])
def test_every_token_gets_all_its_experts_however_unbalanced(sent):
    rng = np.random.default_rng(0)
    E, k, D, F = 5, 2, 8, 6
    x = jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32)
    gate, up, down = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((E, D, F),) * 2 + ((E, F, D),))
    share = jnp.asarray(rng.random((B, T, k)), jnp.float32)
    chosen = np.argsort(rng.normal(size=(B, T, E)), -1)[..., :k]
    if sent != "anywhere":
        chosen = np.broadcast_to([3, 1], (B, T, k))
    y = jax.jit(functools.partial(experts.dropless, activation=jax.nn.silu))(x, chosen, share, (gate, up, down))
    hidden = jax.nn.silu(jnp.einsum("btd,edf->btef", x, gate)) * jnp.einsum("btd,edf->btef", x, up)
    alone = np.asarray(jnp.einsum("btef,efd->bted", hidden, down))
    expected = np.take_along_axis(alone, chosen[..., None], 2) * np.asarray(share)[..., None]
    close(y, expected.sum(2), 1e-4)


def test_a_backward_pass_that_computes_again_needs_no_results_of_experts():
    """Shares have their gradients from hidden units: of the three products of a row, those with gate and up are made
    again, and that with down is not.
    """
    E, k, D, F = 4, 2, 16, 32
    x, share = jnp.ones((B, 64, D)), jnp.ones((B, 64, k))
    weights = (jnp.ones((E, D, F)),) * 2 + (jnp.ones((E, F, D)),)
    chosen = jnp.asarray(np.random.default_rng(0).integers(0, E, share.shape))

    def forward(x, share, weights, chosen):
        return experts.dropless(x, chosen, share, weights, jax.nn.silu)

    def flops(fn):
        text = jax.jit(fn).lower(x, share, weights, chosen).compile().as_text()
        return sum(program.parse(text).parts().values())

    def gradient(fn):
        return jax.grad(lambda *args: jnp.sin(fn(*args)).sum(), (0, 1, 2))

    again = flops(gradient(jax.checkpoint(forward))) - flops(gradient(forward))
    assert again == 2 / 3 * flops(forward) > 0


def test_places_are_given_in_the_order_of_tokens_until_there_are_none():
    chosen = jnp.array([[[0, 1], [1, 0], [0, 2], [0, 1], [2, 1]], [[2, 1], [2, 1], [2, 1], [2, 0], [0, 1]]])
    full = 3 * 2
    places = experts.assign_places(chosen, None, 3, 2)
    expected = [
        [[0, 2], [3, 1], [full, 4], [full, full], [5, full]],
        [[4, 2], [5, 3], [full, full], [full, 0], [1, full]],
    ]
    np.testing.assert_array_equal(places, expected)
    real = jnp.array([[False, True, True, True, True], [True] * 5])
    np.testing.assert_array_equal(
        experts.assign_places(chosen, real, 3, 2)[0], [[full, full], [2, 0], [1, 4], [full, 3], [5, full]]
    )


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.25])
def test_dropped_choices_are_those_beyond_the_capacity(factor):
    rng = np.random.default_rng(0)
    E, k, length = 8, 2, 50
    chosen = np.argsort(rng.normal(size=(3, length, E)) + np.arange(E) / 4, -1)[..., :k]
    capacity = MixtralConfig(routing="capacity", capacity_factor=factor).capacity(length)
    assert capacity == int(np.ceil(factor * k * length / E))
    dropped = np.asarray(experts.assign_places(jnp.asarray(chosen), None, E, capacity) == E * capacity).sum((1, 2))
    counts = np.stack([np.bincount(row.ravel(), minlength=E) for row in chosen])
    np.testing.assert_array_equal(dropped, np.maximum(counts - capacity, 0).sum(1))
    assert dropped.min() > 0


def test_a_token_that_finds_no_room_passes_by():
    x = jax.random.normal(jax.random.key(0), (1, 6, 8))
    keys = jax.random.split(jax.random.key(1), 3)
    weights = tuple(
        jax.random.normal(key, shape) for key, shape in zip(keys, ((2, 8, 4), (2, 8, 4), (2, 4, 8)), strict=True)
    )
    chosen = jnp.zeros((1, 6, 1), jnp.int32)
    y = experts.limited(x, experts.assign_places(chosen, None, 2, 4), jnp.ones((1, 6, 1)), weights, jax.nn.silu, 4)
    assert np.all(np.abs(np.asarray(y[0, :4])).max(-1) > 1e-2)
    np.testing.assert_array_equal(y[0, 4:], 0)


def test_tokens_go_to_the_experts_devices_and_back():
    mesh = make_mesh(Mesh(data=2, expert=4))
    E, k, D, F, C = 4, 2, 8, 6, 5

    def spec(shape, *names, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=rules.sharding(mesh, names))

    def run(x, places, share, weights):
        return experts.limited(x, places, share, weights, jax.nn.silu, C)

    rows = ("batch", "seq", None)
    wide, narrow = (E, D, F), (E, F, D)
    with jax.set_mesh(mesh):
        args = (
            spec((16, T, D), *rows),
            spec((16, T, k), *rows, dtype=jnp.int32),
            spec((16, T, k), *rows),
            (spec(wide, "expert", "embed", "mlp"),) * 2 + (spec(narrow, "expert", "mlp", "embed"),),
        )
        text = jax.jit(run, out_shardings=rules.sharding(mesh, rows)).lower(*args).compile().as_text()
    found = [name for name in ("all-to-all", "all-gather", "all-reduce") for _ in range(text.count(f" {name}("))]
    assert found == ["all-to-all"] * 2
