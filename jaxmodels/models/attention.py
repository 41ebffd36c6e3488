"""One attention over all kernels: each equals the reference or refuses, and `auto` logs which one it took.

Dims: B batch, T queries, S keys, H heads, G heads of keys and values, K head size, D width.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.errors import UserError
from jaxmodels.models.kernels import partition, xla
from jaxmodels.models.kernels.kernel import BUILTIN, Attend, Call, Kernel, kernel_of
from jaxmodels.models.kernels.visibility import Mask
from jaxmodels.parallel import rules
from jaxmodels.parallel.platform import capability, platform

Array = jax.Array
AUTO = ("ring", "ulysses", "cudnn", "splash", "blockwise", "xla")
"""The kernels of which `auto` takes the first that prefers a call and can compute it."""

log = logging.getLogger("jaxmodels")


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = False,
    window: int | None = None,
    segment_ids: Array | tuple[Array, Array] | None = None,
    bias: Array | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    rng: Array | None = None,
    softcap: float | None = None,
    q_offset: int | Array = 0,
    kv_length: int | Array | None = None,
    kernel: str = "auto",
) -> Array:
    """softmax(scale·qkᵀ)·v over the keys each query may see, computed in float32; a query that sees none gives zeros.

    Scores are scaled, capped (`softcap`), biased, masked, in this order. A query at position t (q_offset is the first
    one's) sees key s if s < kv_length, s <= t when causal, |t - s| < window, and their segments are equal.

    Shapes: q (B, T, H, K); k and v (B, S, G, K), G dividing H; segment_ids (B, T), or a pair (B, T) and (B, S); bias
    broadcastable to (B, H, T, S); q_offset and kv_length () or (B,). Returns (B, T, H, K).

    Raises:
        UserError: shapes that do not fit, or a kernel that does not compute what is asked.
    """
    segments = segment_ids if segment_ids is None or isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
    if bias is not None:
        bias = jnp.asarray(bias)
        bias = bias.reshape((1,) * (4 - bias.ndim) + bias.shape)
    check_arguments(q, k, v, window, segments, bias, dropout, rng)
    arrays = {
        "q": q,
        "k": k,
        "v": v,
        "segments": segments,
        "bias": bias,
        "rng": rng if dropout else None,
        "q_offset": q_offset if isinstance(q_offset, int) else jnp.atleast_1d(q_offset).astype(jnp.int32),
        "kv_length": None if kv_length is None else jnp.atleast_1d(kv_length).astype(jnp.int32),
    }
    options = {
        "causal": causal,
        "window": window,
        "dropout": dropout,
        "softcap": softcap,
        "scale": 1 / math.sqrt(q.shape[3]) if scale is None else scale,
    }
    if _kept is not None:
        arrays["q"] = record_weights(_kept, arrays, options)
    call, place = describe_call(arrays, options), platform()
    devices = max(1, jax.sharding.get_abstract_mesh().size)

    def automatic(call: Call, prefix: str = "") -> tuple[str, Kernel]:
        name, reason = choose(place, call, devices)
        log_choice(name, prefix + reason)
        return name, kernel_of(name)

    def whole(call: Call) -> Attend:
        _, chosen = automatic(call, "for whole sequences, ")
        return chosen.function(call, whole)

    name, chosen = automatic(call) if kernel == "auto" else (kernel, require(kernel, place, call))
    attend = functools.partial(chosen.function(call, whole), **options)
    with jax.named_scope(Mask(call.T, call.S, causal, window).scope), jax.named_scope(name):
        if chosen.partition == "compiler":
            return attend(**arrays)
        return partition.run_sharded(attend, arrays, chosen.partition == "tokens")


class Kept:
    """The weights that arrive while calls are recorded, each with the number of the call that was traced for it."""

    def __init__(self) -> None:
        self.arrived: list[tuple[int, np.ndarray]] = []
        self.calls = itertools.count()


_kept: Kept | None = None


@contextlib.contextmanager
def recording() -> Iterator[list[np.ndarray]]:
    """A context that collects the weights (B, H, T, S) of all calls, call by call and layer by layer, on one device.

    A call in a scan over layers is one call. The list is filled when the context is left, before which the outputs must
    be ready. Calls that were compiled before are not recorded, so apply the model without `jit`.
    """
    global _kept
    before, _kept = _kept, Kept()
    found: list[np.ndarray] = []
    try:
        yield found
        found += [weights for _, weights in sorted(_kept.arrived, key=lambda each: each[0])]
    finally:
        _kept = before


def record_weights(kept: Kept, arrays: dict[str, Any], options: dict[str, Any]) -> Array:
    """Add the weights of a call to a recording, wherever it is traced, such as in a scan over layers.

    Returns q, which depends on their having arrived: flax's scan takes no callback with an effect, and a pure one is
    run where its result is needed.
    """
    given = {name: x for name, x in (arrays | options).items() if name not in ("v", "rng", "dropout")}
    p = xla.weights(**given)
    (B, G, R, T, S), q, number = p.shape, arrays["q"], next(kept.calls)

    def keep(weights: Any) -> np.ndarray:
        kept.arrived.append((number, np.array(weights)))
        return np.zeros((), q.dtype)

    return q + jax.pure_callback(keep, jax.ShapeDtypeStruct((), q.dtype), p.reshape(B, G * R, T, S))


def describe_call(arrays: dict[str, Any], options: dict[str, Any]) -> Call:
    """The call, as a kernel is chosen by it."""
    q, k, offset = arrays["q"], arrays["k"], arrays["q_offset"]
    whole, windowed = isinstance(offset, int), options["window"] is not None
    uses = {
        "causal": options["causal"],
        "window": windowed and options["causal"],
        "two-sided window": windowed and not options["causal"],
        "segment_ids": arrays["segments"] is not None,
        "bias": arrays["bias"] is not None,
        "scale": options["scale"] != 1 / math.sqrt(q.shape[3]),
        "grouped heads": q.shape[2] != k.shape[2],
        "dropout": options["dropout"] > 0,
        "softcap": options["softcap"] is not None,
        "q_offset": whole and offset != 0,
        "q_offset array": not whole,
        "kv_length": arrays["kv_length"] is not None,
        "float32": q.dtype == jnp.float32,
    }
    features = frozenset(name for name, wanted in uses.items() if wanted)
    (B, T, H, K), (S, G) = q.shape, k.shape[1:3]
    cut = rules.pieces("seq"), rules.pieces("heads")
    return Call(B, T, S, H, G, K, q.dtype.name, features, offset if whole else 0, *cut, capability())


def choose(platform: str, call: Call, devices: int = 1) -> tuple[str, str]:
    """Return the kernel that `auto` takes for a call on this many devices, and the reason."""
    passed = ""
    for name in AUTO:
        kernel = kernel_of(name)
        wanted = kernel.preferred(call, platform, devices)
        if wanted is None:
            continue
        against = kernel.refusal(call) or kernel.absence(platform)
        if against is None:
            return name, passed + wanted
        passed += f"{name} {against}; "
    raise AssertionError("the reference refuses no call")


@functools.cache
def log_choice(kernel: str, reason: str) -> None:
    """Log a choice, each once."""
    log.info("attention: kernel %s: %s", kernel, reason)


def require(name: str, platform: str, call: Call) -> Kernel:
    """The kernel that was asked for by name.

    Raises:
        UserError: there is none of that name, or it cannot compute the call.
    """
    kernel = kernel_of(name)
    if reason := kernel.refusal(call):
        others = ((other, kernel_of(other)) for other in BUILTIN)
        able = [other for other, each in others if not (each.refusal(call) or each.absence(platform))]
        raise UserError(f"kernel {name!r} {reason}; kernels that do: {', '.join(able)}; try kernel='auto'")
    if reason := kernel.absence(platform):
        raise UserError(f"kernel {name!r} {reason}; try kernel='auto'")
    return kernel


def check_arguments(
    q: Array,
    k: Array,
    v: Array,
    window: int | None,
    segments: tuple[Array, Array] | None,
    bias: Array | None,
    dropout: float,
    rng: Array | None,
) -> None:
    """Refuse shapes that do not fit together, and values out of range."""
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        raise UserError(f"got q {q.shape}, k {k.shape}, v {v.shape}, expected (B, T, H, K), (B, S, G, K), (B, S, G, K)")
    (B, T, H, _), (S, G) = q.shape, k.shape[1:3]
    if H % G:
        raise UserError(f"got {H} heads of queries and {G} of keys, expected a number that {G} divides")
    if window is not None and window < 1:
        raise UserError(f"got attention window {window}, expected at least 1, try window=None for no window")
    if segments is not None and (segments[0].shape, segments[1].shape) != ((B, T), (B, S)):
        raise UserError(f"got segment_ids {segments[0].shape}, {segments[1].shape}, expected {(B, T)}, {(B, S)}")
    if bias is not None and any(n not in (1, full) for n, full in zip(bias.shape, (B, H, T, S), strict=True)):
        raise UserError(f"got attention bias {bias.shape}, expected a shape that broadcasts to {(B, H, T, S)}")
    if not 0 <= dropout < 1:
        raise UserError(f"got attention dropout {dropout}, expected a share from 0 up to 1")
    if dropout and rng is None:
        raise UserError("got attention dropout without rng, expected a key, try dropout=0.0 when not training")
