"""Predictions of saved runs: one line for each record, in order, without the data that were trained on."""

import io
import json
import os
import sys

import jax
import numpy as np
import pytest
from PIL import Image

import jaxmodels
from jaxmodels.cli import main
from jaxmodels.config import (
    VAE,
    AdamW,
    CausalLM,
    Classification,
    Config,
    Contrastive,
    MaskedLM,
    Metrics,
    Seq2Seq,
    Train,
)
from jaxmodels.data import texts as rows_of_texts
from jaxmodels.data.records import distinct
from jaxmodels.generate import classes, sample, translate_texts
from jaxmodels.models.bert import BERTConfig
from jaxmodels.models.clip import CLIPConfig
from jaxmodels.models.cnn import CNNConfig
from jaxmodels.models.gpt2 import GPT2Config
from jaxmodels.models.lstm import LSTMConfig
from jaxmodels.models.mlp import MLPConfig
from jaxmodels.models.transformer import TransformerConfig
from jaxmodels.models.vae import VAEConfig
from jaxmodels.train import run as runs
from tests.sections import data_of, untrained

QUICK = Metrics(every=100, progress="none", loggers=())
WORDS = "one two three four five six seven eight nine ten".split()


def trained(folder, model, task, data, steps=0):
    cfg = Config(
        model=model,
        task=task,
        data=data_of(batch_size=8, **data),
        optim=AdamW(peak_lr=3e-2),
        train=Train(steps=max(1, steps)),
        metrics=QUICK,
    )
    if steps:
        runs.train(cfg, folder / "run")
    else:
        untrained(cfg, folder / "run")
    return folder / "run"


