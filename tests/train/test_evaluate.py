"""Evaluation: the same for every batch size and device count, by group, in bits per byte; and saved runs."""

import json
import math
from dataclasses import replace
from typing import Any, ClassVar

import jax
import numpy as np
import pytest

from jaxmodels import cli, tasks
from jaxmodels.config import (
    VAE,
    CausalLM,
    Checkpoint,
    Classification,
    Config,
    Eval,
    MaskedLM,
    Mesh,
    Metrics,
    Stdlib,
    Synthetic,
    Text,
    Train,
)
from jaxmodels.data import Loader, Order, open_source
from jaxmodels.data.texts import Rows
from jaxmodels.errors import UserError
from jaxmodels.generate import judge
from jaxmodels.models.gpt2 import GPT2Config
from jaxmodels.models.mlp import MLPConfig
from jaxmodels.models.vae import VAEConfig
from jaxmodels.parallel import progress
from jaxmodels.parallel.mesh import make_mesh
from jaxmodels.tasks.metrics import frechet_distance, inception_score
from jaxmodels.tasks.task import Task, divide
from jaxmodels.train import evaluate, load_run
from jaxmodels.train import run as runs

CLASSES, GROUPS, N = 7, ("north", "south", "empty", "west"), 50


def examples(rows=slice(None), group=True):
    rng = np.random.default_rng(0)
    arrays = {
        "inputs": rng.normal(size=(N, 4)).astype(np.float32),
        "labels": rng.integers(0, CLASSES, N).astype(np.int32),
        "group": rng.choice([0, 1, 3], N, p=[0.5, 0.3, 0.2]).astype(np.int32),
    }
    arrays = {name: x[rows] for name, x in arrays.items() if group or name != "group"}
    return Rows(arrays, split="eval", label="numbers", groups=GROUPS, classes=CLASSES)


@pytest.fixture(scope="module")
def classifier():
    task = tasks.build(Classification(), MLPConfig((4,), CLASSES, ()), Stdlib())
    params = {"model": task.networks["model"].init(jax.random.key(0))}
    return task, params


def measured(classifier, source, size=50, devices=1):
    task, params = classifier
    mesh = make_mesh(Mesh(), jax.devices()[:devices])
    shardings = task.shardings(mesh, source.arrays)
    measure = evaluate.build_evaluate(task, mesh, classes="abcdefg", groups=source.groups)
    return measure(params, {}, Loader(source, Order(N, size, 0), shardings).once())


@pytest.fixture(scope="module")
def whole(classifier):
    return measured(classifier, examples())


@pytest.mark.parametrize(("size", "devices"), [(16, 1), (16, 8)])
def test_metrics_depend_neither_on_the_batch_nor_on_the_devices(classifier, whole, size, devices):
    found = measured(classifier, examples(), size, devices)
    assert found == pytest.approx(whole, rel=1e-5, abs=1e-6)
    assert {"loss", "accuracy", "top5", "f1", "f1/a", "calibration_error", "group/west/loss"} <= set(found)


def test_a_group_s_metrics_are_those_of_its_examples_alone(classifier, whole):
    groups = examples().arrays["group"]
    for index, name in enumerate(GROUPS):
        own = {metric: value for metric, value in whole.items() if metric.startswith(f"group/{name}/")}
        if name == "empty":
            assert not own
            continue
        few = examples(groups == index, group=False)
        task, params = classifier
        batch = {k: np.pad(x, [(0, N - len(few)), *[(0, 0)] * (x.ndim - 1)], constant_values=-1)
                 for k, x in few.arrays.items()}  # fmt: skip
        alone = evaluate.build_evaluate(task, make_mesh(Mesh(), jax.devices()[:1]), classes="abcdefg")(
            params, {}, [batch]
        )
        assert own == pytest.approx({f"group/{name}/{k}": v for k, v in alone.items()}, rel=1e-5, abs=1e-6)


def test_a_gap_is_the_largest_difference_between_groups(whole):
    for metric in ("loss", "accuracy", "f1", "recall/c"):
        values = [whole[f"group/{name}/{metric}"] for name in GROUPS if name != "empty"]
        assert whole[f"gap/{metric}"] == pytest.approx(max(values) - min(values))
    assert whole["gap/loss"] > 0


def test_a_class_that_a_group_lacks_makes_no_gap(classifier):
    counts = np.zeros((3, CLASSES, 3))  # true positives, false positives, false negatives of each group's classes
    counts[:, 0], counts[0, 1], counts[1:, 2] = [3, 0, 1], [4, 0, 0], [[1, 0, 0], [1, 0, 1]]
    none = np.zeros(3)
    totals = {"loss": (np.ones(3), np.ones(3)), "counts": (counts, np.full(3, 4.0)), "calibration": (none, none)}
    found = evaluate.compare_groups(classifier[0], totals, "abcdefg", ("one", "two", "three"))
    assert found["gap/recall/a"] == 0 and found["group/one/recall/b"] == 1
    assert not {"gap/recall/b", "group/two/recall/b"} & set(found)
    assert found["gap/recall/c"] == 0.5, "of the groups that have the class"


