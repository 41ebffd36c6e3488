"""Pruning after training, against the papers, and the command around it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels import cli
from jaxmodels.compress.pruning import SparseGPT, Wanda, lowest
from jaxmodels.compress.sweep import Prune, sweep
from jaxmodels.models.observed import Sums
from jaxmodels.train.saved import load_run

INPUTS, OUTPUTS = 24, 10


@pytest.fixture(scope="module")
def problem() -> tuple[np.ndarray, np.ndarray]:
    """A matrix (I, O), and correlated inputs (R, I) of different sizes, one of which is always 0."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, INPUTS)) @ rng.normal(size=(INPUTS, INPUTS)) * rng.uniform(0.1, 3, INPUTS)
    x[:, 5] = 0
    return rng.normal(size=(INPUTS, OUTPUTS)), x


def sums_of(x: np.ndarray) -> Sums:
    made = (len(x), (x**2).sum(0), np.abs(x).sum(0), np.abs(x).max(0), x.T @ x)
    return Sums(*(jnp.asarray(each, jnp.float32) for each in made))


def surgeon(w: np.ndarray, gram: np.ndarray, share: float, block: int, kept: int = 0, of: int = 0) -> np.ndarray:
    """SparseGPT by the paper's equations 3 and 4, in float64, with the inverse Hessian of what is left made anew."""
    w, gram = w.T.copy(), gram.copy()
    dead = np.diag(gram) == 0
    gram[dead, dead] = 1
    w[:, dead] = 0
    gram += 0.01 * np.diag(gram).mean() * np.eye(len(gram))
    inverses = [np.linalg.inv(gram[j:, j:]) for j in range(len(gram))]
    removed = np.zeros(w.shape, bool)
    for j in range(len(gram)):
        if not of and j % block == 0:
            own = range(j, min(j + block, len(gram)))
            cost = np.stack([w[:, c] ** 2 / inverses[c][0, 0] for c in own], 1)
            chosen = np.zeros(cost.size, bool)
            chosen[cost.ravel().argsort()[: int(cost.size * share)]] = True
            removed[:, j : own[-1] + 1] = chosen.reshape(cost.shape)
        if of and j % of == 0:
            cost = np.stack([w[:, c] ** 2 / inverses[c][0, 0] for c in range(j, j + of)], 1)
            removed[:, j : j + of] = cost.argsort(1).argsort(1) < of - kept
        error = np.where(removed[:, j], w[:, j], 0) / inverses[j][0, 0]
        w[:, j:] -= error[:, None] * inverses[j][0]
        w[removed[:, j], j] = 0
    return w.T


@pytest.mark.parametrize(("share", "kept", "of"), [(0.5, 0, 0), (0.5, 2, 4)])
def test_sparsegpt_is_the_papers(problem, share: float, kept: int, of: int):
    w, x = problem
    sums = sums_of(x)
    found, _ = sweep(jnp.asarray(w.T, jnp.float32), sums.gram, Prune(share, kept, of), 0.01, 8)
    expected = surgeon(w, x.T @ x, share, 8, kept, of)
    np.testing.assert_array_equal(np.asarray(found.T) == 0, expected == 0)
    np.testing.assert_allclose(np.asarray(found.T), expected, atol=2e-4)


def test_corrections_reach_beyond_a_block_and_a_pattern_holds(problem):
    """The result does not depend on how many inputs a block has, where each group decides for itself."""
    w, x = problem
    given = jnp.asarray(w.T, jnp.float32), sums_of(x).gram, Prune(0.5, 2, 4), 0.01
    small, whole = (sweep(*given, block)[0] for block in (8, INPUTS))
    np.testing.assert_allclose(np.asarray(small), np.asarray(whole), atol=2e-4)
    assert ((np.asarray(whole) != 0).reshape(OUTPUTS, -1, 4).sum(2) <= 2).all()


def test_sparsegpt_makes_up_for_what_it_removes(problem):
    w, x = problem
    error = lambda found: float(np.square(x @ (np.asarray(found) - w)).sum())  # noqa: E731
    by = {kind: error(kind().change(jnp.asarray(w, jnp.float32), sums_of(x))[0]) for kind in (SparseGPT, Wanda)}
    magnitude = error(np.where(lowest(np.abs(w), 0.5, (0, 0), None), 0, w))
    assert by[SparseGPT] < 0.8 * by[Wanda] and by[Wanda] < magnitude


def test_wanda_compares_products_with_the_norm_of_the_input_within_an_output(problem):
    w, x = problem
    found, _ = Wanda(sparsity=0.25).change(jnp.asarray(w, jnp.float32), sums_of(x))
    for output in range(OUTPUTS):
        scores = [abs(w[i, output]) * np.linalg.norm(x[:, i]) for i in range(INPUTS)]
        assert set(np.flatnonzero(np.asarray(found)[:, output] == 0)) == set(np.argsort(scores)[:6])


