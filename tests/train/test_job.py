"""A job: what is planned is what runs, and options that would change nothing are refused."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxmodels import cli
from jaxmodels import config as configs
from jaxmodels.config import Text
from jaxmodels.train.job import assemble

SMALL = (
    "--model.layers 1 --model.width 16 --model.heads 2 --model.context 16 --data.seq-len 16 --data.batch-size 8 "
    "--optim.warmup-steps 0 --train.steps 4"
)


def gpt(root):
    cfg = configs.load(root / "configs" / "gpt_stdlib.py")
    return dataclasses.replace(
        cfg,
        model=dataclasses.replace(cfg.model, layers=1, width=16, heads=2, context=16),
        data=dataclasses.replace(cfg.data, seq_len=16, batch_size=8),
    )


def test_a_plan_lowers_the_very_step_that_runs(root):
    cfg = gpt(root)
    runs, planned = assemble(cfg), assemble(cfg, opened=False)
    assert runs.sources.keys() == {"train", "eval"} and not planned.sources
    assert runs.batch == planned.batch
    assert runs.lower().as_text() == planned.lower().as_text()


def test_a_plan_of_packed_texts_has_the_fields_that_a_run_has(root, tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text("to be or not to be, that is the question\n" * 20)
    paths = (str(tmp_path / "*.txt"),)
    cfg = gpt(root)
    cfg = dataclasses.replace(
        cfg,
        model=dataclasses.replace(cfg.model, vocab_size=300),
        data=Text(path=paths, tokenizer="bpe:300", pack=True, seq_len=16, batch_size=8),
    )
    runs, planned = assemble(cfg), assemble(cfg, opened=False)
    assert runs.batch == planned.batch and "segment_ids" in planned.batch


def test_the_job_is_assembled_on_the_devices_that_it_is_given(root):
    job = assemble(gpt(root), jax.devices()[:4], opened=False)
    assert job.mesh.shape["data"] == 4 and job.batch["tokens"].sharding.mesh == job.mesh
    held = job.batch["tokens"].sharding.shard_shape(job.batch["tokens"].shape)
    assert held == (2, 16) and job.units == 8 * 16
    assert job.parameters() == sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(job.layout.params))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--train.quantize-axes mlp embed", "got train.quantize_axes ('mlp', 'embed') with train.quantize none"),
        ("--eval.early-stop 3 --eval.every 0", "got eval.early_stop 3 with eval.every 0"),
        ("--checkpoint.best True --eval.every 0", "got checkpoint.best True with eval.every 0"),
        ("--init.fresh head/*", "got init.fresh ('head/*',) with no init.source"),
        ("--mesh.sequence True", "got mesh.sequence True with mesh.tensor 1"),
        ("--mesh.rounds 2", "got rounds=2 on a mesh with stage=1"),
        ("--train.strategy pmap --optim.offload True", "got optim.offload with train.strategy pmap"),
    ],
)
def test_an_option_that_would_change_nothing_is_refused_before_any_work(root, tmp_path, capsys, options, said):
    command = ["train", str(root / "configs/gpt_stdlib.py"), "--run-dir", str(tmp_path / "run")]
    assert cli.main([*command, *SMALL.split(), *options.split()]) == 2
    errors = capsys.readouterr().err
    assert said in errors and "expected" in errors and "try" in errors and errors.count("\n") == 1
    assert not (tmp_path / "run").exists()
