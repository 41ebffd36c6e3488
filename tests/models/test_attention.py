"""`attention`: every kernel equals the reference or refuses by name; what the reference computes."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import jaxmodels
from jaxmodels.config import Mesh
from jaxmodels.errors import UserError
from jaxmodels.models.attention import attention, describe_call, recording
from jaxmodels.models.kernels import blocks, blockwise, cudnn, looped, partition
from jaxmodels.models.kernels.kernel import BUILTIN, FEATURES, feature_table, kernel_of, no_reason
from jaxmodels.parallel import rules
from jaxmodels.parallel.mesh import make_mesh

B, T, H, K = 2, 256, 4, 16


def quickest() -> dict[str, bool | int]:
    """Compiler options for programs that take longer to compile than to run: a quarter of the time."""
    found = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
    try:
        jax.jit(lambda: 0, compiler_options=found)()
    except jax.errors.JaxRuntimeError:  # newer versions have no such option
        del found["xla_cpu_use_fusion_emitters"]
    return found


QUICK = quickest()
TOLERANCE = {"float32": 2e-5, "bfloat16": 3e-2}
"""Largest difference from the reference in float32, as a share of its largest value."""

SEGMENTS = np.stack([np.repeat([0, 1, 2], [90, 60, 106]), np.repeat([3, 1], [129, 127])])
NORMAL = np.random.RandomState(0).normal
CASES = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": 70},
    "two-sided window": {"window": 70},
    "segment_ids": {"segment_ids": SEGMENTS},
    "segment_ids of keys": {"segment_ids": (SEGMENTS, SEGMENTS[:, ::-1] % 3)},
    "bias of heads": {"bias": NORMAL(size=(H, T, T))},
    "bias of keys": {"bias": NORMAL(size=(B, 1, 1, T))},
    "scale": {"scale": 0.7},
    "grouped heads": {"G": 2},
    "one head of keys": {"G": 1, "causal": True},
    "dropout": {"dropout": 0.2, "rng": 0},
    "softcap": {"softcap": 0.5},
    "q_offset": {"causal": True, "q_offset": 100, "T": 128},
    "q_offset array": {"causal": True, "q_offset": np.array([128, 7]), "T": 128},
    "kv_length": {"kv_length": np.array([0, 200])},
    "packed": {"causal": True, "segment_ids": SEGMENTS, "G": 2},
    "packed window": {"causal": True, "window": 40, "segment_ids": SEGMENTS},
    "bias, softcap": {"bias": NORMAL(size=(1, H, T, T)), "softcap": 0.5},
    "bias, packed": {"bias": NORMAL(size=(1, H, T, T)), "segment_ids": SEGMENTS, "causal": True},
    "kv_length, causal": {"kv_length": np.array([150, 0]), "causal": True},
    "kv_length, window, offset": {"kv_length": 210, "causal": True, "window": 50, "q_offset": 128, "T": 128},
    "softcap, window, grouped": {"softcap": 0.5, "causal": True, "window": 70, "G": 1, "scale": 0.5},
    "decoding": {"causal": True, "q_offset": np.array([200, 0]), "kv_length": np.array([201, 1]), "T": 1},
    "short": {"causal": True, "T": 37, "S": 53},
    "odd, all seen": {"T": 37, "S": 53},
    "odd, more queries than keys": {"T": 53, "S": 37, "causal": True},
    "odd, offset": {"T": 37, "S": 53, "q_offset": 9, "causal": True},
    "more queries than keys": {"T": 256, "S": 128, "causal": True},
}


def arrays(T=T, S=256, G=H, dtype="float32"):
    """q, k, v and the weights of a sum over the output."""
    keys = jax.random.split(jax.random.key(1), 4)
    shapes = (B, T, H, K), (B, S, G, K), (B, S, G, K), (B, T, H, K)
    return [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)]


def options(case):
    case = {name: value for name, value in CASES[case].items() if name not in ("T", "S", "G")}
    if "rng" in case:
        case["rng"] = jax.random.key(case["rng"])
    return jax.tree.map(
        lambda x: jnp.asarray(x, "float32" if x.dtype == float else "int32") if isinstance(x, np.ndarray) else x, case
    )


@functools.cache
def outcome(case, kernel, dtype):
    """Output and gradients of q, k, v and the bias if there is one."""
    q, k, v, w = arrays(dtype=dtype, **{n: x for n, x in CASES[case].items() if n in ("T", "S", "G")})
    given = options(case)
    bias = given.pop("bias", None)

    def total(q, k, v, bias):
        out = attention(q, k, v, bias=bias, kernel=kernel, **given)
        return jnp.vdot(out.astype("float32"), w.astype("float32")), out

    wanted = (0, 1, 2) if bias is None else (0, 1, 2, 3)
    (_, out), grads = jax.jit(jax.value_and_grad(total, wanted, has_aux=True), compiler_options=QUICK)(q, k, v, bias)
    return [np.asarray(x, "float32") for x in (out, *grads)]


def call_of(case, dtype):
    """What the case asks of a kernel."""
    q, k, _, _ = arrays(dtype=dtype, **{n: x for n, x in CASES[case].items() if n in ("T", "S", "G")})
    given = {"window": None, "causal": False, "dropout": 0.0, "softcap": None, "scale": K**-0.5, **options(case)}
    full = {"segments": given.get("segment_ids"), "bias": None, "kv_length": None, "q_offset": 0, **given}
    return describe_call({"q": q, "k": k, **full}, given)


@pytest.fixture
def cudnn_as_xla(monkeypatch):
    """The arguments that cuDNN would get, given to jax.nn's own formulation."""
    attend = functools.partial(cudnn.attend, implementation="xla")
    monkeypatch.setattr(cudnn, "KERNEL", dataclasses.replace(cudnn.KERNEL, attend=attend, absent=no_reason))