def test_of_each_group_of_inputs_the_largest_are_kept():
    scores = np.array([[4, 1], [3, 2], [2, 3], [1, 4], [1, 1], [1, 1], [1, 1], [1, 1]], float)
    removed = lowest(scores, 0.5, (2, 4), None)
    assert removed[:4].tolist() == [[False, True], [False, True], [True, False], [True, False]]
    assert removed[4:].sum(0).tolist() == [2, 2], "equal ones too"


CONFIG = """
from jaxmodels.config import Config, Text, Train
from jaxmodels.models.gpt2 import GPT2Config


def get_config() -> Config:
    model = GPT2Config(layers=2, width=16, heads=2, vocab_size=32, context=16)
    return Config(model=model, data=Text(seq_len=16, batch_size=8), train=Train(steps=2, ema=0.5))
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compress")
    (folder / "letters.txt").write_text("bcdf ghj\nkl " * 200)
    (folder / "letters.py").write_text(CONFIG)
    data = ["--data.path", str(folder / "letters.txt"), "--data.tokenizer", "chars", "--optim.warmup-steps", "1"]
    run = ["--run-dir", str(folder / "run"), "--metrics.progress", "none", "--eval.batches", "1"]
    assert cli.main(["train", str(folder / "letters.py"), *run, *data]) == 0
    return folder


@pytest.mark.parametrize(
    ("method", "command"),
    [
        ("magnitude", "export {out} {out}-hf"),
        ("wanda", "sample {out} --tokens 4 --prompt b"),
        ("sparsegpt", "eval {out}"),
    ],
)
def test_a_compressed_run_is_a_run_with_a_record(trained: Path, method: str, command: str):
    out = trained / method
    assert cli.main(["compress", str(trained / "run"), method, "--batches", "2", "--out", str(out)]) == 0
    record = json.loads((out / "compress.json").read_text())
    run, source = load_run(out), load_run(trained / "run")
    assert (record["method"], record["step"]) == (method, source.step)
    assert record["source"] == str(trained / "run") and record["options"]["sparsity"] == 0.5
    assert (record["calibration"] is None) == (method == "magnitude")
    for name in ("attn/q", "mlp/down"):
        owner, layer = name.split("/")
        w = np.asarray(run.params["model"]["layers"][owner][layer]["w"])
        assert (w == 0).mean() == 0.5 and ((w == 0).mean(tuple(range(1, w.ndim))) == 0.5).all()
    np.testing.assert_array_equal(run.params["model"]["embed"]["w"], source.params["model"]["embed"]["w"])
    assert cli.main(command.format(out=out).split()) == 0


def test_all_targets_compared_together_share_a_threshold(trained: Path):
    out = trained / "global"
    arguments = ["--scope", "global", "--sparsity", "0.3", "--targets", "*/mlp/*", "--out", str(out)]
    assert cli.main(["compress", str(trained / "run"), "magnitude", *arguments]) == 0
    before, after = (load_run(each).params["model"]["layers"] for each in (trained / "run", out))
    pairs = [(np.asarray(before["mlp"][name]["w"]), np.asarray(after["mlp"][name]["w"])) for name in ("up", "down")]
    removed = np.concatenate([np.abs(w[z == 0]) for w, z in pairs])
    left = np.concatenate([np.abs(w[z != 0]) for w, z in pairs])
    assert removed.max() < left.min() and len(removed) == int(0.3 * sum(w.size for w, _ in pairs))
    assert not (np.asarray(after["attn"]["q"]["w"]) == 0).any()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{none}", "wanda"], "expected a run directory"),
        (["{run}", "wandda"], "did you mean 'wanda'"),
        (["{run}", "wanda", "--sparsity", "1.5"], "at most 1"),
        (["{run}", "wanda", "--pattern", "4:2"], "N below M"),
        (["{run}", "wanda", "--pattern", "2:4", "--sparsity", "0.7"], "which has 0.5"),
        (["{run}", "wanda", "--pattern", "2:5"], "multiple of 5"),
        (["{run}", "wanda", "--targets", "layers/nothing"], "matches no parameter, expected some of layers/attn/k"),
        (["{run}", "wanda", "--sparsety", "0.5"], "did you mean '--sparsity'"),
        (["{run}", "sparsegpt", "--data", "images", "--data.path", "{none}"], "got"),
        (["{run}"], "expected a run and one of"),
    ],
)
def test_a_mistake_is_one_line_before_any_work(
    trained: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    given: dict[str, Any] = {"run": trained / "run", "none": tmp_path / "none"}
    argv = ["compress", *(each.format(**given) for each in arguments), "--out", str(tmp_path / "out")]
    assert cli.main(argv) == 2
    error = capsys.readouterr().err.strip()
    assert said in error and "\n" not in error
    assert not (tmp_path / "out").exists()


def test_a_run_that_is_there_is_not_overwritten(trained: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["compress", str(trained / "run"), "magnitude", "--out", str(trained / "run")]) == 2
    assert "is there already" in capsys.readouterr().err
