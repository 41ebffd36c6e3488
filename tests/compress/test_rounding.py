"""Quantization after training, against GPTQ's paper and code, and the runs that it makes."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxmodels import cli
from jaxmodels.compress.codes import Spec
from jaxmodels.compress.coding import Coding, coding
from jaxmodels.compress.rounding import GPTQ, RTN
from jaxmodels.compress.table import Row, best
from jaxmodels.models.coded import Coded, dequantize
from jaxmodels.models.observed import Sums
from jaxmodels.train.saved import load_run
from tests.compress.test_pruning import sums_of, trained

__all__ = ["trained"]
INPUTS, OUTPUTS = 32, 6


@pytest.fixture(scope="module")
def problem() -> tuple[np.ndarray, np.ndarray, Sums]:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(300, INPUTS)) @ rng.normal(size=(INPUTS, INPUTS)) * rng.uniform(0.2, 2, INPUTS)
    w = rng.normal(size=(INPUTS, OUTPUTS)).astype(np.float32)
    return w, x, sums_of(x)


def grid(w: np.ndarray, symmetric: bool) -> tuple[np.ndarray, np.ndarray]:
    """The published Quantizer's scale and zero of rows, with codes from 0 to 15."""
    low, high = np.minimum(w.min(1), 0), np.maximum(w.max(1), 0)
    if symmetric:
        high = np.maximum(-low, high)
        low = -high
    scale = (high - low) / 15
    return scale, np.full_like(scale, 8) if symmetric else np.round(-low / scale)


def published(w: np.ndarray, gram: np.ndarray, group: int | None, symmetric: bool, order: np.ndarray) -> np.ndarray:
    """GPTQ's values, by inverses of what is left of the Hessian in place of its Cholesky factor, in float64."""
    w = w.T.astype(np.float64)
    gram = gram[order][:, order] + 0.01 * np.diag(gram).mean() * np.eye(len(gram))
    inputs, reordered = w.shape[1], (order != np.arange(len(order))).any()
    whole, done, w = w.copy(), np.zeros_like(w), w[:, order]
    for j in range(inputs):
        if group is None:
            scale, zero = grid(whole, symmetric)
        elif reordered:  # static groups
            first = order[j] // group * group
            scale, zero = grid(whole[:, first : first + group], symmetric)
        elif j % group == 0:
            scales = [grid(w[:, k : k + group], symmetric) for k in (j,)]
            scale, zero = scales[0]
        code = np.clip(np.round(w[:, j] / scale) + zero, 0, 15)
        done[:, j] = scale * (code - zero)
        inverse = np.linalg.inv(gram[j:, j:])
        w[:, j:] -= ((w[:, j] - done[:, j]) / inverse[0, 0])[:, None] * inverse[0]
    return done[:, np.argsort(order)].T


@pytest.mark.parametrize(
    ("group", "symmetric", "act_order"), [(None, True, False), (INPUTS, False, False), (8, True, True)]
)
def test_gptq_gives_the_published_values(problem, group: int | None, symmetric: bool, act_order: bool):
    w, x, sums = problem
    found, codes = GPTQ(codes="int4", group=group, symmetric=symmetric, act_order=act_order).change(
        jnp.asarray(w), sums
    )
    order = np.argsort(-np.diag(x.T @ x), kind="stable") if act_order else np.arange(INPUTS)
    expected = published(w, x.T @ x, group, symmetric, order)
    # a number between two codes may fall to either in float32, and changes what follows
    same = np.isclose(np.asarray(found), expected, atol=1e-3)
    assert same.mean() > 0.9, same.mean()
    np.testing.assert_array_equal(np.asarray(found), np.asarray(codes.values))


def test_gptq_loses_less_than_rounding(problem):
    w, x, sums = problem
    error = {}
    for kind in (RTN, GPTQ):
        found, _ = kind(codes="int4", group=16).change(jnp.asarray(w), sums)
        error[kind] = np.square(x @ (np.asarray(found) - w)).sum()
    assert error[GPTQ] < 0.7 * error[RTN]


