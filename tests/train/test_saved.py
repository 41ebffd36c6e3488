"""Runs opened again: without their data, on other data, and with options that take effect or are refused."""

import shutil

import numpy as np
import pytest

import jaxmodels
from jaxmodels import config as configs
from jaxmodels.cli import main
from jaxmodels.config import AdamW, Classification, Config, Metrics, Table, Text, Train
from jaxmodels.errors import UserError
from jaxmodels.models.gpt2 import GPT2Config
from jaxmodels.models.lstm import LSTMConfig
from jaxmodels.train import run as runs
from jaxmodels.train.saved import load_run, read_kept
from tests.sections import untrained

WORDS = {"good": "fine great nice happy lovely".split(), "bad": "poor sad awful grim dull".split()}


def rows(count, classes=("good", "bad"), seed=0):
    """Lines of a CSV of texts whose class stands in their words."""
    rng = np.random.default_rng(seed)
    names = rng.choice(classes, count).tolist()
    return [f"{' '.join(rng.choice(WORDS.get(name, ['odd']), 4))},{name}" for name in names]


def csv(path, lines):
    path.write_text("\n".join(["sentence,label", *lines]) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A run of a classifier of texts, and the folder of its data."""
    folder = tmp_path_factory.mktemp("texts")
    cfg = Config(
        model=LSTMConfig(vocab_size=64, width=8, hidden=8, layers=1, classes=2, dropout=0.0),
        task=Classification(),
        data=Table(path=(csv(folder / "train.csv", rows(80)),), tokenizer="words:64", seq_len=8, batch_size=8),
        optim=AdamW(peak_lr=3e-2),
        train=Train(steps=30),
        metrics=Metrics(every=10, progress="none", loggers=()),
    )
    runs.train(cfg, folder / "run")
    return folder


@pytest.fixture
def moved(texts, tmp_path):
    """The run, moved to where its data are not."""
    shutil.copytree(texts / "run", tmp_path / "run")
    (texts / "train.csv").rename(texts / "away.csv")
    yield tmp_path / "run"
    (texts / "away.csv").rename(texts / "train.csv")


def test_a_run_is_loaded_without_its_data(moved):
    run = jaxmodels.load_run(moved)
    assert run.step == 30 and run.config.data.tokenizer == "words:64" and run.task.networks["model"] is not None
    assert run.kept.classes == ("bad", "good") and (run.kept.field, run.kept.kind) == ("sentence", "text")
    ids = run.tokenizer.encode("fine great")
    logits = run.apply(ids[None])
    assert logits.shape == (1, 2) and logits.argmax() == 1
    np.testing.assert_array_equal(logits, run.model.apply(run.params["model"], ids[None]))


def test_another_table_is_evaluated_by_the_classes_and_the_tokenizer_of_the_run(moved, tmp_path, capsys):
    """Its texts are all of one class, which would be the first if the table's own were counted."""
    other = csv(tmp_path / "other.csv", rows(10, ["good"]))
    assert main(["eval", str(moved), "--data.path", other]) == 0
    said = capsys.readouterr().out
    assert "on table other.csv sentence: 10 texts, 2 classes (eval), tokenizer tokenizer.json" in said
    assert "accuracy           1\n" in said and "train.csv" not in said


def test_a_class_that_was_not_trained_on_is_a_bad_record_by_name(moved, tmp_path, caplog):
    other = csv(tmp_path / "other.csv", [*rows(3), "odd odd,strange"])
    with caplog.at_level("WARNING", "jaxmodels"):
        opened = load_run(moved).evaluation({"path": (other,)})
    assert len(opened.source) == 3
    assert "other.csv:5: label is 'strange', expected one of bad, good" in caplog.text


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--split", "nonsense"], "got data.eval_split 'nonsense' without data.split_field"),
        (["--data.eval-split", "nonsense"], "got data.eval_split 'nonsense' without data.split_field"),
        (["--split", "a", "--data.eval-split", "b"], "got --split a and --data.eval-split b, expected one of them"),
        (["--data-dir", "/nowhere"], "try --data.path FILE"),
        (["--data.name", "mnist"], "got --data.name 'mnist' for data table"),
        (
            ["--data.target-field", "label"],
            "got data.target_field 'label', which classification of texts from table does not use",
        ),
        (["--data.path", "nothing.csv"], "got data.path 'nothing.csv', which does not exist"),
        (["--data", "text", "--data.input-field", "x"], "for data text, which has no such field"),
        (["--beams", "4"], "got --beams 4 for a run of task classification"),
        (["--json", "no/where.json"], "whose folder does not exist"),
    ],
)
def test_an_option_of_eval_takes_effect_or_is_refused(texts, argv, said, capsys):
    assert main(["eval", str(texts / "run"), *argv]) == 2
    assert said in capsys.readouterr().err


def test_a_run_whose_data_is_gone_is_told_an_option_that_eval_has(moved, capsys):
    assert main(["eval", str(moved)]) == 2
    assert "--data.path" in capsys.readouterr().err


