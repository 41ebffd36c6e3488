"""A run recommends what its scores say, by name and without the history; the report shows it beside what was taken."""

import csv
import json

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.cli import main
from jaxmodels.config import Config, Interactions, Metrics, NextItem, Train
from jaxmodels.models.sasrec import SASRecConfig
from jaxmodels.report import attention, recommendations
from jaxmodels.train import load_run
from tests.sections import untrained

V, DAY = 30, 86_400


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on ten users who have six items each, the last two of them after day 10."""
    folder, rng = tmp_path_factory.mktemp("shop"), np.random.default_rng(0)
    taken = [rng.permutation(V)[:6].tolist() for _ in range(10)]
    tables = {
        "log.csv": [("user", "item", "time")]
        + [(user, item, (3 * at + 1) * DAY) for user, items in enumerate(taken) for at, item in enumerate(items)],
        "items.csv": [("item", "description"), *((item, f"item no. {item}") for item in range(V))],
    }
    for name, rows in tables.items():
        with (folder / name).open("w", newline="") as file:
            csv.writer(file).writerows(rows)
    paths = {"path": (str(folder / "log.csv"),), "items": (str(folder / "items.csv"),)}
    cfg = Config(
        model=SASRecConfig(V, context=4, layers=1, width=8),
        task=NextItem(),
        data=Interactions(**paths, eval_from="1970-01-12", seq_len=4, batch_size=8),
        train=Train(steps=1),
        metrics=Metrics(every=100, progress="none", loggers=()),
    )
    return untrained(cfg, folder / "run")


def test_the_list_is_of_the_highest_scores_without_the_history(run, tmp_path, capsys):
    histories = [
        [3, 7, 9],
        ["item no. 1"],
        [3, "item no. 4", 5, 6, 7, 8],
        [],
        [3, "chair"],
        "no list",
        list(range(V - 3)),
    ]
    path = tmp_path / "histories.jsonl"
    path.write_text("\n".join(json.dumps({"items": each}) for each in histories))
    assert main(["predict", str(run), str(path)]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    opened = load_run(run)
    for past, answer in zip(
        ([3, 7, 9], [1], [3, 4, 5, 6, 7, 8], None, None, None, list(range(V - 3))), answers, strict=True
    ):
        if past is None:
            assert "expected" in answer["error"]
            continue
        logits = np.asarray(opened.apply(jnp.array([past[-4:]]), positions=jnp.arange(4 - len(past[-4:]), 4)[None]))[
            0, -1
        ]
        order = [i for i in np.argsort(-logits, kind="stable").tolist() if i not in past][:10]
        assert answer["items"] == [f"item no. {i}" for i in order]
        np.testing.assert_allclose(answer["scores"], logits[order], atol=1e-5)
    assert "did you mean" not in answers[4]["error"] and "'chair'" in answers[4]["error"]


def test_the_report_marks_what_was_taken(run):
    evaluation = load_run(run).evaluation()
    (table,) = recommendations.pieces(evaluation)
    batch = evaluation.examples(0, 10)
    assert len(table.rows) == 8
    for past, listed, missed in table.rows:
        hits = {line.split(recommendations.HIT)[1] for line in listed.split("\n") if recommendations.HIT in line}
        assert len(listed.split("\n")) == 10 and not set(past.split("\n")) & {
            line.split(". ", 1)[1] for line in listed.split("\n")
        }
        taken = hits | set(filter(None, missed.split("\n")))
        assert any(taken == {f"item no. {i}" for i in held if i >= 0} for held in batch["held"].tolist())


def test_items_are_no_pieces_of_a_text(run):
    assert attention.pieces(load_run(run).evaluation()) == []


def test_evaluation_on_what_was_trained_on_is_refused(run, capsys):
    assert main(["eval", str(run)]) == 0
    assert "ndcg@10" in capsys.readouterr().out
    assert main(["eval", str(run), "--data.eval-from", "1970-01-05"]) == 2
    assert "before data.train_until" in capsys.readouterr().err
