"""Sentences that sum up a text: their rows, what is chosen, and how it is judged."""

import json
import logging

import jax
import numpy as np
import pytest

from jaxmodels import tasks
from jaxmodels.cli import main
from jaxmodels.config import Config, Extraction, Stdlib, Table
from jaxmodels.data import open_source
from jaxmodels.data.contract import IGNORED
from jaxmodels.errors import UserError
from jaxmodels.models.bert import BERTConfig
from jaxmodels.report import summaries
from jaxmodels.tasks.overlap import judge_summary
from jaxmodels.train.saved import load_run
from tests.sections import untrained

NOUNS = "river lake hill town road field wood bridge mill farm".split()
TASK = Extraction(sentences=2, most=4)
T = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    rng, rows = np.random.default_rng(0), []
    for number in range(14):
        source = [" ".join(rng.choice(NOUNS, 3)) for _ in range(2 + number % 3)]
        marks = [int(i == number % 2) for i in range(len(source))]
        target = [" ".join(rng.choice(NOUNS, 4)) for _ in range(1 + number % 2)]
        rows.append({"source": source, "source_labels": marks, "target": target})
    folder = tmp_path_factory.mktemp("texts")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def data_of(path, **fields):
    named = {"input_field": "source", "label_field": "source_labels", "target_field": "target"}
    both = {"path": (str(path),), "eval_path": (str(path),)}
    return Table(**{**named, **both, "tokenizer": "words:60", "seq_len": T, "batch_size": 8, **fields})


def rows_of(folder):
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def test_rows_hold_each_sentence_between_special_tokens_with_its_mark(folder):
    source = open_source(data_of(folder / "rows.jsonl"), "train", TASK)
    (first,) = source.tokenizer.ids(["<|endoftext|>"])
    for row, record in enumerate(rows_of(folder)):
        arrays = {name: x[row] for name, x in source.arrays.items()}
        expected = [[first, *source.tokenizer.encode(each).tolist()] for each in record["source"]]
        assert arrays["tokens"][arrays["segment_ids"] > 0].tolist() == [token for each in expected for token in each]
        count = len(expected)
        assert arrays["labels"].tolist() == record["source_labels"] + [IGNORED] * (4 - count)
        for number, each in enumerate(expected):
            place = slice(arrays["at"][number], arrays["at"][number] + len(each))
            assert arrays["tokens"][place].tolist() == each and (arrays["types"][place] == number % 2).all()


def test_sentences_that_do_not_fit_are_left_out_and_told(folder, caplog):
    with caplog.at_level(logging.WARNING, "jaxmodels"):
        source = open_source(data_of(folder / "rows.jsonl", seq_len=9), "train", TASK)
    assert "9 of 14 texts" in caplog.text, "those of more than two sentences of four tokens"
    assert ((source.arrays["labels"] >= 0).sum(1) == 2).all()


def test_a_text_with_another_number_of_marks_is_left_out_and_named(folder, tmp_path, caplog):
    rows = rows_of(folder)
    rows[3]["source_labels"] = [0]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with caplog.at_level(logging.WARNING, "jaxmodels"):
        source = open_source(data_of(tmp_path / "rows.jsonl"), "train", TASK)
    assert len(source) == 13 and "has 1 marks in source_labels for 2 sentences" in caplog.text


def test_marks_that_are_neither_0_nor_1_are_refused(folder, tmp_path):
    rows = [{**row, "source_labels": ["no" if mark == 0 else "yes" for mark in row["source_labels"]]}
            for row in rows_of(folder)]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="the mark 'no'.*expected 1 for each sentence of the summary and 0"):
        open_source(data_of(tmp_path / "rows.jsonl"), "train", TASK)


def test_the_likeliest_sentences_are_chosen_in_the_order_of_the_text():
    assert TASK.chosen(np.array([0.0, 2.0, 1.0, 2.0])) == [1, 3]
    assert TASK.chosen(np.array([0.5])) == [0]


@pytest.fixture(scope="module")
def run(folder):
    model = {"vocab_size": 60, "context": T, "layers": 1, "heads": 2, "width": 8, "mlp_width": 16, "dropout": 0.0}
    cfg = Config(model=BERTConfig(head="sentences", **model), task=TASK, data=data_of(folder / "rows.jsonl"))
    return untrained(cfg, folder / "run")


def test_predicted_summaries_are_those_of_the_evaluation(run, folder, capsys):
    assert main(["predict", str(run), str(folder / "rows.jsonl")]) == 0
    found, judged = [json.loads(line) for line in capsys.readouterr().out.splitlines()], []
    for record, answer in zip(rows_of(folder), found, strict=True):
        chosen = answer["sentences"]
        assert answer["summary"] == " ".join(record["source"][i] for i in chosen)
        assert len(answer["probabilities"]) == len(record["source"])
        assert chosen == sorted(sorted(range(len(record["source"])), key=lambda i: -answer["probabilities"][i])[:2])
        judged.append(judge_summary(answer["summary"], record["target"]))
    measured = load_run(run).evaluation().measure()
    expected = np.mean(judged, 0).tolist()
    assert [measured[name] for name in ("rouge1", "rouge2", "rougeL")] == pytest.approx(expected)
    marks = np.concatenate([record["source_labels"] for record in rows_of(folder)])
    shares = np.concatenate([answer["probabilities"] for answer in found])
    assert measured["loss"] == pytest.approx(-np.log(np.where(marks, shares, 1 - shares)).mean(), abs=1e-4)
    assert measured["accuracy"] == pytest.approx(((shares > 0.5) == marks).mean())


def test_a_report_marks_the_sentences_that_are_chosen(run, folder):
    (piece,) = summaries.pieces(load_run(run).evaluation())
    for (heading, parts), record in zip(piece.texts, rows_of(folder), strict=False):
        assert heading.startswith(record["target"][0])
        assert [part for part, _ in parts[::2]] == record["source"]
        assert [mark in ("hit", "missed") for _, mark in parts[::2]] == [x == 1 for x in record["source_labels"]]
        assert sum(mark in ("hit", "said") for _, mark in parts) == 2


def test_what_does_not_fit_is_refused(folder):
    with pytest.raises(UserError, match="try BERTConfig with head sentences"):
        tasks.build(TASK, BERTConfig(), Stdlib(seq_len=T))
    with pytest.raises(UserError, match="got task.sentences 5, expected at most task.most 4"):
        Extraction(sentences=5, most=4)
    with pytest.raises(UserError, match="try --data.input-field source"):
        open_source(data_of(folder / "rows.jsonl", input_field=""), "train", TASK)
    with pytest.raises(UserError, match="begins a text with a token of its own"):
        open_source(data_of(folder / "rows.jsonl", tokenizer="bytes"), "train", TASK)


def test_sentences_are_judged_from_their_first_tokens_alone():
    config = BERTConfig(40, context=8, layers=1, heads=2, width=8, mlp_width=8, head="sentences", dropout=0.0)
    task = tasks.build(TASK, config, Stdlib(seq_len=8))
    params = task.init(jax.random.key(0))["model"]
    tokens, at = np.arange(8)[None] + 1, np.array([[0, 3, 5, 0]])
    logits = np.asarray(task.networks["model"].apply(params, tokens, at=at))
    features = np.asarray(task.networks["model"].apply(params, tokens, head=False))
    expected = features[0, at[0]] @ params["sentences"]["w"][:, 0] + params["sentences"]["b"]
    np.testing.assert_allclose(logits[0], expected, atol=1e-5)