KERNELS = [*((kernel, "float32") for kernel in ("blockwise", "splash", "tokamax")), ("cudnn", "bfloat16")]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("kernel", "dtype"), KERNELS)
def test_each_kernel_equals_the_reference_or_refuses_by_name(kernel, dtype, case, cudnn_as_xla):
    if kernel == "tokamax" and importlib.util.find_spec("tokamax") is None:
        pytest.skip("the package tokamax is not installed")
    if reason := kernel_of(kernel).refusal(call_of(case, dtype)):
        with pytest.raises(UserError, match=f"kernel '{kernel}' {re.escape(reason)}; kernels that do: xla") as error:
            outcome(case, kernel, dtype)
        assert "\n" not in str(error.value)
        return
    compare(outcome(case, kernel, dtype), outcome(case, "xla", "float32"), TOLERANCE[dtype])


@pytest.mark.parametrize(
    "case",
    [
        "causal",
        "packed window",
        "two-sided window",
        "segment_ids of keys",
        "bias of heads",
        "bias of keys",
        "bias, softcap",
        "softcap, window, grouped",
        "q_offset",
        "short",
        "more queries than keys",
    ],
)
def test_blockwise_in_loops_equals_the_reference(case, monkeypatch):
    monkeypatch.setattr(blockwise, "UNROLLED", 0)
    compare(outcome.__wrapped__(case, "blockwise", "float32"), outcome(case, "xla", "float32"), TOLERANCE["float32"])


@pytest.mark.parametrize("case", ["packed", "softcap, window, grouped", "bias of heads"])
@pytest.mark.parametrize("kernel", ["xla", "blockwise", "splash"])
def test_bfloat16_is_near_the_float32_reference(kernel, case):
    if (kernel, case) == ("splash", "bias of heads"):
        with pytest.raises(UserError, match="does not support bias"):
            outcome(case, kernel, "bfloat16")
        return
    compare(outcome(case, kernel, "bfloat16"), outcome(case, "xla", "float32"), TOLERANCE["bfloat16"])


