"""Attention over tokens on several devices equals the reference, and moves as many bytes as it claims."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxmodels.config import Mesh
from jaxmodels.errors import UserError
from jaxmodels.models.attention import attention, choose
from jaxmodels.models.kernels.blocks import Plan
from jaxmodels.models.kernels.kernel import Call
from jaxmodels.models.kernels.ring import Ring, collect, deal, pairs
from jaxmodels.parallel import rules
from jaxmodels.parallel.mesh import make_mesh

B, K = 2, 8


def arrays(T, H=4, G=2, segments=False):
    rng = np.random.default_rng(0)
    q, k, v, w = (jnp.asarray(rng.normal(size=(B, T, heads, K)), jnp.float32) for heads in (H, G, G, H))
    ids = jnp.asarray(np.sort(rng.integers(0, 3, (B, T)), 1)) if segments else None
    return (q, k, v), w, ids


def both(kernel, w, ids, **how):
    """A jitted function that gives output and gradients."""

    def total(q, k, v):
        out = attention(q, k, v, segment_ids=ids, kernel=kernel, **how)
        return (out * w).sum(), out

    return jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))


def mesh_of(**sizes):
    cfg = Mesh(**{"data": 1, **sizes})
    return make_mesh(cfg, jax.devices()[: int(np.prod(list(sizes.values())))])


@pytest.mark.parametrize(
    ("kernel", "sizes", "shape", "how"),
    [
        ("ring", {"context": 4}, {"T": 24, "segments": True}, {"causal": True}),
        ("ring", {"data": 2, "context": 2, "tensor": 2}, {"T": 300, "segments": True}, {"causal": True}),
        ("ring", {"context": 3}, {"T": 24, "segments": True}, {"scale": 0.3, "softcap": 3.0}),
        ("ring", {"context": 4}, {"T": 32, "H": 2, "G": 2}, {"causal": True, "window": 5}),
        ("ring", {"context": 4}, {"T": 32}, {"window": 5}),
        ("ulysses", {"context": 2, "tensor": 2}, {"T": 20, "segments": True}, {"causal": True}),
        ("ulysses", {"data": 2, "context": 4}, {"T": 20, "G": 1}, {"causal": True, "window": 7}),
    ],
    ids=lambda x: " ".join(f"{a}={b}" for a, b in x.items()) if isinstance(x, dict) else x,
)
def test_it_equals_the_reference_forward_and_backward(kernel, sizes, shape, how):
    qkv, w, ids = arrays(**shape)
    expected = both("xla", w, ids, **how)(*qkv)
    with jax.set_mesh(mesh_of(**sizes)):
        got = both(kernel, w, ids, **how)(*qkv)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5), got, expected)


def collectives(text):
    """Names of the collectives of a compiled program, and how often each is there; none of a device with itself."""
    text = "\n".join(line for line in text.splitlines() if "replica_groups={{0},{1}," not in line)
    found = re.findall(r"= .*? (all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all)(?:-start)?\(", text)
    return {name: found.count(name) for name in set(found)}


@pytest.mark.parametrize(("kernel", "moves"), [("ring", "collective-permute"), ("ulysses", "all-to-all")])
def test_keys_and_values_are_never_gathered(kernel, moves):
    qkv, w, _ = arrays(16, 4, 4)
    mesh = mesh_of(context=4)
    placed = [jax.device_put(x, rules.sharding(mesh, ("batch", "seq", "heads", None))) for x in qkv]
    with jax.set_mesh(mesh):
        program = both(kernel, w, None, causal=True).lower(*placed).compile()
    assert set(collectives(program.as_text())) == {moves}


def test_zigzag_is_undone_and_gives_all_devices_the_same_work():
    mesh, n = mesh_of(context=4), 4
    (axis,) = rules.RULES["seq"]
    ring = Ring(Plan(True, None, 1.0, None, 4, 4), axis, 4)

    def local(x):
        dealt = deal(x, axis)
        steps = [[jnp.int32(seen) for _, _, seen, _ in pairs(ring, r, None, None)] for r in range(n)]
        return dealt, collect(dealt, axis), jnp.array(steps).sum(1)[None]

    tokens = jnp.arange(2 * n)[None]
    specs = P(None, axis), P(None, axis), P(axis)
    dealt, back, work = jax.shard_map(local, mesh=mesh, in_specs=P(None, axis), out_specs=specs)(tokens)
    assert dealt[0].tolist() == [0, 7, 1, 6, 2, 5, 3, 4]
    assert back[0].tolist() == list(range(2 * n))
    assert work.tolist() == [[3, 2, 2, 2]] * n, "pairs of chunks that are computed, of four at each step"


def test_auto_takes_the_ring_where_the_mesh_cuts_tokens_and_says_what_it_cannot():
    call = Call(8, 64, 64, 8, 2, 16, features=frozenset({"causal", "float32"}), pieces=4)
    assert choose("cpu", call) == ("ring", "the mesh cuts tokens into 4 pieces")
    kernel, reason = choose("cpu", call._replace(T=60, S=60))
    assert kernel == "ulysses" and "ring needs a length that 8 divides" in reason
    kernel, reason = choose("cpu", call._replace(features=call.features | {"bias"}))
    assert kernel == "blockwise" and reason.startswith("ring does not support bias; ulysses does not")
    assert choose("cpu", call._replace(S=128))[0] == "blockwise", "keys of other tokens"


@pytest.mark.parametrize(
    ("kernel", "shape", "said"),
    [
        ("ulysses", {"T": 24, "H": 6}, "'ulysses' needs heads that 4 divides on this mesh, got 6"),
        ("ring", {"T": 28}, "'ring' needs a length that 8 divides on this mesh, got 28"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(kernel, shape, said):
    (q, k, v), _, _ = arrays(**shape)
    with jax.set_mesh(mesh_of(context=4)), pytest.raises(UserError, match=said):
        jax.eval_shape(lambda: attention(q, k, v, causal=True, kernel=kernel))


def test_without_a_mesh_they_are_kernels_of_one_device():
    qkv, w, ids = arrays(10, segments=True)
    how = {"causal": True, "q_offset": jnp.array(-2), "kv_length": 7}  # as through a cache
    expected = both("xla", w, ids, **how)(*qkv)
    for kernel in ("ring", "ulysses"):
        got = both(kernel, w, ids, **how)(*qkv)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5), got, expected)
