"""Losses over examples; targets below 0 are ignored."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmodels.data.contract import IGNORED
from jaxmodels.models.layers import shard
from jaxmodels.parallel.platform import platform
from jaxmodels.parallel.rules import add_up, apart, gather, pieces, without_fsdp

FEW = 2048
"""With a smaller vocabulary all logits are held at once, which is faster and takes little memory."""
SCORED = 2048
"""Tokens per device whose logits are held at once."""


_whole = contextvars.ContextVar("whether all logits are made at once", default=False)


@contextlib.contextmanager
def whole() -> Iterator[None]:
    """While a loss is traced for counting: all logits at once, without padding positions."""
    token = _whole.set(True)
    try:
        yield
    finally:
        _whole.reset(token)


class Scores(NamedTuple):
    """Sums over all targets that count."""

    objective: jax.Array
    """The training objective: cross-entropy with label smoothing, plus z-loss."""
    loss: jax.Array
    """Cross-entropy in nats."""
    correct: jax.Array
    count: jax.Array


def cross_entropy(logits: jax.Array, targets: jax.Array, smoothing: float = 0.0, z_loss: float = 0.0) -> Scores:
    """Sum the softmax cross-entropy over targets.

    Shapes: logits (…, V), targets (…) integers, below 0 ignored.
    Source: label smoothing, Szegedy et al. 2016, section 7; z-loss, Chowdhery et al. 2022, section 5.
    """
    logits = logits.astype(jnp.float32)
    counts = targets >= 0
    safe = jnp.where(counts, targets, 0)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    # a sum rather than a look-up, whose gradient is a scatter that accelerators cannot fuse
    ids = jax.lax.broadcasted_iota(safe.dtype, logits.shape, logits.ndim - 1)
    picked = jnp.where(ids == safe[..., None], logits, 0).sum(-1)
    loss = jnp.where(counts, log_z - picked, 0.0)
    objective = loss
    if smoothing:
        objective = jnp.where(counts, log_z - (1 - smoothing) * picked - smoothing * logits.mean(-1), 0.0)
    if z_loss:
        objective = objective + jnp.where(counts, z_loss * jnp.square(log_z), 0.0)
    # like argmax: the first of several maxima
    behind = (logits < picked[..., None]) | ((logits == picked[..., None]) & (ids >= safe[..., None]))
    correct = counts & behind.all(-1)
    return Scores(objective.sum(), loss.sum(), correct.sum(), counts.sum())


def language_cross_entropy(
    features: jax.Array, unembedding: jax.Array, targets: jax.Array, smoothing: float = 0.0, z_loss: float = 0.0
) -> Scores:
    """Compute `cross_entropy(features @ unembedding.T, targets)`, in pieces if the vocabulary is large.

    Shapes: features (B, T, D), unembedding (V, D), targets (B, T).
    """
    output: Any = gather(unembedding.astype(features.dtype), ("vocab", "embed"))
    if output.shape[0] < FEW or _whole.get():
        return cross_entropy(logits_of(features, output), targets, smoothing, z_loss)
    return linear_cross_entropy(features, output, targets, smoothing, z_loss, at_once(*targets.shape))


def at_once(batch: int, length: int) -> int:
    """Return how many positions of a row to score at a time: on a CPU as many as its caches hold the logits of.

    Elsewhere a device scores `SCORED` tokens at a time, because each time the gradient of all output weights is read
    and written.
    """
    few = 32
    if platform() == "cpu":
        return few
    return min(length // pieces("seq"), max(few, SCORED * pieces("batch") // batch))


def linear_cross_entropy(
    features: jax.Array,
    unembedding: jax.Array,
    targets: jax.Array,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk: int = 32,
) -> Scores:
    """Compute `cross_entropy(features @ unembedding.T, targets)` without ever holding all logits.

    The logits of `chunk` positions at a time are computed, scored and dropped. The gradients of features and
    unembedding are computed along with them in the forward pass, so that nothing is computed twice. Positions are
    split, not rows: rows stay on their devices, each of which accumulates its own part of the unembedding's gradient;
    the parts are summed once at the end. Only `objective` carries a gradient.
    Shapes: features (B, T, D), unembedding (V, D), targets (B, T).
    """
    sums: Any = _linear(features, unembedding, targets, (smoothing, z_loss, chunk))
    return Scores(*sums)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _linear(features: Any, unembedding: Any, targets: Any, how: tuple[float, float, int]) -> Any:
    smoothing, z_loss, chunk = how

    def body(sums: Any, part: Any) -> tuple[Any, None]:
        h, t = part
        return jax.tree.map(jnp.add, sums, tuple(cross_entropy(logits_of(h, unembedding), t, smoothing, z_loss))), None

    zero = (jnp.float32(0), jnp.float32(0), jnp.int32(0), jnp.int32(0))
    return jax.lax.scan(body, zero, (_cut(features, chunk, 0), _cut(targets, chunk, IGNORED)))[0]


def _linear_forward(features: Any, unembedding: Any, targets: Any, how: tuple[float, float, int]) -> Any:
    smoothing, z_loss, chunk = how
    B, T = targets.shape
    rows, n = _pieces("batch", B), _pieces("seq", T)

    own = functools.partial(apart, rows=rows, along=n)
    # pieces of D are gathered, and gradients scattered, with D as the outer dimension in memory; there, the loop
    # holds both that way round, or accelerators would copy them from one layout to the other
    turned = pieces("embed") > 1
    table, order, names = unembedding, "vd", ("vocab", "embed")
    if turned:
        table, order, names = unembedding.T, "dv", ("embed", "vocab")

    def body(carry: Any, part: Any) -> tuple[Any, Any]:
        sums, dw = carry
        h, t = part

        def score(logits: jax.Array) -> tuple[jax.Array, Scores]:
            each = functools.partial(cross_entropy, smoothing=smoothing, z_loss=z_loss)
            scores = jax.vmap(jax.vmap(each))(own(logits), own(t))
            return scores.objective.sum(), scores

        logits = jnp.einsum(f"btd,{order}->btv", h, table, preferred_element_type=jnp.float32)
        dlogits, scores = jax.grad(score, has_aux=True)(logits)
        dlogits = dlogits.astype(h.dtype)
        dh = jnp.einsum(f"btv,{order}->btd", dlogits, table)
        dw = dw + jnp.einsum(f"rnbtv,rnbtd->rn{order}", own(dlogits), own(h), preferred_element_type=jnp.float32)
        return (jax.tree.map(jnp.add, sums, tuple(scores)), dw), dh

    def zeros(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
        return shard(jnp.zeros((rows, n, *shape), dtype), "batch", "seq", *without_fsdp(names)[: len(shape)])

    counts = (zeros(), zeros(), zeros(dtype=jnp.int32), zeros(dtype=jnp.int32))
    start = (counts, zeros(*table.shape))
    (sums, dw), dh = jax.lax.scan(body, start, (_cut(features, chunk, 0), _cut(targets, chunk, IGNORED)))
    dw = add_up(dw, ("batch", "seq"), names).astype(unembedding.dtype)
    return jax.tree.map(jnp.sum, sums), (_join(dh, features.shape), dw.T if turned else dw)


def _linear_backward(how: Any, gradients: Any, given: Any) -> tuple[Any, Any, None]:
    scale = given[0]
    return (gradients[0] * scale).astype(gradients[0].dtype), (gradients[1] * scale).astype(gradients[1].dtype), None


_linear.defvjp(_linear_forward, _linear_backward)


def in_pieces(score: Callable[..., Any], vocabulary: int, targets: jax.Array, *features: jax.Array) -> Any:
    """Sum `score(targets, *features)`, a tree of numbers, over pieces of positions, if the vocabulary is large.

    What a piece needs is computed again in the backward pass, so that all logits are never held.
    Shapes: targets (B, T), features (B, T, …).
    """
    if vocabulary < FEW or _whole.get():
        return score(targets, *features)
    chunk = at_once(*targets.shape)
    parts = (_cut(targets, chunk, IGNORED), *(_cut(x, chunk, 0) for x in features))

    def body(sums: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, score(*part)), None

    shapes = jax.eval_shape(score, *jax.tree.map(lambda x: x[0], parts))
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(jax.checkpoint(body, prevent_cse=False), zero, parts)[0]


def logits_of(features: jax.Array, unembedding: jax.Array) -> jax.Array:
    """Return the logits (B, T, V) of features (B, T, D) in float32."""
    return jnp.einsum("btd,vd->btv", features, unembedding, preferred_element_type=jnp.float32)


def _cut(x: jax.Array, chunk: int, fill: int) -> jax.Array:
    """Reshape (B, T, …) to (steps, B, n · chunk, …): one chunk of each of a row's n pieces, which are padded at the
    end."""
    n = _pieces("seq", x.shape[1])
    x = x.reshape(x.shape[0], n, -1, *x.shape[2:])
    short = -x.shape[2] % chunk
    x = jnp.pad(x, [(0, 0), (0, 0), (0, short)] + [(0, 0)] * (x.ndim - 3), constant_values=fill)
    x = jnp.moveaxis(x.reshape(*x.shape[:2], -1, chunk, *x.shape[3:]), 2, 0)
    return x.reshape(*x.shape[:2], n * chunk, *x.shape[4:])


def _join(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Undo `_cut` for an array that had this shape (B, T, …)."""
    n = _pieces("seq", shape[1])
    x = jnp.moveaxis(x.reshape(*x.shape[:2], n, -1, *x.shape[3:]), 0, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])[:, :, : shape[1] // n].reshape(shape)


def _pieces(name: str, size: int) -> int:
    """Return how many pieces the mesh splits a dimension into, each of which must stay on its devices."""
    n = pieces(name)
    return n if size % n == 0 else 1


def binary_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross-entropy in nats of each logit with its target in [0, 1], which is taken as a probability."""
    logits = logits.astype(jnp.float32)
    return jax.nn.softplus(logits) - logits * targets


def divergence(logits: jax.Array, others: jax.Array, targets: jax.Array, temperature: float) -> jax.Array:
    """Sum over targets T² · KL(softmax(others / T) ‖ softmax(logits / T)) in nats, by the sigmoid of each class where
    there is a target for each.

    Shapes: logits and others (…, V), targets (…) or (…, V), below 0 ignored.
    Source: Hinton et al. 2015, section 2; the square keeps the size of gradients.
    """
    mine, theirs = (x.astype(jnp.float32) / temperature for x in (logits, others))
    if targets.ndim == logits.ndim:
        pairs = [(jax.nn.log_sigmoid(sign * mine), jax.nn.log_sigmoid(sign * theirs)) for sign in (1, -1)]
        each = sum(jnp.exp(b) * (b - a) for a, b in pairs)
    else:
        mine, theirs = jax.nn.log_softmax(mine), jax.nn.log_softmax(theirs)
        each = (jnp.exp(theirs) * (theirs - mine)).sum(-1)
    return temperature**2 * jnp.where(targets >= 0, each, 0.0).sum()


def gaussian_kl(mean: jax.Array, log_variance: jax.Array) -> jax.Array:
    """KL divergence in nats of diagonal normal distributions from the standard normal distribution.

    Shapes: mean and log_variance (…, Z), returns (…).
    Source: Kingma & Welling 2013, appendix B.
    """
    return 0.5 * (jnp.exp(log_variance) + jnp.square(mean) - 1 - log_variance).sum(-1)


def gradient_penalty(
    critic: Callable[[jax.Array], jax.Array], real: jax.Array, fake: jax.Array, share: jax.Array
) -> jax.Array:
    """Squared distance from 1 of the norm of the critic's gradient, at points between real and fake examples.

    The critic maps each example independently, so it has no batch normalization.
    Shapes: real and fake (B, …), share (B,) is the weight of fake, returns (B,).
    Source: Gulrajani et al. 2017, equation 3.
    """
    share = share.reshape(-1, *(1,) * (real.ndim - 1))
    gradients = jax.grad(lambda x: critic(x).sum())(real + share * (fake - real))
    square = jnp.square(gradients).sum(range(1, real.ndim))
    # the square root has no gradient at 0
    return jnp.square(jnp.sqrt(square + 1e-12) - 1)