def test_without_groups_there_is_nothing_of_them(classifier):
    found = measured(classifier, examples(group=False))
    assert not any(name.startswith(("group/", "gap/")) for name in found)


def test_an_evaluation_told_to_stop_gives_nothing(classifier):
    task, params = classifier
    measure = evaluate.build_evaluate(task, make_mesh(Mesh(), jax.devices()[:1]), lambda: True)
    assert measure(params, {}, [examples().batch(np.arange(8), np.zeros(8, int))]) is None


def test_a_supervisor_hears_of_each_batch(classifier, monkeypatch):
    told = []
    monkeypatch.setattr(progress, "poll", lambda: told.append(None))
    measured(classifier, examples(), size=50)
    assert len(told) == -(-N // 50)


TEXT = "the cat sat on the mat, and the café was full of other cats.\n" * 30


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:280"])
def test_bits_a_byte_are_the_loss_by_the_bytes_that_targets_stand_for(tmp_path, tokenizer):
    (tmp_path / "text.txt").write_text(TEXT)
    fields = {"path": (str(tmp_path / "text.txt"),), "tokenizer": tokenizer, "seq_len": 16, "eval_fraction": 0.5}
    cfg = Text(**fields)
    source = open_source(cfg, "eval", CausalLM(), vocab_size=280)
    task = tasks.build(CausalLM(), GPT2Config(280, 16, layers=1, heads=2, width=8), cfg)
    params = {"model": task.networks["model"].init(jax.random.key(0))}
    measure = evaluate.build_evaluate(task, make_mesh(Mesh(), jax.devices()[:1]))
    found = measure(params, {}, Loader(source, Order(len(source), 64, 0)).once())
    text = TEXT[int(len(TEXT) * 0.5) :]
    ids = source.tokenizer.encode(text)
    counted = len(text.encode()) - len(source.tokenizer.decode(ids[:1]).encode())
    assert len(ids) == source.tokens and (len(ids) == len(text.encode())) == (tokenizer == "bytes")
    assert found["bits_per_byte"] == pytest.approx(found["loss"] * (len(ids) - 1) / counted / math.log(2), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    masked = tasks.build(MaskedLM(), "bert", Stdlib(seq_len=16))
    assert "bits_per_byte" not in jax.eval_shape(
        masked.metrics, {"model": masked.networks["model"].shapes()}, {}, source.batch(np.arange(2), np.zeros(2, int))
    ), "only what predicts every byte has bits a byte"


SHAPE = (4, 4, 1)


class Own(Classification):
    """A task from outside whose metrics are whatever a test says."""

    measures: ClassVar[Any] = None

    def build(self, model, data):
        return replace(super().build(model, data), metrics=lambda *_: self.measures(), summarize=Task.summarize)


BASE = Config(
    model=MLPConfig(SHAPE, 5, ()),
    task=Classification(),
    data=Synthetic(batch_size=8),
    train=Train(steps=2),
    eval=Eval(every=1),
    checkpoint=Checkpoint(best=True, every=0),
    metrics=Metrics(every=1, progress="none", loggers=()),
)


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    """Runs of two steps of a classifier and of an autoencoder of small random images."""
    vae = replace(BASE, model=VAEConfig(input_shape=SHAPE, hidden=(8,), latents=2), task=VAE())
    folder = tmp_path_factory.mktemp("runs")
    for name, cfg in (("classifier", BASE), ("vae", vae)):
        runs.train(cfg, folder / name)
    return folder


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_opened_again_measures_what_it_measured(run_of):
    opened = load_run(run_of / "classifier").evaluation()
    assert opened.run.step == 2
    last = {name: value for name, value in lines(run_of / "classifier")[-1].items() if name.startswith("eval/")}
    found = {f"eval/{name}": value for name, value in opened.measure().items()}
    assert len(last) > 5 and last == pytest.approx({name: found[name] for name in last}, rel=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"metric": "eval/acuracy"},
            "got eval.metric 'eval/acuracy', expected one of eval/loss.*, did you mean",
        ),
        ({"metric": "accuracy", "mode": "max"}, "got eval.metric 'accuracy', .*, did you mean 'eval/accuracy'"),
        (
            {"metric": "eval/bleu", "mode": "max"},
            "got eval.metric 'eval/bleu', expected one of eval/loss, eval/accuracy, eval",
        ),
        ({"metric": "eval/accuracy"}, "got eval.mode min for eval.metric eval/accuracy, expected max, try --eval.mode"),
        ({"mode": "max"}, "got eval.mode max for eval.metric eval/loss, expected min"),
    ],
)
def test_a_metric_to_judge_by_that_there_is_not_is_refused_before_anything_is_done(tmp_path, fields, message):
    cfg = replace(BASE, eval=Eval(every=1, **fields))
    with pytest.raises(UserError, match=message):
        runs.train(cfg, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("measures", "message"),
    [
        ({"error": (1.0, 2)}, "got metrics error of {own}, expected a loss too, try {'loss': (sum, count)"),
        ({}, "got metrics {} of {own}, expected a loss too"),
        (None, "got metrics of {own} as None, expected {'loss'"),
        ([(1.0, 2)], "got metrics of {own} as [(1.0, 2)], expected {'loss'"),
        ({"loss": (1.0, 2), 3: (1.0, 2)}, "got metrics of {own} as {'loss': (1.0, 2), 3: (1.0, 2)}, expected {'loss'"),
        ({"loss": 1.0}, "got metric 'loss' of {own} as 1.0, expected its sum and its count"),
        ({"loss": (1.0, 2), "error": None}, "got metric 'error' of {own} as None, expected its sum and"),
        ({"loss": (1.0, 2), "error": (1.0, 2, 3)}, "got metric 'error' of {own} as (1.0, 2, 3), expected"),
        ({"loss": (1.0, 2), "error": {"sum": 1.0}}, "got metric 'error' of {own} as {'sum': 1.0}, expected its sum"),
        ({"loss": (1.0, np.ones(3))}, "got metric 'loss' of {own} as (1.0, float64[3]), expected its sum"),
        ({"loss": (1.0, 2), "error": ("high", 2)}, "got metric 'error' of {own} as ('high', 2), expected its sum"),
    ],
)
def test_metrics_of_a_task_from_outside_that_are_no_sums_are_refused_before_anything_is_done(
    tmp_path, monkeypatch, measures, message
):
    monkeypatch.setattr(Own, "measures", lambda self: measures)
    with pytest.raises(UserError) as error:
        runs.train(replace(BASE, task=Own()), tmp_path / "run")
    assert message.replace("{own}", f"task {__name__}:Own") in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_sum_that_is_an_array_needs_a_summary_of_its_own():
    assert divide({"loss": (np.ones(()), 2), "error": (np.ones(3), 0)} | {"error": (1, 0)}) == {"loss": 0.5}
    with pytest.raises(UserError, match=r"got a sum of shape \(3,\) as metric 'error', expected a number"):
        divide({"error": (np.ones(3), 2)})