@pytest.mark.parametrize(("method", "options"), [("rtn", "--codes int4 --group 8"), ("gptq", "--codes int8")])
def test_a_quantized_run_holds_codes(trained: Path, method: str, options: str):
    out = trained / method
    arguments = ["compress", str(trained / "run"), method, *options.split(), "--batches", "2", "--out", str(out)]
    assert cli.main(arguments) == 0
    run, source = load_run(out), load_run(trained / "run")
    q, before = (each.params["model"]["layers"]["attn"]["q"]["w"] for each in (run, source))
    assert isinstance(q, Coded) and q.kind == run.config.compress.codes  # type: ignore[union-attr]
    np.testing.assert_allclose(
        np.asarray(dequantize(q)), np.asarray(before), atol=float(np.asarray(q.scales).max()) * 4
    )
    if method == "rtn":
        made = coding(run.config.compress, run.networks)
        assert isinstance(made, Coding) and made.chosen["model/layers/attn/q/w"] == Spec("int4", 8)
        expected = made.encode(source.params)["model"]["layers"]["attn"]["q"]["w"]
        np.testing.assert_array_equal(np.asarray(q.codes), np.asarray(expected.codes))
        np.testing.assert_array_equal(np.asarray(q.scales), np.asarray(expected.scales))
    assert cli.main(["eval", str(out)]) == 0
    told = json.loads((out / "compress.json").read_text())
    leaves = jax.tree.leaves(run.params, is_leaf=lambda leaf: isinstance(leaf, Coded))
    numbers = [dequantize(leaf) if isinstance(leaf, Coded) else leaf for leaf in leaves]
    assert told["method"] == method
    assert told["zeros"] == sum(int((np.asarray(x) == 0).sum()) for x in numbers if x.ndim > 1) > 0


def test_groups_that_do_not_divide_are_refused(trained: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    arguments = ["--group", "5", "--out", str(tmp_path / "out")]
    assert cli.main(["compress", str(trained / "run"), "gptq", *arguments]) == 2
    error = capsys.readouterr().err
    assert "groups of 5 for layers" in error and "--compress" not in error


def test_of_runs_that_are_as_good_the_smaller_one_is_on_the_front():
    rows = [
        Row(name, size, 1, 0, 1.0, 1.0, quality, size)
        for name, size, quality in (("a", 9, 1.0), ("b", 5, 1.1), ("c", 6, 1.2), ("d", 2, 1.5), ("e", 5, 1.4))
    ]
    names = lambda better: [row.run for row in best(rows, better, lambda row: row.bytes)]  # noqa: E731
    assert names("min") == ["d", "b", "a"] and names("max") == ["d"]


def test_runs_beside_each_other_are_told_apart(trained: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """What they take, how good they are, and that zeros alone make no run faster."""
    sparse = tmp_path / "sparse"
    assert cli.main(["compress", str(trained / "run"), "magnitude", "--sparsity", "0.9", "--out", str(sparse)]) == 0
    rows = tmp_path / "rows.json"
    argv = ["compress", "--table", str(trained / "run"), str(sparse), "--batches", "1", "--json", str(rows)]
    argv += ["--picture", str(tmp_path / "pareto.txt")]  # a PNG, whatever its name
    assert cli.main(argv) == 0
    assert cli.main(["compress", "--table"]) == 2
    first, second = json.loads(rows.read_text())["rows"]
    assert first["bytes"] == second["bytes"] == 4 * first["parameters"]
    assert first["peak"] > first["bytes"]
    with Image.open(tmp_path / "pareto.txt") as picture:
        assert min(picture.size) > 300
    assert first["faster"] == 1 and second["zeros"] > 0.5 * second["parameters"] > first["zeros"]
    assert str(sparse) in capsys.readouterr().out
