"""An artefact computes what its run computes, with jax and numpy alone, and refuses what is not as it was written."""

import dataclasses
import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxmodels import tasks
from jaxmodels.cli import main
from jaxmodels.config import AdamW, CausalLM, Config, Metrics, Text, Train
from jaxmodels.data.vocabulary import words
from jaxmodels.generate import sample, translate_texts
from jaxmodels.models.gpt2 import GPT2Config
from jaxmodels.serve import artefact, artefact_run
from jaxmodels.serve.artefact_run import Refused
from jaxmodels.train import load_run
from jaxmodels.train import run as runs
from jaxmodels.train.saved import Run
from tests.sections import data_of, task_of
from tests.zoo import ZOO, arrays

ALONE = """
import importlib.abc, json, runpy, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("jaxmodels", "flax", "optax", "orbax", "safetensors", "tokenizers", "flatbuffers"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
"""
"""What makes an interpreter into one without this package and what comes with it."""


def alone(code):
    """What code prints in a process that has jax and numpy, and nothing that this package needs beside them."""
    done = subprocess.run([sys.executable, "-I", "-c", ALONE + code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def made(folder, name, config=None, text=False, task=None):
    """A run of a family that was never trained, in which each parameter matters."""
    kind, model = ZOO[name]
    cfg = Config(model=config or model, task=task or task_of(kind), data=data_of("synthetic", batch_size=8, seq_len=12))
    folder.mkdir()
    if text:
        (folder / "tokenizer.json").write_text(words(["one two three four five six"], 48).to_str())
    built = tasks.build(cfg.task, cfg.model, cfg.data, cfg.train, cfg.eval.metrics)
    params = {name: arrays(model) for name, model in built.networks.items()}
    stats = {name: tree for name, model in built.networks.items() if (tree := model.stats())}
    return Run(folder, cfg, built.networks, params, stats, 3)


def written(run):
    folder = run.directory / "artefact"
    folder.mkdir()
    artefact.write(run, folder)
    return folder


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    """A language model that was trained on a few lines, and its artefact, made by the commands."""
    folder = tmp_path_factory.mktemp("writer")
    (folder / "a.txt").write_text("one two three, four five six.\n" * 200)
    cfg = Config(
        model=GPT2Config(vocab_size=256, context=96, layers=2, width=32, heads=2),
        task=CausalLM(),
        data=Text(path=(str(folder / "a.txt"),), tokenizer="bytes", seq_len=32, batch_size=8),
        optim=AdamW(peak_lr=1e-2),
        train=Train(steps=12),
        metrics=Metrics(every=100, progress="none", loggers=()),
    )
    runs.train(cfg, folder / "run")
    assert main(["export", str(folder / "run"), str(folder / "out"), "--format", "stablehlo"]) == 0
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    run = made(tmp_path_factory.mktemp("classifier") / "run", "resnet")
    return run, written(run)


def test_a_language_model_continues_as_sample_does_without_this_package(writer, capsys):
    capsys.readouterr()
    said = ["sample", str(writer / "run"), "--prompt", "one two", "--temperature", "0", "--tokens", "40"]
    assert main(said) == 0
    want = capsys.readouterr().out
    run = writer / "out" / "run.py"
    code = f"sys.argv = ['run.py', 'one two', '40']; runpy.run_path({str(run)!r}, run_name='__main__')"
    assert alone(code) == want and len(want) > 40


def test_prompts_of_any_length_and_number_share_one_function(writer):
    model = artefact_run.load(writer / "out")
    run = load_run(writer / "run")
    for prompts in ([[5, 6, 7]], [[9] * 40, [8] * 40]):
        want = sample(run.model, run.params["model"], prompts, 20, temperature=0)
        assert [model.generate(each, 20) for each in prompts] == [row[len(prompts[0]) :].tolist() for row in want]
    tokens = np.array([[1, 2, 3, 4, 5]], np.int32)
    np.testing.assert_allclose(model("logits", tokens=tokens)["logits"], run.apply(tokens), rtol=2e-4, atol=2e-5)


def test_a_classifier_of_images_gives_the_probabilities_of_its_run(classifier):
    run, folder = classifier
    images = np.random.default_rng(1).integers(0, 256, (5, 8, 8, 3), np.uint8)
    logits = run.apply(run.inputs({"inputs": images})[0])
    found = artefact_run.load(folder)("classify", inputs=images)
    np.testing.assert_allclose(found["probabilities"], jax.nn.softmax(logits), atol=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "lstm"])
def test_decoders_of_other_kinds_generate_what_sample_does(name, tmp_path):
    """Experts, whose blocks cannot be counted before, and a recurrent state in place of keys and values."""
    run = made(tmp_path / "run", name, dataclasses.replace(ZOO[name][1], layers=1), text=True)
    model = artefact_run.load(written(run), probe=False)
    prompt = [*run.tokenizer.before, 3, 4, 5]
    want = sample(run.model, run.params["model"], prompt, 12, temperature=0)[0, len(prompt) :].tolist()
    ends = [at for at, token in enumerate(want) if token in run.tokenizer.special.ends]
    assert model.generate([3, 4, 5], 12) == want[: (ends or [12])[0]]


def test_a_translator_gives_the_translations_of_its_beam_search(tmp_path):
    """T5, whose biases are written another way where the length is not known."""
    run = made(tmp_path / "run", "t5", dataclasses.replace(ZOO["t5"][1], layers=1), text=True)
    tokenizer = run.tokenizer
    model = artefact_run.load(written(run), probe=False)
    for text in ("one two", "six five four three two one one one two"):
        found = model.translate(tokenizer.encode(text).tolist())
        assert tokenizer.decode(found) == translate_texts(run.model, run.params["model"], tokenizer, [text])[0]


@pytest.mark.parametrize("name", ["dcgan", "vae"])
def test_images_are_those_that_the_task_generates_from_the_seed(name, tmp_path):
    run = made(tmp_path / "run", name)
    folder = written(run)
    found = artefact_run.load(folder)("generate", images=np.zeros(3, np.uint8), seed=np.array(5, np.int32))
    np.testing.assert_allclose(found["images"], run.task.samples(run.params, run.stats, 3, 5), atol=1e-5)
    kept = json.loads((folder / "manifest.json").read_text())["weights"]
    assert kept and not any("discriminator" in path for path in kept)  # what no function reads is left out


def test_pictures_of_classes_are_those_that_the_task_draws(tmp_path):
    run = made(tmp_path / "run", "dit", task=task_of("diffusion", guidance=2.0, sample_steps=2))
    labels = np.array([4, 0, 5], np.int32)
    found = artefact_run.load(written(run))("generate", labels=labels, seed=np.array(5, np.int32))
    given = {"labels": jax.numpy.asarray(labels)}
    np.testing.assert_allclose(found["images"], run.task.samples(run.params, run.stats, 3, 5, given), atol=1e-5)


def test_a_function_is_for_cpu_cuda_and_tpu_and_calls_no_kernel_of_one_of_them(classifier, writer):
    for folder in (classifier[1], writer / "out"):
        told = json.loads((folder / "manifest.json").read_text())
        assert told["platforms"] == ["cpu", "cuda", "tpu"]
        for entry in told["functions"].values():
            module = (folder / entry["file"]).read_bytes()
            assert b"tpu_custom_call" not in module and b"triton" not in module and b"cudnn" not in module


def test_a_damaged_file_is_refused_by_name(classifier, tmp_path):
    for name in ("weights.safetensors", "functions/classify.mlirbc", "manifest.json", "run.py", "probe.safetensors"):
        folder = tmp_path / name.replace("/", "-")
        shutil.copytree(classifier[1], folder)
        whole = bytearray((folder / name).read_bytes())
        whole[len(whole) // 2] ^= 1
        (folder / name).write_bytes(whole)
        with pytest.raises(Refused, match=f"{name.split('/')[-1]}|manifest"):
            artefact_run.load(folder)
    (folder / name).unlink()
    with pytest.raises(Refused, match="No such file"):
        artefact_run.load(folder)


def test_a_version_of_jax_outside_the_window_is_refused_by_name(classifier, monkeypatch):
    own = jax.__version_info__
    for version in ((0, 10, 1), (own[0], own[1] - 1, 9), (0, 13, 0)):
        monkeypatch.setattr(jax, "__version_info__", version)
        with pytest.raises(Refused, match=f"expected from {own[0]}.{own[1]}.{own[2]}.* up to below 0.13"):
            artefact_run.load(classifier[1])


def test_the_window_ends_where_the_range_of_this_package_does(root):
    assert f'"jax>=0.10.2,<{artefact.BELOW}"' in (root / "pyproject.toml").read_text()


def test_weights_that_give_something_else_than_the_probe_are_refused(classifier, tmp_path):
    run = dataclasses.replace(classifier[0], directory=tmp_path)
    other = written(dataclasses.replace(run, params=jax.tree.map(lambda x: 1.5 * x, run.params)))
    (other / "weights.safetensors").write_bytes((classifier[1] / "weights.safetensors").read_bytes())
    told = json.loads((other / "manifest.json").read_text())
    told["files"]["weights.safetensors"] = artefact.facts(other / "weights.safetensors")
    (other / "manifest.json").write_text(json.dumps(artefact.signed(told)))
    with pytest.raises(Refused, match="differs by .* from the probe"):
        artefact_run.load(other)


@pytest.mark.parametrize(
    ("inputs", "match"),
    [
        ({"inputs": np.zeros((2, 8, 8, 1), np.uint8)}, r"shape \(2, 8, 8, 1\), expected uint8 .*\(batch, 8, 8, 3\)"),
        ({"inputs": np.zeros((2, 8, 8, 3), np.float64)}, "got inputs of float64"),
        ({"inputs": np.zeros((8, 8, 3), np.uint8)}, "expected uint8 of the shape"),
        ({"inputs": [[1]]}, "got inputs of list"),
        ({"images": np.zeros((2, 8, 8, 3), np.uint8)}, "got inputs images for classify, expected inputs"),
        ({"inputs": np.zeros((0, 8, 8, 3), np.uint8)}, "shape"),
    ],
)
def test_inputs_that_a_function_does_not_take_are_refused(classifier, inputs, match):
    with pytest.raises(Refused, match=match):
        artefact_run.load(classifier[1], probe=False)("classify", **inputs)


def test_a_file_that_is_no_array_is_refused_in_one_line(classifier):
    for name in ("none.npy", "run.py"):
        run = [sys.executable, str(classifier[1] / "run.py"), str(classifier[1] / name)]
        done = subprocess.run(run, capture_output=True, text=True, check=False)
        assert done.returncode == 2 and done.stderr.startswith("got") and done.stderr.count("\n") == 1, done.stderr


def test_tokens_that_are_too_many_or_of_another_vocabulary_are_refused(writer):
    model = artefact_run.load(writer / "out", probe=False)
    with pytest.raises(Refused, match="length of 97, expected at most 96"):
        model("logits", tokens=np.zeros((1, 97), np.int32))
    with pytest.raises(Refused, match="got tokens from 0 to 256, expected 0 to 256"):
        model("logits", tokens=np.array([[0, 256]], np.int32))
    with pytest.raises(Refused, match="90 tokens and 7 to add, expected at most 96"):
        model.generate([1] * 90, 7)
    with pytest.raises(Refused, match="got lengths from 4 to 4"):
        model("start", tokens=np.zeros((1, 3), np.int32), lengths=np.array([4], np.int32))


def test_what_cannot_be_exported_is_refused_and_leaves_nothing(tmp_path):
    """Experts with a capacity that follows from the number of tokens, which is not known."""
    run = made(tmp_path / "run", "mixtral-capacity", text=True)
    with pytest.raises(ValueError, match="got a mixtral, whose logits jax.export does not take"):
        written(run)


def test_options_of_another_format_are_refused(writer, tmp_path, capsys):
    argv = ["export", str(writer / "run"), str(tmp_path / "a"), "--format", "stablehlo", "--shard-size", "1GB"]
    assert main(argv) == 2
    assert "got --shard-size 1GB with --format stablehlo" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
