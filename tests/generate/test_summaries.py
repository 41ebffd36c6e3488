"""Texts of sentences with several summaries: what is trained on, what is written, and how it is judged."""

import json

import numpy as np
import pytest

from jaxmodels import cli, data
from jaxmodels.config import AdamW, Checkpoint, Config, Eval, Metrics, Seq2Seq, Synthetic, Table, Train
from jaxmodels.errors import UserError
from jaxmodels.generate import bleu
from jaxmodels.generate.judge import judge_texts
from jaxmodels.generate.translation import translated
from jaxmodels.models.transformer import TransformerConfig
from jaxmodels.tasks import build
from jaxmodels.tasks.overlap import judge_summary
from jaxmodels.train import load_run
from jaxmodels.train import run as runs

ROWS = [
    {"source": [f"the {a} is old .", f"we show a {b} ."], "target": [f"a {b} is new", f"{b} for {a}"][: 1 + i % 2]}
    for i, (a, b) in enumerate(zip("abcdefgh", "hgfedcba", strict=True))
]
MODEL = TransformerConfig(
    variant="bart", vocab_size=40, context=16, layers=1, heads=2, width=16, mlp_width=16, activation="exact_gelu"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("summaries")
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    files = {"path": (str(path),), "eval_path": (str(path),), "input_field": "source", "target_field": "target"}
    cfg = Config(
        model=MODEL,
        task=Seq2Seq(target="summary", target_len=6),
        data=Table(**files, tokenizer="words:40", seq_len=12, batch_size=8),
        optim=AdamW(peak_lr=1e-2),
        train=Train(steps=40),
        eval=Eval(batches=1),
        checkpoint=Checkpoint(every=0),
        metrics=Metrics(progress="none", loggers=()),
    )
    runs.train(cfg, folder / "run")
    return folder / "run"


def test_each_summary_makes_a_pair_with_the_sentences_as_one_text(run):
    opened = load_run(run)
    source = data.open_for(opened.config, "eval")
    batch = source.batch(np.arange(len(source)), np.zeros(len(source), int))
    decode = opened.tokenizer.decode
    end = opened.tokenizer.end
    found = [
        (decode(x[x != end][: int((a > 0).sum()) - 1]), decode(y[(y >= 0) & (y != end)]))
        for x, a, y in zip(batch["inputs"], batch["segment_ids"], batch["targets"], strict=True)
    ]
    plain = opened.tokenizer.encode_many([" ".join(row["source"]) for row in ROWS for _ in row["target"]])
    ends = opened.tokenizer.encode_many([text for row in ROWS for text in row["target"]])
    assert found == [(decode(x[:11]), decode(y[:5])) for x, y in zip(plain, ends, strict=True)]
    assert batch["inputs"].shape == (12, 12) and batch["tokens"].shape == (12, 6)


def test_summaries_are_judged_by_rouge_with_the_best_of_their_references(run, capsys):
    opened = load_run(run)
    texts = translated(opened, [" ".join(row["source"]) for row in ROWS], beams=1)
    assert any(texts) and all(len(opened.tokenizer.encode(text)) < 6 for text in texts)
    wanted = np.mean([judge_summary(text, row["target"]) for text, row in zip(texts, ROWS, strict=True)], axis=0)
    found = judge_texts(opened, beams=1)
    assert list(found) == ["rouge1", "rouge2", "rougeL"]
    np.testing.assert_allclose(list(found.values()), wanted)
    path = run.parent / "given.jsonl"
    path.write_text(json.dumps({"source": ROWS[0]["source"]}) + "\n" + json.dumps({"source": " word" * 40}) + "\n")
    capsys.readouterr()
    assert cli.main(["predict", str(run), str(path), "--beams", "1"]) == 0
    first, cut = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["summary"] == texts[0] and "summary" in cut  # as long as the model takes


def test_bleu_takes_several_references(run):
    sacrebleu = pytest.importorskip("sacrebleu")
    said, right = ["a dog runs in the park", "two men"], [["a dog ran", "a dog runs in a park"], ["two men sit"]]
    expected = sacrebleu.corpus_bleu(said, [["a dog ran", "two men sit"], ["a dog runs in a park", None]]).score
    assert bleu(said, right) == expected > bleu(said, [each[0] for each in right])


@pytest.mark.parametrize(
    ("task", "section", "wrong"),
    [
        (Seq2Seq(target_len=6), Synthetic(seq_len=20), "got texts of up to 20 tokens, expected at most model.context"),
        (Seq2Seq(target_len=20), Synthetic(seq_len=8), "got texts of up to 20 tokens, expected at most model.context"),
        (Seq2Seq(target_len=6), Table(seq_len=8, pack=True), "got task.target_len 6 with data.pack"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(task, section, wrong):
    with pytest.raises(UserError, match=wrong):
        build(task, MODEL, section)


def test_sounds_have_no_summaries():
    with pytest.raises(UserError, match=r"with task\.seconds, expected neither for sounds"):
        Seq2Seq(seconds=1.0, target="summary")
