"""A job: what is planned is what runs, and options that would change nothing are refused."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

from jaxmodels import cli, tasks
from jaxmodels import config as configs
from jaxmodels.config import TFDS, Classification, Config, Contrastive, Images, Mesh, Seq2Seq, Synthetic, Table, Text
from jaxmodels.errors import UserError
from jaxmodels.train.job import assemble, check_options, on_fewer
from tests import zoo

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


def model_of(name):
    _, model = zoo.ZOO[name]
    return dataclasses.replace(model, vocab_size=256) if hasattr(model, "vocab_size") else model


@pytest.mark.parametrize("kind", ["images", "texts", "pairs", "captions"])
def test_a_plan_has_the_batch_of_a_run(tmp_path, kind):
    """Bytes of images, and the segment ids that fill up texts: without them another program would be planned."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for k in range(20):
            Image.fromarray(np.full((8, 8, 3), 10 * k, np.uint8)).save(tmp_path / name / f"{k}.png")
    lines = [f"text {k},ein Text {k},{'ab'[k % 2]}\n" for k in range(40)]
    (tmp_path / "table.csv").write_text("".join(["text,translation,label\n", *lines]))
    small = {"batch_size": 8, "eval_fraction": 0.3}
    images = Images(path=(str(tmp_path),), seq_len=16, captions=("a {label}",), **small)
    table = Table(path=(str(tmp_path / "table.csv"),), seq_len=16, **small)
    model, task, data = {
        "images": (model_of("cnn"), Classification(), Images(path=(str(tmp_path),), **small)),
        "texts": (model_of("bert-classifier"), Classification(), dataclasses.replace(table, input_field="text")),
        "pairs": (
            model_of("transformer"),
            Seq2Seq(),
            dataclasses.replace(table, input_field="text", target_field="translation", tokenizer="words:40"),
        ),
        "captions": (model_of("clip"), Contrastive(), images),
    }[kind]
    runs, planned = (assemble(Config(model, task, data), opened=opened) for opened in (True, False))
    assert runs.batch == planned.batch


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


def test_a_split_that_is_trained_on_is_not_evaluated_on():
    table = Table(path=("a.csv",), split_field="split", eval_split="train")
    for section in table, TFDS(name="mnist", eval_split="train"):
        with pytest.raises(UserError, match="got data.eval_split train with the same data.train_split"):
            check_options(Config(model_of("cnn"), Classification(), section))


def test_on_fewer_processes_microbatches_keep_the_rows_of_a_device(root):
    cfg = gpt(root)
    cfg = dataclasses.replace(
        cfg,
        mesh=Mesh(data=2),
        data=dataclasses.replace(cfg.data, batch_size=24),
        train=dataclasses.replace(cfg.train, accumulate=2),
    )
    job = assemble(cfg, jax.devices()[:2], opened=False)
    # rows of a device at a time: 24 / (2 * 2) = 6 here, so 24 / (2 * 4) and 24 / (2 * 3) are as many or fewer
    found = [on_fewer(job, processes, planned).accumulate for processes, planned in ((2, 2), (1, 2), (2, 3), (5, 6))]
    assert found == [2, 4, 3, 3]
    # 24 rows are not 2 * 5 equal parts
    assert on_fewer(job, 2, 5).accumulate == 6


@pytest.mark.parametrize("name", ["gpt2", "resnet", "clip", "mixtral", "vae"])
def test_what_microbatches_would_change_keeps_its_batch_in_one(root, name):
    task, model = zoo.ZOO[name]
    data = Synthetic(batch_size=8, seq_len=zoo.T) if hasattr(model, "context") else Synthetic(batch_size=8)
    cfg = Config(model=model, task=tasks.TASKS.find(task)(), data=data, mesh=Mesh(data=1))
    assert on_fewer(assemble(cfg, jax.devices()[:1], opened=False), 1, 2).accumulate == 1
    if name == "gpt2":
        cfg = dataclasses.replace(cfg, model=dataclasses.replace(model, dropout=0.0))
        assert on_fewer(assemble(cfg, jax.devices()[:1], opened=False), 1, 2).accumulate == 2
