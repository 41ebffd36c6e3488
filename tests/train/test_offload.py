"""The optimizer's state in the memory of the hosts: the same training, and less in that of the devices."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jaxmodels import cli, tasks
from jaxmodels.config import AdamW, CausalLM, Config, Mesh, Stdlib
from jaxmodels.errors import UserError
from jaxmodels.models.gpt2 import GPT2Config
from jaxmodels.parallel import rules
from jaxmodels.parallel.mesh import make_mesh
from jaxmodels.plan import compile, topology
from jaxmodels.train import state, step
from jaxmodels.train.state import HOST

MODEL = GPT2Config(layers=2, width=16, heads=2, vocab_size=64, context=16)


def train(offload, steps=3):
    """The state after some steps on two devices."""
    mesh = make_mesh(Mesh(data=1, fsdp=2), jax.devices()[:2])
    task = tasks.build(CausalLM(), MODEL, Stdlib(seq_len=16, batch_size=4))
    optimizers = {"loss": AdamW(peak_lr=1e-2).build(steps, task.axes()["model"])}
    layout = state.layout(task, optimizers, mesh, offload=offload)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, layout)
    now = jax.jit(lambda key: state.init(task, optimizers, key), out_shardings=shardings)(jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, 64, (4, 17)).astype(np.int32)
    batch = jax.device_put({"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}, rules.sharding(mesh, ("batch", "seq")))
    rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), batch)
    take = step.build_step(task, optimizers, mesh, layout, rows, offload=offload)
    for _ in range(steps):
        now, metrics = take(now, batch)
    return now, float(metrics["loss"])


def test_steps_are_the_same_and_the_optimizer_lies_with_the_host():
    (here, loss), (there, same) = train(False), train(True)
    assert same == loss
    for a, b in zip(*map(jax.tree.leaves, (here, there)), strict=True):
        if not jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(a, b)
    moments = [leaf for leaf in jax.tree.leaves(there.opt_state) if leaf.ndim]
    assert {leaf.sharding.memory_kind for leaf in moments} == {HOST}
    assert len(moments) == 2 * len(jax.tree.leaves(there.params))
    rest = jax.tree.leaves((there.params, there.step, [x for x in jax.tree.leaves(there.opt_state) if not x.ndim]))
    assert HOST not in {leaf.sharding.memory_kind for leaf in rest}


def test_a_run_goes_on_where_its_optimizer_lay_elsewhere(root, tmp_path, capsys):
    small = ["--model.layers", "1", "--model.width", "16", "--model.heads", "2", "--eval.every", "0"]
    few = ["--data.seq-len", "16", "--data.batch-size", "8", "--eval.batches", "2"]
    shared = [*small, *few, "--checkpoint.every", "2", "--metrics.progress", "none"]
    config = str(root / "configs" / "gpt_stdlib.py")
    for name, options in {"one": ["4"], "two": ["4", "--optim.offload", "True"]}.items():
        assert cli.main(["train", config, "--run-dir", str(tmp_path / name), *shared, "--train.steps", *options]) == 0
    again = ["--train.steps", "6", "--resume", "must"]
    for name in ("one", "two"):
        assert cli.main(["train", config, "--run-dir", str(tmp_path / name), *shared, *again]) == 0
    last = [json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1]) for name in ("one", "two")]
    assert last[0]["step"] == 6
    assert last[0]["eval/loss"] == last[1]["eval/loss"]


def test_what_cannot_be_is_refused(root, capsys):
    config = str(root / "configs" / "gpt_stdlib.py")
    assert cli.main(["train", config, "--optim.offload", "True", "--train.strategy", "pmap"]) == 2
    assert "try --train.strategy jit" in capsys.readouterr().err
    cfg = Config(model=MODEL, optim=dataclasses.replace(AdamW(), offload=True))
    with pytest.raises(UserError, match="got optim.offload on v7"):
        compile.compiled(cfg, topology.parse("v7:4x4x4"))
