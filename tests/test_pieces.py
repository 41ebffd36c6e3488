"""Tokenizers, transforms, metrics and benchmarks from outside the tree do what the tree's own do."""

import importlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from benchmarks.__main__ import main
from jaxmodels import data, tasks
from jaxmodels.config import (
    Augment,
    CausalLM,
    Classification,
    Config,
    Contrastive,
    Eval,
    Images,
    Synthetic,
    Table,
    Train,
)
from jaxmodels.data.tokenizer import build, load_tokenizer
from jaxmodels.errors import UserError
from jaxmodels.models.clip import CLIPConfig
from jaxmodels.models.gpt2 import GPT2Config
from jaxmodels.models.mlp import MLPConfig
from jaxmodels.train import run as runs

PIECES = '''
import numpy as np
import jax.numpy as jnp
from dataclasses import dataclass
from jaxmodels.data.tokenizer import BaseTokenizer


class Vowels(BaseTokenizer):
    """Whether each character is a vowel, with a number that a run must keep."""

    vocab_size = 2

    def __init__(self, shift=0):
        self.shift = shift

    @classmethod
    def learn(cls, documents):
        return cls(shift=sum(len(text) for text in documents()) % 2)

    def settings(self):
        return {"shift": self.shift}

    def encode(self, text):
        return np.array([(c in "aeiou") ^ self.shift for c in text], np.int32)

    def decode(self, ids):
        return "".join("xa"[i ^ self.shift] for i in np.ravel(ids))


def inverted(image, rng):
    return 255 - image


def noisy(image, rng):
    return rng.integers(0, 256, image.shape, np.uint8)


def floating(image, rng):
    return image / 255


def margin(outputs, batch):
    top = jnp.sort(outputs, -1)
    return top[..., -1] - top[..., -2]


def total(outputs, batch):
    return outputs.sum()


def listed(outputs, batch):
    return [1.0, 2.0]


def lost(outputs, batch):
    return None


def triple(outputs, batch):
    return outputs[:, 0], outputs[:, 0], outputs[:, 0]


def weighed(outputs, batch):
    return outputs[:, 0], outputs


def accuracy(outputs, batch):
    return outputs[:, 0]


def f1(outputs, batch):
    return outputs[:, 0]


@dataclass
class Options:
    times: int = 2


def bench(options: Options):
    """Say something several times."""
    print("measured", options.times)
'''


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    """A module that lies outside the tree, on Python's path."""
    (tmp_path / "own_pieces.py").write_text(PIECES)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("own_pieces", None)


def test_a_tokenizer_from_outside_is_learned_kept_and_loaded(tmp_path):
    own = build("own_pieces:Vowels", lambda: ["one", "two"], None)
    assert own.encode("bad").tolist() == [0, 1, 0] and own.vocab_size == 2
    odd = build("own_pieces:Vowels", lambda: ["three"], None)
    odd.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.to_json() == odd.to_json() and again.encode("bad").tolist() == [1, 0, 1]
    with pytest.raises(UserError, match="expected a class that derives from BaseTokenizer"):
        build("own_pieces:bench", lambda: ["one"], None)
    with pytest.raises(UserError, match="did you mean 'Vowels'"):
        build("own_pieces:Vowel", lambda: ["one"], None)


def test_a_transform_from_outside_changes_images_of_training_alone(tmp_path):
    for i in range(20):
        (tmp_path / "set" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4), 10 * i, np.uint8)).save(tmp_path / "set" / "ab"[i % 2] / f"{i}.png")

    def batch(split, *transforms):
        source = data.open_source(
            Images(path=(str(tmp_path / "set"),), eval_fraction=0.3), split, Classification(), inputs_shape=(4, 4, 1),
            num_classes=2, augment=Augment(transforms=transforms),
        )  # fmt: skip
        return source.batch(np.arange(4), np.array([0, 0, 1, 1]))["inputs"], source

    plain, _ = batch("train")
    changed, source = batch("train", "own_pieces:inverted")
    np.testing.assert_array_equal(changed, 255 - plain)
    assert "own_pieces:inverted" in source.describe()
    np.testing.assert_array_equal(batch("eval", "own_pieces:inverted")[0], batch("eval")[0])
    noise, _ = batch("train", "own_pieces:noisy")
    np.testing.assert_array_equal(noise, batch("train", "own_pieces:noisy")[0])
    assert (noise[0] != noise[1]).any() and (noise[0] != noise[2]).any()
    with pytest.raises(UserError, match=r"got float64 \(4, 4, 1\) from augment.transforms own_pieces:floating"):
        batch("train", "own_pieces:floating")
    with pytest.raises(UserError, match="did you mean 'noisy'"):
        Augment(transforms=("own_pieces:noissy",))