def lines(capsys, *argv):
    """The lines of predict, and what it says beside them."""
    assert main(["predict", *map(str, argv)]) == 0
    said = capsys.readouterr()
    return [json.loads(line) for line in said.out.splitlines()], said.err


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A run that tells low numbers from high ones, the data of which are gone."""
    folder = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(0)
    rows = [f"{' '.join(rng.choice(WORDS[5 * c :][:5], 3))},{('low', 'high')[c]}" for c in rng.integers(0, 2, 60)]
    (folder / "a.csv").write_text("\n".join(["sentence,label", *rows]) + "\n")
    model = LSTMConfig(vocab_size=64, width=8, hidden=8, layers=1, classes=2, dropout=0.0)
    data = {"source": "table", "path": (str(folder / "a.csv"),), "tokenizer": "words:64", "seq_len": 8}
    run = trained(folder, model, Classification(), data, 30)
    (folder / "a.csv").unlink()
    return run


def test_texts_get_their_class_by_name_and_each_its_own_line(texts, tmp_path, capsys):
    (tmp_path / "new.csv").write_text(
        'id,sentence\n1,one three two\n2,\n3,"nine ten, ten"\n' + "4,six six six\n5,one one one\n" * 5
    )
    found, said = lines(capsys, texts, tmp_path / "new.csv")
    assert [each["where"].rpartition(":")[2] for each in found] == [str(n) for n in range(2, 15)]
    assert [each.get("label") for each in found] == ["low", None, "high", *["high", "low"] * 5]
    assert found[1]["error"] == "sentence is missing" and "1 of 13 records could not be read" in said
    assert found[0]["text"] == "one three two"
    for each in found[:1] + found[2:]:
        assert list(each["probabilities"]) == ["high", "low"]
        assert sum(each["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert each["probability"] == max(each["probabilities"].values())


def test_probabilities_are_those_of_the_model(texts, tmp_path, capsys):
    (tmp_path / "new.txt").write_text("one two\n")
    ((found,), _) = lines(capsys, texts, tmp_path / "new.txt")
    run = jaxmodels.load_run(texts)
    rows = rows_of_texts.single(run.tokenizer.encode_many(["one two"], special=True), 8)
    expected = jax.nn.softmax(run.apply(rows["inputs"], segment_ids=rows["segment_ids"]))[0]
    np.testing.assert_allclose([*found["probabilities"].values()], expected, atol=1e-5)


def test_lines_of_the_standard_input(texts, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\ufeffone two\r\n\nten".encode())))
    found, _ = lines(capsys, texts, "-")
    assert [each["where"] for each in found] == ["-:1", "-:2", "-:3"]
    assert [each.get("label") for each in found] == ["low", None, "high"] and found[0]["text"] == "one two"


def test_a_bad_byte_is_named_and_nothing_that_a_terminal_obeys_is_written(texts, tmp_path, capsys):
    (tmp_path / "new.txt").write_bytes(b"one\n\xff\xfe\nten \x1b[31m \xc2\x9b\n")
    assert main(["predict", str(texts), str(tmp_path / "new.txt")]) == 0
    out = capsys.readouterr().out
    assert "byte 0 of the line is not UTF-8" in out and "\x1b" not in out and "\x9b" not in out
    assert json.loads(out.splitlines()[2])["text"] == "ten \x1b[31m \x9b"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["nothing.txt"], "got 'nothing.txt', which does not exist"),
        (["{folder}/pipe.fifo"], "which is not a file, expected a file, a folder of images or -, try ls"),
        (["{folder}/dangling.lnk"], "which is a link to nothing, expected a file, a folder of images or -, try ls"),
        (["{folder}"], "for a model that reads texts, expected a table with a column of texts"),
        (["{folder}"], "try '{folder}/*.csv'"),
        (["{folder}/deep"], "try '{folder}/deep/**/*.txt'"),
        (["{folder}/numbers.jsonl"], "without a column of texts for a model that reads texts"),
        (["{folder}/other.csv"], "expected one of its columns, a, b, try --input-field a"),
        (["{folder}/other.csv", "--input-field", "c"], "got --input-field c, expected one of its columns, a, b"),
        (["{folder}/blank.txt"], "got 2 records, none of which can be read"),
        (["{folder}/blank.txt", "--input-field", "a"], "without a table"),
        (["{folder}/x.png"], "for a model that reads texts"),
        (["{folder}/blank.txt", "--beams", "2"], "expected it for seq2seq alone"),
        (["{folder}/blank.txt", "--captions", "a b"], "got --captions a b for a run of classification"),
        (["{folder}/blank.txt", "--tokens", "2"], "expected it for causal_lm alone"),
        ([], "got no files"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(texts, tmp_path, argv, said, capsys):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    (tmp_path / "blank.txt").write_text("\n \n")
    os.mkfifo(tmp_path / "pipe.fifo")
    (tmp_path / "dangling.lnk").symlink_to("nowhere")
    (tmp_path / "x.png").write_bytes(b"x")
    (tmp_path / "numbers.jsonl").write_text('{"x": [1, 2]}\n')
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "a.txt").write_text("one\n")
    assert main(["predict", str(texts), *(arg.format(folder=tmp_path) for arg in argv)]) == 2
    error = capsys.readouterr().err
    assert said.format(folder=tmp_path) in error and error.count("\n") == 1


def test_a_byte_order_mark_is_no_part_of_a_text(texts, tmp_path, capsys):
    (tmp_path / "new.jsonl").write_text(json.dumps({"sentence": "\ufeffone two"}) + '\n{"sentence": "\\ufeff"}\n')
    (tmp_path / "joined.txt").write_text("ten\n\ufeffone two\n")
    found, _ = lines(capsys, texts, tmp_path / "new.jsonl", tmp_path / "joined.txt")
    assert [each.get("text") for each in found] == ["one two", None, "ten", "one two"]
    assert found[0]["probabilities"] == found[3]["probabilities"] and found[1]["error"] == "sentence is missing"


def test_images_of_a_folder_and_by_path(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name, low in (("dark", 0), ("light", 200)):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(12):
            image = Image.fromarray(rng.integers(low, low + 50, (8, 8, 3)).astype(np.uint8))
            image.save(tmp_path / "set" / name / f"{i}.png")
    model = CNNConfig(input_shape=(8, 8, 3), classes=2, widths=(4,), hidden=(8,))
    data = {"source": "images", "path": (str(tmp_path / "set"),)}
    run = trained(tmp_path, model, Classification(), data, 30)
    new = tmp_path / "new"
    (tmp_path / "set").rename(new)
    (new / "light" / "a.png").write_bytes(b"no image")
    found, said = lines(capsys, run, new)
    assert [each["where"] for each in found] == sorted(str(path) for path in new.rglob("*.png"))
    right = [each.get("label") == each["where"].split("/")[-2] for each in found]
    assert sum(right) == 24 and "a.png" in said and "1 of 25" in said
    (tmp_path / "names.txt").write_text(f"{new / 'light' / '3.png'}\n/nowhere.png\n")
    found, _ = lines(capsys, run, tmp_path / "names.txt")
    assert found[0]["label"] == "light" and found[1]["error"] == "No such file or directory"
    (new / "paths.csv").write_text("id,file\n1,light/3.png\n2,dark/nowhere.png\n")  # from the folder of the table
    again, _ = lines(capsys, run, new / "paths.csv", "--input-field", "file")
    assert again[0]["probabilities"] == found[0]["probabilities"]
    assert again[1]["error"] == "file is 'dark/nowhere.png', which cannot be read (No such file or directory)"
    (tmp_path / "names.csv").write_text("id,name\n1,three\n")
    assert main(["predict", str(run), str(tmp_path / "names.csv")]) == 2
    error = capsys.readouterr().err
    assert "without a column of images" in error and "folders of images" in error and "--input-field" not in error
    assert main(["eval", str(run), "--data.path", str(new)]) == 0
    assert f"images of {new}: 25 images" in capsys.readouterr().out


@pytest.mark.parametrize("several", [False, True])
def test_arrays_and_several_labels(tmp_path, several, capsys):
    label = (lambda x: ["a"] * int(x > 0) + ["b"] * int(x < 2)) if several else (lambda x: "ab"[int(x > 0)])
    rows = [{"x": [float(v), 1.0], "label": label(v)} for v in np.linspace(-3, 3, 61) if label(v)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = MLPConfig(input_shape=(2,), classes=2, hidden=(8,))
    task = Classification(multi_label=several)
    run = trained(tmp_path, model, task, {"source": "table", "path": (str(tmp_path / "a.jsonl"),)}, 100)
    (tmp_path / "new.jsonl").write_text('{"x": [-2, 1]}\n{"x": [3.0, 1]}\n{"x": [1]}\n{"x": [NaN, 1]}\n[\n')
    found, _ = lines(capsys, run, tmp_path / "new.jsonl")
    key = "labels" if several else "label"
    assert [each[key] for each in found[:2]] == ([["b"], ["a"]] if several else ["a", "b"])
    assert "shape (1,), expected (2,)" in found[2]["error"] and "not finite" in found[3]["error"]
    assert "invalid JSON" in found[4]["error"]


def test_translations_are_those_of_the_library(tmp_path, capsys):
    pairs = [{"en": " ".join(WORDS[i % 7 :][:3]), "de": " ".join(WORDS[i // 7 :][:2])} for i in range(49)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    data = {"source": "table", "path": (str(tmp_path / "a.jsonl"),), "input_field": "en", "target_field": "de"}
    model = TransformerConfig(vocab_size=32, layers=1, decoder_layers=1, width=16, heads=2, mlp_width=16)
    run = trained(tmp_path, model, Seq2Seq(), {**data, "tokenizer": "words:32", "seq_len": 8})
    given = ["one two", "nine", "three four five six"]
    (tmp_path / "new.txt").write_text("\n".join(given))
    found, _ = lines(capsys, run, tmp_path / "new.txt")
    opened = jaxmodels.load_run(run)
    expected = translate_texts(opened.model, opened.params["model"], opened.tokenizer, given)
    assert [each["translation"] for each in found] == expected and [each["text"] for each in found] == given


def test_prompts_go_on_as_each_does_alone(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("to be or not to be, that is the question.\n" * 20)
    model = GPT2Config(vocab_size=256, context=32, layers=1, heads=2, width=8)
    data = {"source": "text", "path": (str(tmp_path / "a.txt"),), "seq_len": 16}
    run = trained(tmp_path, model, CausalLM(), data)
    (tmp_path / "new.txt").write_text("to be\nthat\n" + "x" * 40 + "\n")
    found, _ = lines(capsys, run, tmp_path / "new.txt", "--tokens", "6")
    opened = jaxmodels.load_run(run)
    for each in found[:2]:
        ids = opened.tokenizer.encode(each["text"])
        alone = sample(opened.model, opened.params["model"], ids, 6, temperature=0)[0]
        assert each["continuation"] == opened.tokenizer.decode(alone[len(ids) :])
    assert found[2]["error"] == "has 40 tokens, expected at most 26 with --tokens 6"


def test_gaps_are_filled(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("abababababababab" * 60)
    model = BERTConfig(vocab_size=300, context=16, layers=1, heads=2, width=32, mlp_width=32, dropout=0.0)
    data = {"source": "text", "path": (str(tmp_path / "a.txt"),), "seq_len": 16}
    run = trained(tmp_path, model, MaskedLM(), data, 60)
    (tmp_path / "new.txt").write_text("abab[MASK]bab[MASK]bababab\nabab\n")
    found, _ = lines(capsys, run, tmp_path / "new.txt")
    assert found[0]["filled"] == "ab" * 8 and len(found[0]["masks"]) == 2
    assert found[0]["masks"][0][0]["token"] == "a" and len(found[0]["masks"][0]) == 5
    assert found[1]["error"].startswith("has no [MASK]")


def test_images_are_matched_with_the_captions_of_the_classes(tmp_path, capsys):
    for name, value in (("dark", 20), ("light", 230)):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(12):
            Image.fromarray(np.full((8, 8, 3), value + i, np.uint8)).save(tmp_path / "set" / name / f"{i}.png")
    model = CLIPConfig(
        input_shape=(8, 8, 3), patch=4, image_layers=1, image_heads=2, image_width=16, image_mlp_width=16, context=24,
        vocab_size=256, text_layers=1, text_heads=2, text_width=16, text_mlp_width=16, embedding=8,
    )  # fmt: skip
    data = {"source": "images", "path": (str(tmp_path / "set"),), "captions": ("a {label} one",), "seq_len": 24}
    run = trained(tmp_path, model, Contrastive(), data, 40)
    found, _ = lines(capsys, run, tmp_path / "set")
    assert [each["label"] for each in found] == ["dark"] * 12 + ["light"] * 12
    again, _ = lines(capsys, run, tmp_path / "set", "--class-names", "light", "dark", "--captions", "a {label} one")
    for one, other in zip(found, again, strict=True):
        assert one["label"] == other["label"] and list(other["probabilities"]) == ["light", "dark"]
        assert other["probability"] == pytest.approx(one["probability"], abs=1e-5)
    assert main(["predict", str(run), str(tmp_path / "set"), "--captions", "a photo"]) == 2
    assert "got captions 'a photo', expected {label} in each" in capsys.readouterr().err


def test_what_only_makes_images_is_told_where_they_are_shown(tmp_path, capsys):
    model = VAEConfig(input_shape=(4, 4, 1), hidden=(8,), latents=2)
    run = trained(tmp_path, model, VAE(), {"source": "synthetic"})
    assert main(["predict", str(run), "x.png"]) == 2
    assert f"try jaxmodels report {run}" in capsys.readouterr().err


def test_classes_named_alike_stay_apart():
    assert distinct(["1", "2", "1"]) == ["1", "2", "1 (2)"]
    assert len(classes.chosen(np.array([0.2, 0.3, 0.5]), distinct(["1", "2", "1"]))["probabilities"]) == 3
