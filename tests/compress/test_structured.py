"""Structured pruning: the smaller model is an ordinary one, and loses what matters least."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels import cli
from jaxmodels.compress.calibration import Calibration
from jaxmodels.compress.methods import Work
from jaxmodels.compress.structured import Part, Structured, built
from jaxmodels.config import CausalLM, Classification, Config, Mesh, Synthetic
from jaxmodels.errors import UserError
from jaxmodels.models.gpt2 import GPT2Config
from jaxmodels.models.llama import LlamaConfig
from jaxmodels.models.vgg import VGGConfig
from jaxmodels.parallel.mesh import make_mesh
from jaxmodels.train.saved import load_run
from tests.compress.test_pruning import trained

__all__ = ["trained"]
VGG = VGGConfig(input_shape=(8, 8, 1), classes=4, depths=(2, 1), widths=(6, 4), hidden=(8,), batch_norm=True)
GPT = GPT2Config(vocab_size=32, context=8, layers=3, heads=2, width=16, mlp_width=12)


def work(model: Any, task: Any, batch: dict[str, Any], change: Any) -> Work:
    config = Config(model=model, task=task, data=Synthetic(seq_len=8, batch_size=8))
    made = built(config, model)
    params = change(made.init(jax.random.key(0)))
    return Work(config, made, params, made.stats(), Calibration(made, make_mesh(Mesh()), [batch]))


def outputs(work: Work, found: Any, *inputs: Any) -> tuple[Any, Any]:
    small = built(found.config, found.config.model).networks["model"]

    def of(model: Any, params: Any, stats: Any) -> Any:
        if not stats:
            return model.apply(params["model"], *inputs)
        return model.apply(params["model"], *inputs, stats=stats["model"])[0]

    return of(work.task.networks["model"], work.params, work.stats), of(small, found.params, found.stats)


def test_channels_that_do_nothing_are_those_that_go():
    """Each convolution loses its own, and their norms, statistics and the flattened inputs behind go with them."""
    dead = {"0": (1, 4), "1": (0, 5)}

    def change(params: Any) -> Any:
        stages = params["model"]["stages"]
        for unit, channels in dead.items():
            norm = stages["0"][unit]["norm"]
            norm["scale"], norm["bias"] = (norm[name].at[jnp.array(channels)].set(0) for name in ("scale", "bias"))
        norm = stages["1"]["0"]["norm"]
        norm["scale"] = norm["scale"].at[2].set(0)
        return params

    images = np.random.default_rng(0).random((8, 8, 8, 1)).astype(np.float32)
    given = work(VGG, Classification(), {"inputs": images, "labels": np.arange(8) % 4}, change)
    found = Structured(fields=("widths=4,3",)).apply(given)
    assert found.config.model == dataclasses.replace(VGG, widths=(4, 3))
    before, after = outputs(given, found, images)
    np.testing.assert_allclose(np.asarray(before), np.asarray(after), atol=1e-5)


def gpt(change: Any = lambda params: params) -> tuple[Work, np.ndarray]:
    tokens = np.random.default_rng(0).integers(0, 32, (8, 8)).astype(np.int32)
    return work(GPT, CausalLM(), {"tokens": tokens, "targets": np.roll(tokens, -1, 1)}, change), tokens


def test_units_of_each_layer_go_on_their_own():
    dead = [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11)]

    def change(params: Any) -> Any:
        down = params["model"]["layers"]["mlp"]["down"]
        for layer, units in enumerate(dead):
            down["w"] = down["w"].at[layer, jnp.array(units)].set(0)
        return params

    given, tokens = gpt(change)
    found = Structured(fields=("mlp_width=8",)).apply(given)
    assert found.config.model == dataclasses.replace(GPT, mlp_width=8)
    before, after = outputs(given, found, tokens)
    np.testing.assert_allclose(np.asarray(before), np.asarray(after), atol=1e-5)


def test_the_layer_goes_without_which_the_loss_is_lowest():
    given, tokens = gpt(lambda params: {"model": {**params["model"], "norm": {"scale": 30.0 * jnp.ones(16),
                                                                             "bias": jnp.zeros(16)}}})  # fmt: skip
    found = Structured(fields=("layers=2",)).apply(given)
    model, params = built(given.config, found.config.model).networks["model"], given.params["model"]
    losses, targets = [], jax.nn.one_hot(np.roll(tokens, -1, 1), 32)
    for layer in range(3):
        left = jax.tree.map(lambda w: jnp.delete(w, layer, axis=0), params["layers"])  # noqa: B023
        logits = model.apply({**params, "layers": left}, tokens)
        losses.append(float(-(jax.nn.log_softmax(logits) * targets).sum()))
    best = jax.tree.map(lambda w: jnp.delete(w, int(np.argmin(losses)), axis=0), params["layers"])
    jax.tree.map(np.testing.assert_array_equal, found.params["model"]["layers"], best)


def llama(dead: Any, **sizes: Any) -> tuple[Work, np.ndarray]:
    """A LLaMA whose heads of queries `dead`, by layer, add nothing to what comes out of attention."""
    model = LlamaConfig(vocab_size=32, layers=2, heads=4, width=16, head_dim=6, mlp_width=12, **sizes)
    tokens = np.random.default_rng(0).integers(0, 32, (8, 8)).astype(np.int32)

    def change(params: Any) -> Any:
        o = params["model"]["layers"]["attn"]["o"]
        for layer, heads in enumerate(dead):
            o["w"] = o["w"].at[layer, jnp.array(heads)].set(0)
        return params

    return work(model, CausalLM(), {"tokens": tokens, "targets": np.roll(tokens, -1, 1)}, change), tokens


def test_heads_of_each_layer_go_on_their_own_with_their_queries_keys_and_values():
    dead = [(0, 3), (1, 2)]
    given, tokens = llama(dead)
    found = Structured(fields=("heads=2",)).apply(given)
    assert found.config.model == dataclasses.replace(given.config.model, heads=2)
    before, after = outputs(given, found, tokens)
    np.testing.assert_allclose(np.asarray(before), np.asarray(after), atol=1e-5)
    attn, whole = (params["model"]["layers"]["attn"] for params in (found.params, given.params))
    for layer, heads in enumerate(dead):
        for name, axis in (("q", 1), ("k", 1), ("v", 1), ("o", 0)):
            left = np.delete(whole[name]["w"][layer], heads, axis=axis)
            np.testing.assert_array_equal(attn[name]["w"][layer], left, err_msg=f"{name} of layer {layer}")


@pytest.mark.parametrize("outer", [False, True])
def test_units_are_taken_with_all_that_is_theirs(outer: bool):
    x = np.arange(24).reshape(2, 12)  # four units, three times
    part = Part("x", 1, 3, outer)
    kept = np.asarray(part.taken(x, np.array([0, 2])))
    places = [0, 1, 2, 6, 7, 8] if outer else [0, 2, 4, 6, 8, 10]
    np.testing.assert_array_equal(kept, x[:, places])


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (("width=15",), "multiple of heads"),
        (("head=1",), "expected sizes of the model"),
        (("layers=9",), "expected fewer"),
        (("layers=two",), "whole numbers, try layers=1"),
        ((), "without --fields"),
    ],
)
def test_what_is_no_smaller_model_is_refused(fields: tuple[str, ...], said: str):
    config = Config(model=GPT, data=Synthetic(seq_len=8, batch_size=8))
    with pytest.raises(UserError, match=said):
        Structured(fields=fields).check(Work(config, built(config, GPT), {}, {}, None))


def test_heads_whose_size_follows_from_their_number_are_refused():
    tokens = np.zeros((8, 8), np.int32)
    given = work(GPT, CausalLM(), {"tokens": tokens, "targets": tokens}, lambda params: params)
    with pytest.raises(UserError, match="try other fields too"):
        Structured(fields=("heads=1",)).apply(given)


def test_a_smaller_run_is_a_run(trained: Path):
    out = trained / "smaller"
    arguments = ["--fields", "layers=1", "--batches", "1", "--out", str(out)]
    assert cli.main(["compress", str(trained / "run"), "structured", *arguments]) == 0
    run = load_run(out)
    assert run.config.model.layers == 1  # type: ignore[attr-defined]
    assert run.params["model"]["layers"]["mlp"]["up"]["w"].shape[0] == 1