def test_a_metric_from_outside_is_a_mean_over_the_examples_that_count():
    model = MLPConfig(input_shape=(4,), hidden=(8,), classes=3)
    task = tasks.build(Classification(), model, Table(), None, ("own_pieces:margin",))
    plain = tasks.build(Classification(), model, Table())
    params = task.init(jax.random.key(0))
    inputs = jax.random.normal(jax.random.key(1), (4, 4))
    batch = {"inputs": inputs, "labels": jnp.array([0, 1, -1, 2]), "weight": jnp.array([1.0, 1.0, 1.0, 0.0])}
    found = jax.jit(task.metrics)(params, {}, batch)
    logits = jnp.sort(task.networks["model"].apply(params["model"], inputs), -1)
    total, count = found["margin"]
    assert float(count) == 2 and float(total) == pytest.approx(float((logits[:2, -1] - logits[:2, -2]).sum()), rel=1e-5)
    totals = {name: (jax.device_get(a), float(b)) for name, (a, b) in found.items()}
    summary, theirs = task.summarize(totals, ("a", "b", "c")), plain.summarize(totals, ("a", "b", "c"))
    assert summary["margin"] == pytest.approx(float(total) / 2)
    assert {name: value for name, value in summary.items() if name != "margin"} == {
        name: value for name, value in theirs.items() if name != "margin"
    }
    wrong = tasks.build(Classification(), model, Table(), None, ("own_pieces:total",))
    with pytest.raises(UserError, match="expected a value for each of the 4 examples"):
        wrong.metrics(params, {}, batch)
    with pytest.raises(UserError, match="does not give its model's outputs"):
        tasks.build(Contrastive(), CLIPConfig(), Table(seq_len=8), None, ("own_pieces:margin",))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["total"], "got shape () from metric 'total', expected a value for each of the 8 examples"),
        (["listed"], "got list from metric 'listed', expected a value for each of the 8 examples"),
        (["lost"], "got NoneType from metric 'lost', expected a value for each"),
        (["triple"], "got shape (8,) and shape (8,) and shape (8,) from metric 'triple', expected a value for each"),
        (["weighed"], "got shape (8,) and shape (8, 3) from metric 'weighed', expected a value for each"),
        (["accuracy"], "got a metric 'accuracy', which the task has already, expected another name"),
        (["f1"], "got a metric 'f1', which the task has already, expected another name"),
        (["margin", "margin"], "got eval.metrics own_pieces:margin and own_pieces:margin, all of which would be named"),
        (["margin", "piecemeal:margin"], "got eval.metrics own_pieces:margin and piecemeal:margin, all of which would"),
    ],
)
def test_metrics_from_outside_that_cannot_be_computed_are_refused_before_the_first_step(
    tmp_path, monkeypatch, names, message
):
    monkeypatch.setitem(sys.modules, "piecemeal", importlib.import_module("own_pieces"))
    names = tuple(name if ":" in name else f"own_pieces:{name}" for name in names)
    cfg = Config(
        model=MLPConfig((2, 2, 1), 3, ()),
        task=Classification(),
        data=Synthetic(batch_size=8),
        train=Train(steps=2),
        eval=Eval(metrics=names),
    )
    with pytest.raises(UserError) as error:
        runs.train(cfg, tmp_path / "run")
    assert message in str(error.value) and not (tmp_path / "run").exists()
    tasks.build(CausalLM(), GPT2Config(layers=1, width=16, heads=2), Table(seq_len=8), None, ("own_pieces:margin",))


def test_a_benchmark_from_outside_is_run(capsys):
    assert main(["own_pieces:bench", "--times", "3"]) == 0
    assert "measured 3" in capsys.readouterr().out
    assert main(["own_pieces:benhc"]) == 2
    assert "did you mean 'bench'" in capsys.readouterr().err
