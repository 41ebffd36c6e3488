"""Answers of a saved run: to rows of questions as in its evaluation, and marked in a report."""

import json

import numpy as np
import pytest

from jaxmodels.cli import main
from jaxmodels.config import Config, QuestionAnswering, SQuAD
from jaxmodels.models.bert import BERTConfig
from jaxmodels.report import answers, page
from jaxmodels.tasks.overlap import judge_answer
from jaxmodels.train.saved import load_run
from tests.sections import untrained

MODEL = {"vocab_size": 60, "context": 20, "layers": 1, "heads": 2, "width": 8, "mlp_width": 16, "dropout": 0.0}
NOUNS = "river lake hill town road field wood bridge mill farm".split()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that trained nothing, and the rows of its evaluation set; half of the contexts take several windows."""
    folder, rng = tmp_path_factory.mktemp("answers"), np.random.default_rng(0)
    articles, rows = [], []
    for number in range(12):
        context = " ".join(rng.choice(NOUNS, 6 if number % 2 else 25))
        answers = [{"text": word, "answer_start": context.index(word)} for word in dict.fromkeys(context.split()[:3])]
        row = {"id": str(number), "question": "where is the naïve <b> one ?", "answers": answers}
        articles.append({"title": f"place {number}", "paragraphs": [{"context": context, "qas": [row]}]})
        rows.append({**row, "context": context})
    (folder / "set.json").write_text(json.dumps({"data": articles}))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = (str(folder / "set.json"),)
    cfg = Config(
        model=BERTConfig(head="spans", **MODEL),
        task=QuestionAnswering(overlap=4, question=8, longest=3),
        data=SQuAD(path=path, eval_path=path, tokenizer="words:60", seq_len=20, batch_size=8),
    )
    return untrained(cfg, folder / "run"), rows, folder


def said(capsys, *argv):
    code = main([str(each) for each in argv])
    printed = capsys.readouterr()
    return code, [json.loads(line) for line in printed.out.splitlines()], printed.err


def test_predicted_answers_are_those_of_the_evaluation_and_lie_in_their_contexts(run, capsys):
    directory, rows, folder = run
    code, found, _ = said(capsys, "predict", directory, folder / "rows.jsonl")
    assert code == 0 and [each["id"] for each in found] == [row["id"] for row in rows]
    judged = []
    for row, answer in zip(rows, found, strict=True):
        assert answer["answer"] == row["context"][answer["start"] : answer["end"]]
        assert 1 <= len(answer["answer"].split()) <= 3 and 0 < answer["probability"] <= 1
        judged.append(judge_answer(answer["answer"], [each["text"] for each in row["answers"]]))
    measured = load_run(directory).evaluation().measure()
    assert [measured["exact_match"], measured["f1"]] == pytest.approx(np.mean(judged, 0).tolist())
    assert 0 < measured["f1"] < 1


def test_a_row_without_a_question_or_a_context_is_named_and_the_others_are_answered(run, capsys, tmp_path):
    good = {"question": "where ?", "context": "mill farm"}
    lines = [good, {"question": "where ?"}, {**good, "context": " "}, [1], {**good, "context": 5}]
    (tmp_path / "asked.txt").write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, found, error = said(capsys, "predict", run[0], tmp_path / "asked.txt")
    assert code == 0 and "4 of 5 records could not be read" in error
    assert found[0]["answer"] and "id" not in found[0]
    told = ["has no context", "context is blank", "is not an object in JSON", "context is 5, expected text"]
    assert all(what in each["error"] for what, each in zip(told, found[1:], strict=True))
    code, _, error = said(capsys, "predict", run[0], tmp_path / "asked.txt", "--input-field", "question")
    assert code == 2 and "a model that reads several columns" in error


def test_a_report_marks_what_is_said_and_what_is_right_in_whole_contexts(run):
    directory, rows, _ = run
    contexts = {row["context"]: row["answers"] for row in rows}
    made = answers.pieces(load_run(directory).evaluation())
    assert made
    for piece in made:
        for heading, parts in piece.texts:
            right = contexts["".join(part for part, _ in parts)]
            assert heading.startswith(rows[0]["question"])
            assert any(mark in ("hit", "said") for _, mark in parts)
            at = 0
            for part, mark in parts:
                inside = any(a["answer_start"] <= at < a["answer_start"] + len(a["text"]) for a in right)
                assert (mark in ("hit", "missed")) == inside
                at += len(part)
    html = page.html(made[0], {})
    assert "&lt;b&gt;" in html and ('<mark class="hit">' in html or '<mark class="said">' in html)


def test_parts_are_cut_where_what_is_said_and_what_is_right_begin_and_end():
    assert answers.marked("abcdefgh", (2, 5), [(4, 7)]) == [
        ("ab", ""), ("cd", "said"), ("e", "hit"), ("fg", "missed"), ("h", ""),
    ]  # fmt: skip
    assert answers.marked("ab", None, []) == [("ab", "")]
