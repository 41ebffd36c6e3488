"""Factors of inputs and int8 activations: AWQ and SmoothQuant against NumPy, their products, and the runs they make."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from jaxmodels import cli, config, create
from jaxmodels.compress.codes import Spec, assemble, axes_of, quantize
from jaxmodels.compress.coding import Quantized, coding
from jaxmodels.compress.factors import AWQ, SmoothQuant
from jaxmodels.compress.rounding import FLAT, RTN
from jaxmodels.errors import UserError
from jaxmodels.hf.compressed_save import written
from jaxmodels.models.coded import Coded, dequantize, is_coded
from jaxmodels.models.kernels.quantized import coded_product
from jaxmodels.models.llama import LlamaConfig
from jaxmodels.parallel import rules
from jaxmodels.parallel.mesh import Mesh, make_mesh
from jaxmodels.train import arrays
from jaxmodels.train.saved import load_run
from tests.compress.test_pruning import sums_of, trained

__all__ = ["trained"]
ROWS, INPUTS, OUTPUTS = 200, 32, 8
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(scope="module")
def problem() -> tuple[np.ndarray, np.ndarray]:
    """A matrix (I, O), and inputs (R, I) of which three are thirty times as large as the others."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(ROWS, INPUTS))
    x[:, [3, 11, 20]] *= 30
    return rng.normal(size=(INPUTS, OUTPUTS)).astype(np.float32), x.astype(np.float32)


def four_bits(w: np.ndarray, group: int) -> np.ndarray:
    """The numbers that symmetric codes of four bits in groups stand for, in float64."""
    groups = w.reshape(-1, group, w.shape[1])
    scale = np.abs(groups).max(1, keepdims=True) / 7
    return (np.clip(np.round(groups / scale), -8, 7) * scale).reshape(w.shape)


def test_awq_finds_the_factors_that_do_least_to_the_outputs(problem):
    w, x = problem
    found, made = AWQ(codes="int4", group=16).change(jnp.asarray(w), sums_of(x))
    size, errors = np.abs(x.astype(np.float64)).mean(0), []
    for power in np.arange(20) / 20:
        by = np.maximum(size**power, 1e-4)
        by /= np.sqrt(by.max() * by.min())
        values = four_bits(w.astype(np.float64) * by[:, None], 16) / by[:, None]
        errors.append((np.square(x @ (values - w)).sum(), by))
    least, by = min(errors, key=lambda each: each[0])
    np.testing.assert_allclose(np.asarray(made.factors), 1 / by, rtol=1e-4)
    off = np.square(x @ (np.asarray(found) - w)).sum()
    assert off == pytest.approx(least, rel=0.02)
    plain, _ = RTN(codes="int4", group=16).change(jnp.asarray(w), sums_of(x))
    assert off < 0.4 * np.square(x @ (np.asarray(plain) - w)).sum() and errors[0][0] > least


@pytest.mark.parametrize(("activations", "power"), [("dynamic", 0.5), ("static", 0.5), ("static", None)])
def test_smoothquant_s_product_is_one_of_integers(problem, activations, power):
    w, x = problem
    method = SmoothQuant(activations=activations, power=power)
    values, made = method.change(jnp.asarray(w), sums_of(x))
    leaf = method.leaf(FLAT, w.shape, values, [made])
    np.testing.assert_array_equal(np.asarray(dequantize(leaf)), np.asarray(values))
    found = jit(lambda x, leaf: coded_product(x, leaf, FLAT, 1, "float32"))(x, leaf)

    by = np.ones(INPUTS) if power is None else np.abs(x).max(0) ** 0.5 / np.abs(w).max(1) ** 0.5
    smooth, scaled = x / by, w * by[:, None]
    step = np.abs(smooth).max() / 127 if activations == "static" else np.abs(smooth).max(1, keepdims=True) / 127
    scale = np.abs(scaled).max(0) / 127
    codes = np.round(smooth / step).astype(int) @ np.round(scaled / scale).astype(int)
    # a number between two codes may fall to either in float32
    np.testing.assert_allclose(np.asarray(found), codes * step * scale, atol=0.5 * np.abs(step).max() * np.abs(w).max())
    assert np.mean(np.abs(np.asarray(found) - codes * step * scale) < 1e-3) > 0.9


def test_factors_move_outliers_out_of_inputs(problem):
    w, x = problem
    error = {}
    for power in (None, 0.5):
        method = SmoothQuant(activations="static", power=power)
        values, made = method.change(jnp.asarray(w), sums_of(x))
        found = coded_product(jnp.asarray(x), method.leaf(FLAT, w.shape, values, [made]), FLAT, 1, "float32")
        error[power] = np.square(np.asarray(found) - x @ w).sum()
    assert error[0.5] < 0.3 * error[None]


def test_a_gradient_passes_the_rounding_of_inputs(problem):
    w, x = problem
    method = SmoothQuant()
    values, made = method.change(jnp.asarray(w), sums_of(x))
    leaf = method.leaf(FLAT, w.shape, values, [made])
    weights = np.arange(OUTPUTS, dtype=np.float32)
    found = jit(jax.grad(lambda x: (coded_product(x, leaf, FLAT, 1, "float32") * weights).sum()))(jnp.asarray(x))
    np.testing.assert_allclose(
        np.asarray(found), np.tile(np.asarray(values) @ weights, (ROWS, 1)), rtol=1e-5, atol=1e-4
    )


