import jax
import jax.numpy as jnp

from jaxmodels.models.kernels.kernel import Kernel


def attend(q, k, v, *, causal, scale, **_):
    """Plain attention of q (B, T, H, K) over k and v (B, S, H, K)."""
    scores = jnp.einsum("bthk,bshk->bhts", q, k).astype(jnp.float32) * scale
    if causal:
        T, S = scores.shape[-2:]
        scores = jnp.where(jnp.tril(jnp.ones((T, S), bool)), scores, -jnp.inf)
    return jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(scores).astype(v.dtype), v)


plain = Kernel(attend, frozenset({"causal", "scale", "float32"}))
