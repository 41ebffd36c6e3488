"""`jaxmodels import` and `jaxmodels export`: a run from weights and back, whole or not at all, in little memory."""

import json
import os
import shlex
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

import jaxmodels
from jaxmodels import cli, data
from jaxmodels.commands.export import export_run, size
from jaxmodels.commands.import_ import import_run
from jaxmodels.config import Checkpoint, Config, Eval, Init, Metrics, Text, Train
from jaxmodels.data import texts
from jaxmodels.data.tokenizer import Bytes, Chars
from jaxmodels.errors import UserError
from jaxmodels.hf import save
from jaxmodels.hf import tokenizer as tokenizers
from jaxmodels.models.bert import BERTConfig
from jaxmodels.models.clip import CLIPConfig
from jaxmodels.models.gpt2 import GPT2Config
from jaxmodels.models.mlp import MLPConfig
from jaxmodels.models.resnet import ResNetConfig
from jaxmodels.train import run as runs
from tests.quick import FLAGS

GPT2 = GPT2Config(vocab_size=300, context=16, layers=2, width=16, heads=2)
TEXT = "def f(x):\n    return x  # naïve\n" * 40


def filled(model, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), model.shapes())


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """What one downloads: weights, a tokenizer, and what lies beside them."""
    folder = tmp_path_factory.mktemp("given") / "gpt2"
    folder.mkdir()
    tokenizer = data.train_bpe([TEXT], 300, folder / "tokenizer.json")
    config = GPT2Config(**{**GPT2.__dict__, "vocab_size": tokenizer.vocab_size})
    model = jaxmodels.create(config)
    save.save_pretrained(folder, model, filled(model), more={"bos_token_id": 3, "custom": [1, 2]})
    for name in ("tokenizer_config.json", "special_tokens_map.json", "vocab.json", "generation_config.json"):
        (folder / name).write_text(json.dumps({"from": name}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "README.md").write_text("not part of the model")
    return folder


@pytest.fixture(scope="module")
def imported(given, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "gpt2"
    assert cli.main(["import", str(given), "--out", str(run)]) == 0
    return run


def test_import_then_export_gives_the_same_files(given, imported, tmp_path, capsys):
    assert cli.main(["export", str(imported), str(tmp_path / "out")]) == 0
    assert "step 0" in capsys.readouterr().out
    names = {path.name for path in given.iterdir()} - {"README.md"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (given / name).read_bytes(), name


def test_a_classifier_of_a_short_context_is_evaluated_once_imported(tmp_path, capsys):
    folder = tmp_path / "bert"
    folder.mkdir()
    size = data.train_bpe([TEXT], 300, folder / "tokenizer.json").vocab_size
    model = jaxmodels.create(BERTConfig(size, 16, 2, 1, 2, 16, 32, head="classification", classes=2))
    save.save_pretrained(folder, model, filled(model))
    assert cli.main(["import", str(folder), "--out", str(tmp_path / "run")]) == 0
    assert cli.main(["eval", str(tmp_path / "run")]) == 2
    assert (
        "an imported model without data of its own, expected data to evaluate on, try --data table"
        in capsys.readouterr().err
    )
    (tmp_path / "new.csv").write_text("text,label\nf(x),0\nreturn x,1\n")
    other = ["--data", "table", "--data.path", str(tmp_path / "new.csv")]
    assert cli.main(["eval", str(tmp_path / "run"), *other]) == 0
    assert "accuracy" in capsys.readouterr().out


def test_an_imported_clip_is_evaluated_and_classifies_by_captions(tmp_path, capsys):
    folder, run, images = tmp_path / "clip", str(tmp_path / "run"), tmp_path / "images"
    folder.mkdir()
    size = data.train_bpe(["a photo of a dark light thing. " * 50], 300, folder / "tokenizer.json").vocab_size
    model = jaxmodels.create(
        CLIPConfig(
            input_shape=(8, 8, 3), patch=4, image_layers=1, image_heads=2, image_width=16, image_mlp_width=16,
            context=16, vocab_size=size, text_layers=1, text_heads=2, text_width=16, text_mlp_width=16, embedding=8,
        )
    )  # fmt: skip
    save.save_pretrained(folder, model, filled(model))
    for name, value in (("dark", 20), ("light", 230)):
        (images / name).mkdir(parents=True)
        Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(images / name / "a.png")
    assert cli.main(["import", str(folder), "--out", run]) == 0
    assert cli.main(["eval", run]) == 2
    captions = "--data.captions 'a photo of a {label}'"
    assert f"try --data images --data.path FOLDER {captions}" in capsys.readouterr().err
    advised = shlex.split(f"--data images --data.path {images} {captions}")
    assert cli.main(["eval", run, *advised]) == 0
    assert "2 images of 8x8x3, 2 classes (eval), 2 captions" in capsys.readouterr().out
    assert cli.main(["eval", run, *advised, "--data.class-names", "night"]) == 2
    assert "got 1 data.class_names, expected one for each of 2 classes" in capsys.readouterr().err

    assert cli.main(["predict", run, str(images)]) == 2
    error = capsys.readouterr().err
    assert "got " + run + " without captions and names of classes" in error
    advised = shlex.split(error.partition(", try ")[2])
    assert advised == ["--captions", "a photo of a {label}", "--class-names", "cat", "dog"]
    assert cli.main(["predict", run, str(images), *advised[:2], "--class-names", "dark", "a light thing"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    opened = jaxmodels.load_run(run)
    read = texts.encoded(["a photo of a dark", "a photo of a a light thing"], opened.tokenizer, 16)
    for each, value in zip(found, (20, 230), strict=True):
        pixels, _ = opened.inputs({"inputs": np.full((1, 8, 8, 3), value, np.uint8)})
        seen, text, scale = opened.apply(pixels, read["inputs"], segment_ids=read["segment_ids"])
        expected = jax.nn.softmax(np.minimum(scale, 100) * seen @ text.T)[0]
        np.testing.assert_allclose([*each["probabilities"].values()], expected, atol=1e-4)


def test_an_imported_run_is_sampled_from(imported, given, capsys):
    assert cli.main(["sample", str(imported), "--prompt", "def", "--tokens", "5", "--seed", "1"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("def")
    model, params = jaxmodels.load_pretrained(given)
    from jaxmodels.generate.texts import continued

    again = continued(
        model, params, data.load_tokenizer(given), "def", 5, temperature=0.8, top_k=None, top_p=1.0, seed=1
    )
    assert text == again + "\n"


def test_a_prompt_is_text_and_a_sample_is_written_where_it_goes(imported, capsys, monkeypatch):
    def said(prompt):
        assert cli.main(["sample", str(imported), "--prompt", prompt, "--tokens", "1"]) == 0
        return capsys.readouterr().out

    assert said("\ufeffdef") == said("def")
    assert cli.main(["sample", str(imported), "--top-k", "99999"]) == 2
    assert "got --top-k 99999, expected at most the model's vocabulary of " in capsys.readouterr().err
    assert cli.main(["sample", str(imported), "--prompt", "def \udcff"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: got a text with '\\udcff', half of a surrogate pair") and error.count("\n") == 1
    assert said("\x1b[2Jdef").startswith("\x1b[2Jdef")  # as the model wrote it
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert said("\x1b[2Jdef").startswith("\\x1b[2Jdef")


def test_a_sample_is_piped_in_letters_that_the_pipe_takes(imported):
    command = [sys.executable, "-m", "jaxmodels", "sample", str(imported), "--prompt", "naïve", "--tokens", "1"]
    ended = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}, timeout=120)
    assert ended.returncode == 0 and ended.stdout.startswith(b"na\\xefve")


def test_an_imported_run_is_evaluated_on_its_own_tokens(imported, tmp_path, capsys):
    cfg, origin = jaxmodels.config.read(imported)
    assert origin["file"].endswith("gpt2")
    assert cfg.data.tokenizer == str(imported / "tokenizer.json")
    assert cfg.data.seq_len == 16
    assert cli.main(["config", "explain", str(imported), "model.layers"]) == 0
    assert "model.layers = 2" in capsys.readouterr().out


def test_a_training_starts_from_an_imported_run_and_its_average_is_exported(imported, given, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    cfg = Config(
        model=jaxmodels.config.read(imported)[0].model,
        data=Text(path=(str(text),), tokenizer=str(imported / "tokenizer.json"), seq_len=8, batch_size=8),
        train=Train(steps=2, ema=0.5),
        eval=Eval(batches=1),
        checkpoint=Checkpoint(every=0),
        metrics=Metrics(progress="none"),
        init=Init(source=str(imported)),
    )
    _, result = runs.train(cfg, tmp_path / "run")
    assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--shard-size", "20KB"]) == 0
    _, params = jaxmodels.load_pretrained(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, params, result.state.ema["model"])
    before = jaxmodels.load_pretrained(given)[1]["embed"]["w"]
    assert 0 < np.abs(params["embed"]["w"] - before).max() < 0.01
    ids = data.load_tokenizer(tmp_path / "out").encode(TEXT)
    np.testing.assert_array_equal(ids, data.load_tokenizer(given).encode(TEXT))
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2


def test_a_classifier_keeps_its_statistics_and_the_names_of_its_classes(tmp_path, capsys):
    config = ResNetConfig(input_shape=(16, 16, 3), classes=3, depths=(1, 1), widths=(8, 16), stem_width=8)
    model = jaxmodels.create(config)
    stats = jax.tree.map(lambda x: np.full(x.shape, 0.75, np.float32), jax.eval_shape(model.stats))
    names = {"id2label": {"0": "cat", "1": "dog", "2": "cow"}, "label2id": {"cat": 0, "dog": 1, "cow": 2}}
    (tmp_path / "in").mkdir()
    save.save_pretrained(tmp_path / "in", model, filled(model), stats, more=names)
    import_run(tmp_path / "in", tmp_path / "run")
    cfg, _ = jaxmodels.config.read(tmp_path / "run")
    assert (cfg.task.kind, cfg.model) == ("classification", config)
    export_run(tmp_path / "run", tmp_path / "out")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "in" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    assert cli.main(["eval", str(tmp_path / "run")]) == 2
    assert (
        "an imported model without data of its own, expected data to evaluate on, try --data images"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("tokenizer", [Bytes(), Chars("abc defnrtuxï\n#():")], ids=["bytes", "chars"])
def test_our_own_tokenizers_become_tokenizers_of_hugging_face(tokenizer, tmp_path):
    tokenizers.save(tokenizer, tmp_path)
    theirs = data.load_tokenizer(tmp_path)
    text = "def f(x):\n    return ï # cab\n"
    text = "".join(c for c in text if isinstance(tokenizer, Bytes) or c in tokenizer.characters)
    np.testing.assert_array_equal(theirs.encode(text), tokenizer.encode(text))
    assert theirs.decode(tokenizer.encode(text)) == text
    assert theirs.vocab_size == tokenizer.vocab_size


# ---- mistakes


def test_a_directory_that_is_not_empty_is_left_alone(given, imported, tmp_path):
    (tmp_path / "mine").write_text("")
    for command in (["import", str(given), "--out", str(tmp_path)], ["export", str(imported), str(tmp_path)]):
        assert cli.main(command) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    (tmp_path / "empty").mkdir()
    assert cli.main(["export", str(imported), str(tmp_path / "empty")]) == 0


def test_a_family_that_transformers_lacks_is_refused_in_one_line(tmp_path, capsys):
    cfg = Config(model=MLPConfig())
    (tmp_path / "run").mkdir()
    jaxmodels.config.save(cfg, tmp_path / "run" / "config.json", {})
    assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 2
    assert "family mlp, which transformers does not have" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("text", "count"), [("5GB", 5e9), ("1.5 mb", 1.5e6), ("20K", 2e4), ("7", 7)])
def test_sizes_are_read(text, count):
    assert size(text) == count


@pytest.mark.parametrize("text", ["five", "0", "-1GB", "5TB", ""])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UserError, match="expected a size in bytes, try 5GB"):
        size(text)


def test_an_import_that_fails_leaves_nothing(given, tmp_path, monkeypatch):
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in given.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    (broken / "tokenizer.json").write_text('{"model": 1}')
    assert cli.main(["import", str(broken), "--out", str(tmp_path / "run")]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


# ---- kills and memory


def child(*code, **environment):
    """A process of its own that runs a line after importing what all of these need."""
    setup = "import resource, sys\nfrom jaxmodels import cli\nfrom jaxmodels.hf import files, load\n"
    env = {**os.environ, "XLA_FLAGS": FLAGS, **environment}
    return subprocess.Popen(
        [sys.executable, "-c", setup + "\n".join(code)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize("command", ["import", "export"])
def test_a_kill_leaves_nothing_that_looks_complete_and_the_next_one_succeeds(command, given, imported, tmp_path):
    out = tmp_path / "out"
    arguments = (
        ["import", str(given), "--out", str(out)] if command == "import" else ["export", str(imported), str(out)]
    )
    # all is read, or all of the last file is written; then it waits to be killed
    stall = "import time; print('here', flush=True); time.sleep(100)"
    where = (
        f"old = load.nested\ndef nested(leaves): {stall}\nload.nested = nested"
        if command == "import"
        else f"import os\ndef fsync(fd): {stall}\nfiles.os.fsync = fsync"
    )
    process = child(where, f"cli.main({arguments!r})")
    assert "here\n" in iter(process.stdout.readline, "")  # behind what plugins of JAX write
    assert (tmp_path / "out.part").is_dir()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    assert not (tmp_path / "out.part" / "config.json").exists()
    assert cli.main(arguments) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_model_is_imported_in_little_more_memory_than_its_own(tmp_path):
    sizes = {}
    for name, config in {
        "tiny": GPT2Config(vocab_size=97, context=32, layers=1, width=16, heads=2),
        "large": GPT2Config(vocab_size=30011, context=256, layers=8, width=768, heads=12),
    }.items():
        model = jaxmodels.create(config)
        (tmp_path / name).mkdir()
        rng = np.random.default_rng(0)
        params = jax.tree.map(lambda leaf: rng.random(leaf.shape, np.float32), model.shapes())  # noqa: B023
        save.save_pretrained(tmp_path / name, model, params)
        sizes[name] = 4 * model.count()
    assert sizes["large"] > 300e6

    def peak(name, limit=None):
        """Address space that an import takes, in bytes."""
        begin = f"resource.setrlimit(resource.RLIMIT_AS, ({limit}, {limit}))" if limit else ""
        run = tmp_path / f"{name}-run"
        process = child(
            begin,
            f"code = cli.main(['import', {str(tmp_path / name)!r}, '--out', {str(run)!r}])",
            "text = open('/proc/self/status').read()",
            "print(text.split('VmPeak:')[1].split()[0]); sys.exit(code)",
            JAX_PLATFORMS="cpu",
        )
        said = process.communicate(timeout=120)[0]
        assert process.returncode == 0, said
        return 1024 * int(said.split()[-1])

    base = peak("tiny")
    peak("large", int(base + 1.35 * sizes["large"]))
    assert (tmp_path / "large-run" / "config.json").is_file()


def test_an_imported_body_that_no_task_trains_is_named_by_what_can_be_done_with_it(tmp_path, capsys):
    config = BERTConfig(vocab_size=23, context=9, layers=1, heads=2, width=8, mlp_width=12, head="none")
    model = jaxmodels.create(config)
    (tmp_path / "in").mkdir()
    save.save_pretrained(tmp_path / "in", model, filled(model))
    import_run(tmp_path / "in", tmp_path / "run")
    for command in ("eval", "sample"):
        assert cli.main([command, str(tmp_path / "run")]) == 2
        said = capsys.readouterr().err
        assert "no task trains" in said and "try jaxmodels export" in said and "--task" not in said


@pytest.mark.parametrize(("problem", "classes"), [("multi_label_classification", 2), (None, 1), ("regression", 2)])
def test_what_a_classifier_s_outputs_are_is_kept(problem, classes, tmp_path, capsys):
    """Classes that exclude each other, independent ones, or no classes at all: a score, whose softmax would be 1."""
    (tmp_path / "in").mkdir()
    size = data.train_bpe([TEXT], 300, tmp_path / "in" / "tokenizer.json").vocab_size
    model = jaxmodels.create(BERTConfig(size, 16, 2, 1, 2, 16, 32, head="classification", classes=classes))
    save.save_pretrained(tmp_path / "in", model, filled(model), more={"problem_type": problem} if problem else {})
    if problem == "regression":
        with pytest.raises(UserError, match="with problem_type 'regression', expected a classifier"):
            import_run(tmp_path / "in", tmp_path / "run")
        return
    import_run(tmp_path / "in", tmp_path / "run")
    (tmp_path / "new.txt").write_text("return x\n")
    capsys.readouterr()
    assert cli.main(["predict", str(tmp_path / "run"), str(tmp_path / "new.txt")]) == (0 if problem else 2)
    found = capsys.readouterr()
    if problem:
        assert "labels" in json.loads(found.out)
    else:
        assert "no task trains" in found.err and len(found.err.splitlines()) == 1
    export_run(tmp_path / "run", tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written.get("problem_type") == problem
