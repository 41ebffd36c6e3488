"""The optimizer's state in the memory of the hosts: the same training, and less in that of the devices."""

import dataclasses

import jax
import numpy as np

from jaxmodels import cli, tasks
from jaxmodels.config import (
    AdamW,
    CausalLM,
    Classification,
    Config,
    Constant,
    Eval,
    Mesh,
    Metrics,
    Stdlib,
    Synthetic,
    Train,
)
from jaxmodels.models.gpt2 import GPT2Config
from jaxmodels.models.mlp import MLPConfig
from jaxmodels.parallel import rules
from jaxmodels.parallel.mesh import make_mesh
from jaxmodels.train import run, state, step
from jaxmodels.train.metrics import read
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


def test_a_run_goes_on_where_its_optimizer_lay_elsewhere(tmp_path):
    optim = AdamW(peak_lr=1e-2, schedule=Constant())
    cfg = Config(
        model=MLPConfig(input_shape=(4,), classes=3, hidden=(8,)),
        task=Classification(),
        data=Synthetic(batch_size=8),
        optim=optim,
        train=Train(steps=6),
        eval=Eval(every=0, batches=2),
        metrics=Metrics(every=1, progress="none", loggers=()),
    )
    run.train(cfg, tmp_path / "here")
    there = dataclasses.replace(cfg, optim=dataclasses.replace(optim, offload=True), train=Train(steps=4))
    run.train(there, tmp_path / "moved")
    run.train(cfg, tmp_path / "moved", resume="must")
    here, moved = (
        [{name: value for name, value in row.items() if not name.startswith("perf/")} for row in read(tmp_path / name)]
        for name in ("here", "moved")
    )
    assert [row["step"] for row in here] == list(range(1, 7)) and "eval/loss" in here[-1]
    # the first part was evaluated at its end
    moved[3] = {name: value for name, value in moved[3].items() if not name.startswith("eval/")}
    assert moved == here


def test_what_cannot_be_is_refused(root, capsys):
    config = str(root / "configs" / "gpt_stdlib.py")
    assert cli.main(["train", config, "--optim.offload", "True", "--train.strategy", "pmap"]) == 2
    assert "try --train.strategy jit" in capsys.readouterr().err