def test_a_generative_run_keeps_samples_of_the_same_latents(run_of):
    first, second = (np.load(run_of / "vae" / "samples" / f"{step:08d}.npy") for step in (1, 2))
    assert first.shape == second.shape == (64, *SHAPE) and first.dtype == np.uint8
    assert not np.array_equal(first, second) and np.abs(first.astype(int) - second).mean() < 10


def test_images_are_judged_by_a_classifier_on_the_command_line(run_of, tmp_path, capsys):
    out = tmp_path / "found.json"
    argv = ["eval", str(run_of / "vae"), "--classifier", str(run_of / "classifier"), "--json", str(out)]
    assert cli.main(argv) == 0
    assert "score" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert found["elbo"] == pytest.approx(-found["loss"])
    assert 1 <= found["score"] <= 5 and found["classes"] in range(1, 6) and 0.2 <= found["confidence"] <= 1
    by, opened = load_run(run_of / "classifier"), load_run(run_of / "vae")
    images = opened.task.samples(opened.params, {}, 1000)
    logits = by.apply(images)
    assert found["score"] == pytest.approx(inception_score(np.asarray(jax.nn.softmax(logits))), rel=1e-4)
    real = np.concatenate([batch["inputs"] for batch in opened.evaluation().batches()]) / np.float32(255)
    features = (np.asarray(by.apply(x, head=False)) for x in (images, real))
    assert found["frechet"] == pytest.approx(frechet_distance(*features), rel=1e-3)


def test_what_cannot_judge_or_be_judged_is_refused(run_of):
    opened = {name: load_run(run_of / name) for name in ("classifier", "vae")}
    with pytest.raises(UserError, match="got --classifier for a run of task classification, expected one whose model"):
        judge.judge_images(opened["classifier"], run_of / "classifier")
    with pytest.raises(UserError, match="of task vae, expected classification with one label an image, try"):
        judge.judge_images(opened["vae"], run_of / "vae")


def test_a_run_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match="expected a directory with config.json"):
        load_run(tmp_path).evaluation()
