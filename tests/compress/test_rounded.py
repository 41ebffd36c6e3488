"""Quantization-aware training: the straight-through estimator, on any mesh, and codes that are the parameters."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmodels import cli
from jaxmodels.compress.codes import Spec, quantize
from jaxmodels.compress.rounded import Rounded
from jaxmodels.compress.rounding import FLAT
from jaxmodels.config import SGD, CausalLM, Config, Constant, LoRA, Mesh, Synthetic, Train
from jaxmodels.errors import UserError
from jaxmodels.models.coded import dequantize
from jaxmodels.models.gpt2 import GPT2Config
from jaxmodels.train.job import assemble
from jaxmodels.train.saved import load_run
from tests.compress.test_pruning import CONFIG

GPT = GPT2Config(vocab_size=32, context=8, layers=2, heads=2, width=16)
SECTION = Rounded(codes="int4", group=8)


def config(**more: object) -> Config:
    optim = SGD(peak_lr=0.5, weight_decay=0.0, clip_norm=None, schedule=Constant())
    given = {"optim": optim, "compress": SECTION, "train": Train(steps=3), **more}
    return Config(model=GPT, task=CausalLM(), data=Synthetic(seq_len=8, batch_size=8), **given)  # type: ignore[arg-type]


def rounded(w: jax.Array) -> jax.Array:
    return dequantize(quantize(w, FLAT, Spec("int4", 8)))


def test_gradients_are_those_of_the_straight_through_estimator():
    """Three steps of Adam with decay, against autodiff through w + stop_gradient(rounded(w) - w)."""
    rng = np.random.default_rng(0)
    x, y, w = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((20, 16), (20, 4), (16, 4)))
    axes, optimizer = {"layer": {"w": FLAT}}, optax.adamw(0.05, weight_decay=0.1)
    loss = lambda params: jnp.square(x @ params["layer"]["w"] - y).sum()  # noqa: E731
    estimator = lambda params: loss(jax.tree.map(lambda w: w + jax.lax.stop_gradient(rounded(w) - w), params))  # noqa: E731
    exact = {"layer": {"w": w}}
    expected = optimizer.init(exact)
    ours = SECTION.trained(optimizer, 3, axes)
    state, params = ours.init(exact), jax.tree.map(rounded, exact)
    for _ in range(3):
        moves, expected = optimizer.update(jax.grad(estimator)(exact), expected, exact)
        exact = optax.apply_updates(exact, moves)
        moves, state = ours.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, moves)
        np.testing.assert_allclose(state.exact["layer"]["w"], exact["layer"]["w"], atol=1e-6)
        np.testing.assert_allclose(params["layer"]["w"], rounded(exact["layer"]["w"]), atol=1e-6)


@functools.cache
def stepped(mesh: Mesh, devices: int) -> tuple[dict, dict, list]:
    job = assemble(config(mesh=mesh), jax.devices()[:devices])
    state, step, loader = job.init(jax.random.key(0)), job.step(), job.loader("train")
    for k in range(3):
        state, _ = step(jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, job.layout)), loader.batch(k))
    exact = state.opt_state["loss"].exact
    held = [leaf.addressable_shards[0].data.size / leaf.size for leaf in jax.tree.leaves(exact)]
    return jax.device_get(state.params["model"]), jax.device_get(exact), held


def test_what_is_behind_is_cut_and_trained_as_the_parameters_are_on_any_mesh():
    (params, exact, _), (params8, exact8, held) = stepped(Mesh(), 1), stepped(Mesh(data=2, fsdp=2, tensor=2), 8)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), exact, exact8)
    assert max(held) == 1 / 4, "each matrix is cut, by fsdp and by tensor"
    up, behind, up8 = (tree["layers"]["mlp"]["up"]["w"] for tree in (params, exact, params8))
    # a number between two codes may fall to either on another mesh
    assert np.isclose(up, up8, atol=1e-5).mean() > 0.99 and not np.allclose(up, behind, atol=1e-3)
    assert exact["embed"]["w"] is None and len(np.unique(up[0, :8, 0])) <= 16


def test_its_codes_lose_nothing(tmp_path: Path):
    """`compress rtn` makes codes of what the network was trained with: the evaluation stays the same."""
    path, run, out, text = (tmp_path / name for name in ("letters.py", "run", "out", "letters.txt"))
    path.write_text(CONFIG)
    text.write_text("the letters of a text, again and again\n" * 200)
    fields = "--train.ema None --train.steps 3 --data.tokenizer chars --optim.peak-lr 0.01 --optim.warmup-steps 1"
    codes = "--compress rounded --compress.codes int4 --compress.group 8"
    given = [*f"{fields} {codes}".split(), "--data.path", str(text)]
    assert cli.main(["train", str(path), "--run-dir", str(run), *given]) == 0
    assert cli.main(["compress", str(run), "rtn", "--codes", "int4", "--group", "8", "--out", str(out)]) == 0
    record = json.loads((out / "compress.json").read_text())
    assert all(facts["error"] < 1e-6 for facts in record["matrices"].values()) and record["matrices"]
    before, after = (load_run(each).params["model"]["layers"]["mlp"]["up"]["w"] for each in (run, out))
    np.testing.assert_allclose(dequantize(after), before, atol=1e-6)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"adapter": LoRA()}, "with an adapter"),
        ({"train": Train(steps=3, ema=0.9)}, "train.ema 0.9, whose averages no codes stand for"),
        ({"compress": Rounded(targets=("nothing",))}, "matches no"),
        ({"compress": Rounded(codes="int4", group=5)}, "groups of 5 for layers/attn"),
    ],
)
def test_what_cannot_be_is_refused(more: dict, said: str):
    with pytest.raises(UserError, match=said):
        assemble(config(**more), jax.devices()[:1])