def test_a_report_shows_the_user_s_own_words(texts, tmp_path):
    other = csv(tmp_path / "other.csv", ["Zebras & <b>giraffes</b> agree,good", "Zebras of 1990 agree,bad"])
    from jaxmodels.report import confusion

    saved = load_run(texts / "run").evaluation({"path": (other,)})
    found = confusion.pieces(saved)[-1]
    assert found.head[0] == "text" and len(found.rows) == 1
    assert found.rows[0][0] in ("Zebras & <b>giraffes</b> agree", "Zebras of 1990 agree")


def test_sample_says_what_fits(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("to be or not to be, that is the question.\n" * 20)
    cfg = Config(
        model=GPT2Config(vocab_size=256, context=16, layers=1, heads=2, width=8),
        data=Text(path=(str(tmp_path / "a.txt"),), seq_len=16, batch_size=8, eval_fraction=0.25),
        train=Train(steps=1),
        metrics=Metrics(progress="none", loggers=()),
    )
    run = str(untrained(cfg, tmp_path / "run"))
    for argv, said in (
        (["--prompt", "a" * 16], "try a prompt of at most 15 tokens"),
        (["--prompt", "a" * 10, "--tokens", "7"], "try --tokens 6"),
        (["--prompt", "a", "--tokens", "0"], "got tokens 0, expected at least 1"),
    ):
        assert main(["sample", run, *argv]) == 2
        assert said in capsys.readouterr().err
    (tmp_path / "b.txt").write_text("another text. " * 10)
    assert main(["eval", run, "--data.path", str(tmp_path / "b.txt")]) == 0
    said = capsys.readouterr().out
    assert f"{tmp_path / 'b.txt'}: 140 tokens" in said and "a.txt" not in said, "all of it, and its own name"
    assert main(["sample", run, "--prompt", "to be", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.startswith("to be")


def test_what_makes_no_text_is_told_what_it_makes(texts, capsys):
    assert main(["sample", str(texts / "run"), "--prompt", "x"]) == 2
    assert f"try jaxmodels predict {texts / 'run'} FILE" in capsys.readouterr().err


def test_loading_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="expected a directory with config.json"):
        jaxmodels.load_run(tmp_path)


@pytest.mark.parametrize(
    "text", ["[]", '{"kind": 5}', '{"classes": "ab"}', '{"classes": [["a"]]}', '{"eval": null}', "[" * 100_000]
)
def test_what_a_run_keeps_of_its_data_is_read_or_refused(tmp_path, text):
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(UserError, match="data.json"):
        read_kept(tmp_path)


def test_a_run_that_lost_the_names_of_its_classes_says_so(moved, tmp_path, caplog):
    (moved / "data.json").unlink()
    run = load_run(moved)
    assert run.class_name(1) == "1" and run.class_name(0) == "0"
    assert [line for line in caplog.messages if "no data.json, which names its classes" in line] == caplog.messages
    caplog.clear()
    run.evaluation({"path": (csv(tmp_path / "new.csv", rows(20)),)})
    assert caplog.messages[-1].endswith("those of table are taken for 0 to 1 in this order: bad, good")
    (moved / "data.json").mkdir()
    with pytest.raises(UserError, match=r"data.json, which cannot be read \(.*\), expected facts about a run's data"):
        load_run(moved).class_name(0)


def test_a_run_that_lost_its_tokenizer_learns_no_other_one(texts, tmp_path):
    shutil.copytree(texts / "run", tmp_path / "run")
    (tmp_path / "run" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="run without tokenizer.json, by which it reads texts"):
        load_run(tmp_path / "run").evaluation({"path": (csv(tmp_path / "new.csv", rows(20)),)})


def test_the_metrics_of_a_run_are_its_lines_and_a_hole_is_told(texts, tmp_path, caplog):
    run = jaxmodels.load_run(texts / "run")
    assert [row["step"] for row in run.metrics] == [10, 20, 30] and run.metrics[-1]["eval/accuracy"] > 0.5
    assert not caplog.text
    shutil.copytree(texts / "run", tmp_path / "run")
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run/metrics.jsonl").write_text(lines[0] + lines[2])
    assert [row["step"] for row in jaxmodels.load_run(tmp_path / "run").metrics] == [10, 30]
    assert caplog.text.count("\n") == 1 and "lacks 1 of the 3 lines up to step 30" in caplog.text


def test_a_run_that_was_imported_says_its_own_mistake(tmp_path):
    """A task that does not fit is not taken for a model that no task trains."""
    (tmp_path / "pretrained").mkdir()
    cfg = Config(model=GPT2Config(layers=1, width=8, heads=2), task=Classification())
    configs.save(cfg, tmp_path / "config.json", {})
    with pytest.raises(UserError) as refused:
        jaxmodels.load_run(tmp_path)
    assert "no task trains" not in str(refused.value) and "checkpoint" not in str(refused.value)
