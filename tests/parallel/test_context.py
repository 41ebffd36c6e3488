"""Tokens sharded over `context`, and between products over `tensor`: the same steps through other collectives."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxmodels import create, tasks
from jaxmodels.config import CausalLM, Classification, Mesh, Stdlib
from jaxmodels.data.contract import BatchField, check_lengths
from jaxmodels.errors import UserError
from jaxmodels.models.gpt2 import GPT2Config
from jaxmodels.models.mlp import MLPConfig
from jaxmodels.parallel import rules
from jaxmodels.parallel.mesh import make_mesh, sizes
from jaxmodels.tasks import losses
from tests.parallel.steps import MODELS, B, T, alone, measure
from tests.parallel.test_ring import collectives


def mesh(**axes):
    return Mesh(**{"data": 1, **axes})


@pytest.mark.parametrize(
    ("name", "cfg", "changes"),
    [
        ("gpt2", mesh(context=4), {}),
        ("gpt2", mesh(context=2, tensor=2), {"attention": "xla"}),
        ("gpt2", mesh(data=2, context=2), {"attention": "ulysses", "remat": "full"}),
        ("llama", mesh(fsdp=2, context=2, tensor=2, sequence=True), {"remat": "dots"}),
        ("llama", mesh(fsdp=2, tensor=2, sequence=True), {}),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_steps_are_those_of_one_device(name, cfg, changes):
    got = measure(dataclasses.replace(MODELS[name], **changes), cfg)
    expected = alone(MODELS[name])
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    assert expected[-1, 0] < expected[0, 0] - 0.1, "something must have been learned for this to mean anything"


def test_microbatches_and_a_large_vocabulary_keep_the_tokens_cut(monkeypatch):
    monkeypatch.setattr(losses, "FEW", 64)
    large = dataclasses.replace(MODELS["gpt2"], vocab_size=128, layers=1)
    one, two = measure(large, mesh(), 3), measure(large, mesh(data=2, context=2), 3, accumulate=2)
    np.testing.assert_allclose(two, one, rtol=1e-5, atol=1e-5)


def backward(cfg):
    """The compiled gradient of a LLaMA whose blocks are computed again, on a mesh."""
    model, placed = create("llama", **{**vars(MODELS["llama"]), "remat": "full"}), make_mesh(cfg, jax.devices()[:2])
    where = rules.shardings_of(placed, model.axes(), model.shapes())
    params = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), model.shapes(), where)
    tokens = jax.ShapeDtypeStruct((B, T), np.int32, sharding=rules.sharding(placed, ("batch", "seq")))
    with jax.set_mesh(placed):
        total = jax.jit(jax.grad(lambda params, tokens: (model.apply(params, tokens, head=False) ** 2).sum()))
        return total.lower(params, tokens).compile().as_text()


def test_sequence_sharding_gathers_and_keeps_half_of_each_block_s_input():
    whole, cut = backward(mesh(tensor=2)), backward(mesh(tensor=2, sequence=True))
    D = MODELS["llama"].width
    kept = [f"f32[2,{B},{length},{D}]" for length in (T, T // 2)]
    assert [text in whole for text in kept] == [True, False]
    assert [text in cut for text in kept] == [False, True], "the stacked inputs of the blocks"
    assert set(collectives(whole)) == {"all-reduce"}
    assert collectives(cut)["all-gather"] >= 4 and "all-to-all" not in collectives(cut)


def test_fields_of_tokens_are_cut_and_images_are_whole_on_all_devices_of_a_row():
    placed = make_mesh(mesh(data=2, context=4))
    tokens, images = np.zeros((4, 8), np.int32), np.zeros((4, 8, 8, 3), np.float32)
    data = Stdlib(seq_len=8)
    text = tasks.build(CausalLM(), GPT2Config(vocab_size=48, context=8, layers=1, width=8, heads=2), data)
    image = tasks.build(Classification(), MLPConfig(input_shape=(8, 8, 3), hidden=(4,)), data)
    vectors = tasks.build(Classification(), MLPConfig(input_shape=(8,), hidden=(4,)), data)
    held = [
        jax.device_put(x, task.shardings(placed, {name: x})[name]).addressable_shards[0].data.shape
        for task, name, x in ((text, "tokens", tokens), (image, "inputs", images), (vectors, "inputs", tokens))
    ]
    assert held == [(2, 2), (2, 8, 8, 3), (2, 8)]


def test_rows_that_do_not_divide_are_refused_with_a_length_that_does():
    row = {"tokens": BatchField((100,), axes=("seq",)), "inputs": BatchField((9, 9, 3)), "vector": BatchField((9,))}
    with pytest.raises(UserError, match=r"tokens of 100 tokens.*multiple of 8 \(mesh context = 8\), try .*-len 96$"):
        check_lengths(row, sizes(mesh(context=8), 8))
    check_lengths(row, sizes(mesh(context=4, tensor=2), 8))
    with pytest.raises(UserError, match=r"multiple of 8 \(mesh context\*tensor = 8\)"):
        check_lengths(row, sizes(mesh(context=4, tensor=2, sequence=True), 8))