def compare(got, expected, tolerance):
    for name, x, y in zip(("output", "dq", "dk", "dv", "dbias"), got, expected, strict=False):
        assert np.abs(x - y).max() <= tolerance * max(np.abs(y).max(), 1e-3), name
    assert len(got) == len(expected)


def test_the_cases_cover_the_contract():
    asked = frozenset().union(*(call_of(case, "float32").features for case in CASES))
    assert asked == frozenset(FEATURES) and set(BUILTIN) <= set(re.findall(r"\w+", feature_table()))


def test_the_reference_is_the_textbook_formula():
    q, k, v, _ = (np.asarray(x, "float64") for x in arrays(T=8, S=8))
    expected = np.zeros_like(q)
    for b, t, h in np.ndindex(B, 8, H):
        scores = np.array([q[b, t, h] @ k[b, s, h] / 4 for s in range(t + 1)])
        weights = np.exp(scores) / np.exp(scores).sum()
        expected[b, t, h] = sum(p * v[b, s, h] for s, p in enumerate(weights))
    got = jax.jit(functools.partial(attention, causal=True, kernel="xla"))(*map(jnp.float32, (q, k, v)))
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("kernel", ["xla", "blockwise"])
def test_a_query_that_sees_nothing_gives_zeros_and_no_gradient(kernel):
    out, dq, dk, dv = outcome("kv_length", kernel, "float32")
    assert not out[0].any() and not dq[0].any() and not dk[0].any() and not dv[0].any()
    assert out[1].any() and not dk[1, 200:].any()


@pytest.mark.parametrize("kernel", ["xla", "blockwise"])
@pytest.mark.parametrize("case", ["causal", "window", "two-sided window", "packed window"])
def test_hidden_keys_get_exactly_no_gradient(kernel, case):
    q, k, v, w = arrays()
    t = 140

    def row(k, v):
        return jnp.vdot(attention(q, k, v, kernel=kernel, **options(case))[:, t], w[:, t])

    grads = jax.jit(jax.grad(row, (0, 1)), compiler_options=QUICK)(k, v)
    seen = np.any([np.abs(g).sum((2, 3)) > 0 for g in grads], axis=0)
    s = np.arange(256)
    expected = {
        "causal": s <= t,
        "window": (s <= t) & (t - s < 70),
        "two-sided window": abs(t - s) < 70,
        "packed window": (s <= t) & (t - s < 40) & (SEGMENTS[:, [t]] == SEGMENTS),
    }[case]
    np.testing.assert_array_equal(seen, np.broadcast_to(expected, (B, 256)))


def test_grouped_heads_equal_repeated_heads():
    q, k, v, _ = arrays(G=2)
    plain = jax.jit(functools.partial(attention, kernel="xla"), compiler_options=QUICK)
    got, expected = plain(q, k, v), plain(q, *(jnp.repeat(x, 2, axis=2) for x in (k, v)))
    np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize("kernel", ["xla", "blockwise"])
def test_decoding_step_by_step_equals_the_whole(kernel):
    q, k, v, _ = arrays(T=12, S=12)
    whole = jax.jit(functools.partial(attention, causal=True, window=5, kernel=kernel), compiler_options=QUICK)(q, k, v)
    step = jax.jit(
        lambda q, k, v, t: attention(
            q, k, v, causal=True, window=5, q_offset=t, kv_length=t + q.shape[1], kernel=kernel
        ),
        compiler_options=QUICK,
    )
    parts = []
    for first, last in [(0, 5), (5, 6), (6, 7), (7, 12)]:
        cached = (np.pad(x[:, :last], [(0, 0), (0, 20 - last), (0, 0), (0, 0)], constant_values=9) for x in (k, v))
        parts.append(step(q[:, first:last], *cached, jnp.int32(first)))
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=1e-6)


