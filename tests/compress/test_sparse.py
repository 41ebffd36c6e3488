"""Weights that stay 0 in training: on any mesh, through a checkpoint, and with a share that grows."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

from jaxmodels import cli
from jaxmodels.compress.sparse import Sparse, share_at
from jaxmodels.config import AdamW, CausalLM, Config, Init, LoRA, Mesh, Muon, Synthetic, Train
from jaxmodels.errors import UserError
from jaxmodels.models.gpt2 import GPT2Config
from jaxmodels.train.job import assemble
from jaxmodels.train.run import train
from jaxmodels.train.saved import load_run
from tests.compress.test_pruning import trained

__all__ = ["trained"]
GPT = GPT2Config(vocab_size=32, context=8, layers=2, heads=2, width=16)


def config(**more: object) -> Config:
    given = {"optim": AdamW(peak_lr=1e-2, weight_decay=0.1), "compress": Sparse(), "train": Train(steps=2), **more}
    return Config(model=GPT, task=CausalLM(), data=Synthetic(seq_len=8, batch_size=8), **given)  # type: ignore[arg-type]


def shares(params: dict) -> dict[str, np.ndarray]:
    """The share of zeros in each layer of each stacked matrix."""
    leaves = jax.tree_util.tree_leaves_with_path(params["model"]["layers"])
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(w) for path, w in leaves}
    return {name: (w == 0).reshape(2, -1).mean(1) for name, w in named.items() if name.endswith("/w")}


@pytest.mark.parametrize("mesh", [Mesh(), Mesh(fsdp=2, tensor=2)])
def test_what_is_0_stays_0_on_any_mesh(mesh: Mesh, tmp_path: Path):
    """Through updates, weight decay and averages; what is not 0 moves, and biases that begin at 0 do."""
    cfg = config(mesh=mesh, train=Train(steps=2, ema=0.5))
    job = assemble(cfg, jax.devices()[: 1 if mesh == Mesh() else 8])
    state = job.init(jax.random.key(0))

    def cut(x):
        return x.at[:, ::2].set(0) if x.ndim > 2 else x

    params = {"model": {**state.params["model"], "layers": jax.tree.map(cut, state.params["model"]["layers"])}}
    state = type(state)(**{**vars(state), "params": params, "ema": jax.tree.map(lambda x: x.copy(), params)})
    state = jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, job.layout))
    before, step, loader = jax.device_get(state.params), job.step(), job.loader("train")
    for k in range(2):
        state, _ = step(state, loader.batch(k))
    for tree in (state.params, state.ema):
        after = jax.device_get(tree)
        for name, share in shares(before).items():
            np.testing.assert_array_equal(shares(after)[name], share)
        up = before["model"]["layers"]["mlp"]["up"]["w"], after["model"]["layers"]["mlp"]["up"]["w"]
        assert (up[0][:, 1::2] != up[1][:, 1::2]).any() and (up[1][:, ::2] == 0).all()
        assert (after["model"]["layers"]["mlp"]["up"]["b"] != 0).any()


def test_a_pruned_run_is_trained_on_without_its_zeros(trained: Path, tmp_path: Path):
    pruned, out = tmp_path / "pruned", tmp_path / "tuned"
    assert cli.main(["compress", str(trained / "run"), "magnitude", "--out", str(pruned)]) == 0
    cfg = load_run(pruned).config
    train(
        Config(
            model=cfg.model,
            data=cfg.data,
            optim=Muon(peak_lr=1e-2),
            train=Train(steps=2),
            init=Init(source=str(pruned)),
            compress=Sparse(kept=("*/mlp/*",)),
        ),
        out,
    )
    found = shares(load_run(out).params)
    assert all((share == 0.5).all() for name, share in found.items() if name.startswith("attn"))
    assert all((share < 0.1).all() for name, share in found.items() if name.startswith("mlp"))


def test_a_share_grows_by_the_published_schedule():
    steps = np.arange(0, 101, 10)
    expected = [0.8 + (0 - 0.8) * (1 - (t - 20) / 60) ** 3 if 20 <= t <= 80 else 0.8 * (t > 80) for t in steps]
    np.testing.assert_allclose([share_at(t, 0.8, 20, 80) for t in steps], expected, atol=1e-6)


def test_the_smallest_weights_go_when_it_is_due():
    cfg = config(compress=Sparse(sparsity=0.75, end=3, every=2), train=Train(steps=4))
    job = assemble(cfg, jax.devices()[:1])
    state, step, loader = job.init(jax.random.key(0)), job.step(), job.loader("train")
    seen = []
    for k in range(4):
        state, _ = step(jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, job.layout)), loader.batch(k))
        seen.append(float(shares(state.params)["mlp/up/w"][0]))
    np.testing.assert_allclose(seen, [0, share_at(2, 0.75, 0, 3), 0.75, 0.75], atol=1e-3)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"adapter": LoRA()}, "with an adapter"),
        ({"compress": Sparse(sparsity=0.5), "train": Train(steps=2, ema=0.9)}, "train.ema"),
        ({"compress": Sparse(targets=("nothing",))}, "matches no"),
        ({"compress": Sparse(sparsity=0.5, end=5)}, "within the run"),
    ],
)
def test_what_cannot_be_kept_is_refused(more: dict, said: str):
    with pytest.raises(UserError, match=said):
        assemble(config(**more), jax.devices()[:1])


def test_an_end_without_a_share_is_refused():
    with pytest.raises(UserError, match="a share to reach"):
        Sparse(end=5)