def test_a_product_of_integers_is_the_same_on_any_mesh(problem):
    """With weights cut along inputs by fsdp and along outputs by tensor: sums of integers, to the last bit."""
    w, x = problem
    method = SmoothQuant(activations="static")
    values, made = method.change(jnp.asarray(w), sums_of(x))
    leaf = method.leaf(FLAT, w.shape, values, [made])
    product = lambda x, leaf: coded_product(x, leaf, FLAT, 1, "float32")  # noqa: E731
    one = jit(product)(x, leaf)
    mesh = make_mesh(Mesh(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        place = lambda names: NamedSharding(mesh, rules.spec(names))  # noqa: E731
        placed = jax.tree.map(lambda part, names: jax.device_put(part, place(names)), leaf, axes_of(FLAT, leaf))
        eight = jit(product)(jax.device_put(x, place(("batch", None))), placed)
    assert len({shard.data.shape for shard in placed.codes.addressable_shards}) == 1
    assert placed.codes.addressable_shards[0].data.size == w.size // 4
    np.testing.assert_array_equal(np.asarray(one), np.asarray(eight))


@pytest.mark.parametrize(
    ("method", "options"), [("awq", "--group 8"), ("smoothquant", ""), ("smoothquant", "--activations static")]
)
def test_a_run_is_read_and_evaluated_as_it_was_compressed(trained: Path, tmp_path: Path, capsys, method, options):
    out = tmp_path / "out"
    arguments = ["compress", str(trained / "run"), method, *options.split(), "--batches", "2", "--out", str(out)]
    assert cli.main(arguments) == 0
    run = load_run(out)
    leaf = run.params["model"]["layers"]["mlp"]["up"]["w"]
    assert isinstance(leaf, Coded) and leaf.factors is not None
    assert leaf.factors.shape == (2, leaf.shape[1], 1)
    assert (leaf.step is not None) == ("static" in options) and (leaf.activations is not None) == bool(method != "awq")
    before = load_run(trained / "run").params["model"]["layers"]["mlp"]["up"]["w"]
    assert np.abs(np.asarray(dequantize(leaf)) - np.asarray(before)).max() < 0.2 * np.abs(np.asarray(before)).max()
    capsys.readouterr()
    assert cli.main(["eval", str(out)]) == 0


def test_what_is_left_as_it_was_is_so_in_the_run(tmp_path: Path):
    """Inputs of experts, and of a router to one of them, are not measured; the run says so and can be read."""
    path = tmp_path / "experts.py"
    path.write_text("""
from jaxmodels.config import Config, Text, Train
from jaxmodels.models.mixtral import MixtralConfig


def get_config() -> Config:
    model = MixtralConfig(
        layers=1, width=16, heads=2, kv_heads=2, vocab_size=256, context=16, mlp_width=16,
        experts=2, experts_per_token=1,
    )
    return Config(model=model, data=Text(seq_len=16, batch_size=8), train=Train(steps=1))
""")
    run, out = tmp_path / "run", tmp_path / "out"
    text = tmp_path / "a.txt"
    text.write_text("some words of a text, again and again\n" * 200)
    assert cli.main(["train", str(path), "--run-dir", str(run), "--data.path", str(text)]) == 0
    assert cli.main(["compress", str(run), "gptq", "--batches", "1", "--out", str(out)]) == 0
    params = load_run(out).params["model"]["layers"]
    assert isinstance(params["attn"]["q"]["w"], Coded)
    assert not any(map(is_coded, jax.tree.leaves(params["moe"], is_leaf=is_coded)))
    router = params["moe"]["router"]["w"]
    np.testing.assert_array_equal(router, load_run(run).params["model"]["layers"]["moe"]["router"]["w"])
    assert np.any(np.asarray(router))
    assert config.read(str(out))[0].compress.kept


def test_compressed_tensors_has_no_place_for_factors():
    model = LlamaConfig(layers=1, width=16, heads=2, kv_heads=2, vocab_size=32, mlp_width=16)
    params = coding(Quantized(factors=True), {"model": create(model)}).shapes()["model"]
    leaves = arrays.named_parameters(jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), params))
    with pytest.raises(UserError, match=r"with factors of inputs, .*try --format huggingface"):
        written(model, leaves)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Quantized(codes="int4", activations="dynamic"), "compress.activations dynamic beside int4"),
        (lambda: Quantized(group=8, activations="static"), "static beside int8 in groups of 8"),
        (lambda: Quantized(factors=True, embeddings=("embed",)), "compress.embeddings beside compress.factors"),
        (lambda: quantize(np.ones((4, 4)), FLAT, Spec("int8", factors=True)), "try jaxmodels compress RUN awq"),
        (lambda: assemble(np.ones((4, 4)), np.ones((1, 4)), None, FLAT, Spec("int8", factors=True)), "got no factors"),
    ],
)
def test_what_cannot_be_is_refused(make, said):
    with pytest.raises(UserError, match=said):
        make()