def test_dropout_has_the_right_mean_and_is_a_function_of_rng():
    q, k, v, _ = arrays(T=32, S=32)
    drop = jax.jit(lambda key: attention(q, k, v, dropout=0.25, rng=key, kernel="xla"), compiler_options=QUICK)
    keys = jax.random.split(jax.random.key(3), 100)
    mean = sum(map(drop, keys)) / len(keys)
    plain = jax.jit(functools.partial(attention, kernel="xla"))(q, k, v)
    assert jnp.abs(mean - plain).mean() < 0.02 and jnp.abs(drop(keys[0]) - plain).mean() > 0.05
    assert jnp.array_equal(drop(keys[0]), drop(keys[0])) and not jnp.array_equal(drop(keys[0]), drop(keys[1]))


def test_blockwise_computes_just_the_blocks_with_something_visible():
    random = np.random.RandomState(0)
    for _ in range(200):
        T, S, offset = (int(n) for n in random.randint(1, 40, 3))
        causal, window = bool(random.randint(2)), (None, 1, 3, 9)[random.randint(4)]
        length = None if random.randint(2) else int(random.randint(S + 1))
        plan = blocks.Plan(causal, window, 1.0, None, *(int(n) for n in random.randint(1, 9, 2)))
        hidden = blocks.Hidden(np.array([offset]), None if length is None else np.array([length]), None, None)
        nq, nk = -(-T // plan.Q), -(-S // plan.S)
        t, s = offset + np.arange(nq * plan.Q)[:, None], np.arange(nk * plan.S)
        seen = (s < (nk * plan.S if length is None else length)) & (s <= t if causal else s <= t + 999)
        if window is not None:
            seen &= abs(t - s) < window
        seen = seen.reshape(nq, plan.Q, nk, plan.S).any((1, 3))
        pairs = [(seen[i], looped.keys_of(plan, hidden, i, nk)) for i in range(nq)]
        pairs += [(seen[:, j], looped.queries_of(plan, hidden, j, nq)) for j in range(nk)]
        for visible, (first, last) in pairs:
            needed, computed = set(np.flatnonzero(visible)), set(range(int(first), int(last)))
            assert needed <= computed <= set(range(len(visible)))
            # With a window the block where the keys end may be computed for nothing.
            assert computed == needed or (length is not None and window is not None)


def test_blockwise_memory_grows_as_the_length_and_the_references_as_its_square():
    def temporary(kernel, T):
        x = jax.ShapeDtypeStruct((1, T, 1, K), "float32")
        grad = jax.grad(lambda q, k, v: attention(q, k, v, causal=True, kernel=kernel).sum(), (0, 1, 2))
        return jax.jit(grad, compiler_options=QUICK).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    assert temporary("blockwise", 4096) < 2.2 * temporary("blockwise", 2048)
    assert temporary("xla", 4096) > 3.5 * temporary("xla", 2048)


@pytest.mark.parametrize("shape", [{"data": 4, "tensor": 2}, {"data": 1, "fsdp": 2, "tensor": 4}], ids=str)
@pytest.mark.parametrize("kernel", ["blockwise", "splash", "cudnn"])
def test_eight_devices_equal_one(kernel, shape, cudnn_as_xla):
    mesh = make_mesh(Mesh(**shape))
    dtype = "bfloat16" if kernel == "cudnn" else "float32"
    q, k, v, _ = (x.astype(dtype) for x in arrays(T=128, S=128, G=2))
    q, k, v = (jnp.concatenate([x, x + 1]) for x in (q, k, v))
    bias = None if kernel == "splash" else jnp.asarray(CASES["bias, softcap"]["bias"][..., :128, :128], dtype)
    ids = jnp.asarray(np.tile(SEGMENTS[:, :128], (2, 1)), "int32")

    def total(q, k, v, bias, ids, kernel):
        out = attention(q, k, v, causal=True, segment_ids=ids, bias=bias, kernel=kernel)
        return (out.astype("float32") ** 2).sum()

    wanted = (0, 1, 2) if bias is None else (0, 1, 2, 3)
    grad = jax.jit(jax.grad(total, wanted), static_argnums=5, compiler_options=QUICK)
    expected = grad(q, k, v, bias, ids, "xla")
    with jax.set_mesh(mesh):
        rows = rules.sharding(mesh, ("batch",))
        by_head = rules.sharding(mesh, ("batch", "seq", "heads"))
        k, v = (jax.device_put(x, by_head if 2 % shape["tensor"] == 0 else rows) for x in (k, v))
        got = grad(jax.device_put(q, by_head), k, v, bias, jax.device_put(ids, rows), kernel)
    compare([np.asarray(x, "float32") for x in got], [np.asarray(x, "float32") for x in expected], TOLERANCE[dtype])


def test_fused_kernels_get_only_their_devices_examples_and_heads():
    mesh, seen = make_mesh(Mesh(data=1, fsdp=2, tensor=4)), {}

    def attend(q, k, v, **rest):
        ids, other = rest["segments"]
        seen.update(q=q.shape, k=k.shape, ids=ids.shape, same=ids is other)
        return q

    q, k, v, _ = arrays(T=128, S=128, G=2)
    ids = jnp.asarray(SEGMENTS[:, :128])
    with jax.set_mesh(mesh):
        jax.eval_shape(
            lambda: partition.run_sharded(attend, {"q": q, "k": k, "v": v, "segments": (ids, ids), "bias": None})
        )
    assert seen == {"q": (1, 128, 1, K), "k": (1, 128, 1, K), "ids": (1, 128), "same": True}


def test_blockwise_works_inside_shard_map():
    mesh = jax.make_mesh((2,), ("tensor",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec(None, None, "tensor")
    q, k, v, _ = arrays()
    mapped = jax.shard_map(functools.partial(attention, kernel="blockwise"), mesh=mesh, in_specs=spec, out_specs=spec)
    got = jax.jit(jax.grad(lambda q: (mapped(q, k, v) ** 2).sum()), compiler_options=QUICK)(q)
    whole = functools.partial(attention, kernel="xla")
    expected = jax.jit(jax.grad(lambda q: (whole(q, k, v) ** 2).sum()), compiler_options=QUICK)(q)
    compare([got], [expected], TOLERANCE["float32"])


def test_a_recording_has_the_weights_of_each_layer_in_order_and_changes_nothing():
    sizes = {"vocab_size": 11, "width": 8, "heads": 2, "mlp_width": 8, "dropout": 0.0}
    model = jaxmodels.create("transformer", variant="t5", norm="pre", layers=2, decoder_layers=3, **sizes)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), model.shapes())
    sources, tokens = jnp.arange(5)[None], jnp.arange(4)[None] + 3
    with recording() as kept:
        out = jax.block_until_ready(model.apply(params, sources, tokens))
    assert [each.shape for each in kept] == [(1, 2, 5, 5)] * 2 + [(1, 2, 4, 4)] * 3 + [(1, 2, 4, 5)] * 3
    for each in kept:
        np.testing.assert_allclose(each.sum(-1), 1, rtol=1e-5)
    np.testing.assert_array_equal(out, model.apply(params, sources, tokens))
    # the first layers see the token embeddings alone
    cut = {**params, "decoder": dict(params["decoder"])}
    cut["decoder"]["layers"] = jax.tree.map(lambda leaf: leaf[:1], cut["decoder"]["layers"])
    first = jaxmodels.create("transformer", variant="t5", norm="pre", layers=2, decoder_layers=1, **sizes)
    with recording() as alone:
        jax.block_until_ready(first.apply(cut, sources, tokens))
    for mine, theirs in zip(alone, [*kept[:2], kept[2], kept[5]], strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)
