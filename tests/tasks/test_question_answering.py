"""Answers in texts: windows and their tokens, the best span, windows joined, and what is measured."""

import dataclasses
import json
import logging

import jax
import numpy as np
import pytest

from jaxmodels import tasks
from jaxmodels.config import Config, QuestionAnswering, SQuAD, Stdlib
from jaxmodels.data import open_source
from jaxmodels.data import questions as asked
from jaxmodels.data.contract import IGNORED
from jaxmodels.data.questions import FIRST, NOWHERE, WITHIN, Windowing
from jaxmodels.data.tokenizer import build
from jaxmodels.data.values import Span
from jaxmodels.errors import UserError
from jaxmodels.models.bert import BERTConfig
from jaxmodels.tasks.overlap import judge_answer
from jaxmodels.tasks.question_answering import best
from jaxmodels.train.job import assemble
from tests.zoo import arrays

WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau".split()
TASK = QuestionAnswering(overlap=3, question=4, longest=3)
T = 14


def passage(number):
    """A passage of which each word occurs once, and questions about words in it."""
    words = [WORDS[(number + 3 * i) % len(WORDS)] for i in range(12 + number % 4)]
    context = " ".join(f"{word}," if i % 5 == 2 else word for i, word in enumerate(words))
    answers = [words[1], f"{words[8]} {words[9]}"]
    qas = [
        {"question": f"what is {text} ?", "id": f"{number}-{k}", "answers": [{"text": text, "answer_start": at}]}
        for k, text in enumerate(answers)
        if (at := context.find(text)) >= 0
    ]
    return {"context": context, "qas": qas}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    articles = [{"title": f"article {n}", "paragraphs": [passage(2 * n), passage(2 * n + 1)]} for n in range(8)]
    path = tmp_path_factory.mktemp("squad") / "train.json"
    path.write_text(json.dumps({"version": "1.1", "data": articles}))
    return path


@pytest.fixture(scope="module")
def tokenizer():
    return build("words:100", lambda: [" ".join([*WORDS, "what is ? , 's"])])


def data_of(path, **fields):
    return SQuAD(path=(str(path),), **{"tokenizer": "words:100", "seq_len": T, "batch_size": 4, **fields})


def opened(path, split="train", task=TASK, **fields):
    return open_source(data_of(path, **fields), split, task)


def rewritten(file, tmp_path, change):
    """The file with a change of its first passage."""
    values = json.loads(file.read_text())
    change(values["data"][0]["paragraphs"][0])
    (tmp_path / "changed.json").write_text(json.dumps(values))
    return tmp_path / "changed.json"


def test_windows_hold_every_token_of_the_context_and_say_where_it_is(tokenizer):
    context = passage(3)["context"]
    (windows,) = asked.windower(tokenizer, Windowing(T, 3, 4))([("what is mu ?", context)])
    assert len(windows) > 2
    (end,) = tokenizer.ids(["<|endoftext|>"])
    places = []
    for window, following in zip(windows, [*windows[1:], None], strict=True):
        inner = window.inner
        question = tokenizer.encode("what is mu ?").tolist()
        assert window.ids.tolist() == [end, *question, end, *window.ids[inner].tolist(), end]
        assert window.types.tolist() == [0] * 6 + [1] * (len(inner) + 1) and len(window.ids) <= T
        for token in inner:
            start, stop = window.places[token]
            assert tokenizer.encode(context[start:stop]).tolist() == [window.ids[token]]
        places += window.places[inner].tolist()
        if following is not None:
            assert window.places[inner][-3:].tolist() == following.places[following.inner][:3].tolist()
    every = sorted(map(tuple, places))
    assert "".join(context[a:b] for a, b in dict.fromkeys(every)) == context.replace(" ", "")


def test_a_token_begins_an_answer_only_in_the_window_with_the_most_around_it(tokenizer):
    (windows,) = asked.windower(tokenizer, Windowing(T, 4, 4))([("what ?", passage(3)["context"])])
    first: dict = {}
    for number, (window, may) in enumerate(zip(windows, asked.beginnings(windows), strict=True)):
        assert (may[window.inner] != NOWHERE).all() and (may[window.types == 0] == NOWHERE).all() and not may[-1]
        for order, token in enumerate(window.inner):
            room = min(order, len(window.inner) - 1 - order) + 0.01 * len(window.inner)
            first.setdefault(tuple(window.places[token]), []).append((room, number, may[token]))
    for each in first.values():
        most = max(room for room, *_ in each)
        (chosen,) = [number for _, number, may in each if may == FIRST]
        assert chosen == next(number for room, number, _ in each if room == most)
        assert all(may == WITHIN for _, number, may in each if number != chosen)


def test_targets_are_the_tokens_of_the_answer_and_the_first_token_where_a_window_lacks_it(file):
    source, seen = opened(file), set()
    batch = source.batch(np.arange(len(source)), np.zeros(len(source), int))
    for row, (start, end) in enumerate(zip(batch["starts"], batch["ends"], strict=True)):
        question = source.questions[source.of[row]]
        (answer,) = question.answers
        if (start, end) == (0, 0):
            assert asked.locate(source.windows[row], answer) is None
            continue
        seen.add(source.of[row])
        assert source.text(asked.Answer(row, (start, end), 1.0)) == answer.text
    assert seen == set(range(len(source.questions))), "a window has each answer"


def test_an_answer_within_a_token_is_learned_with_all_of_it_and_told(file, tmp_path, caplog):
    def change(passage):
        answer = passage["qas"][0]["answers"][0]
        answer.update(text=answer["text"][1:], answer_start=answer["answer_start"] + 1)

    path = rewritten(file, tmp_path, change)
    with caplog.at_level(logging.WARNING, "jaxmodels"):
        source = opened(path, eval_path=(str(file),))
    assert "1 of 32 answers" in caplog.text and "within a token" in caplog.text
    row = next(row for row in range(len(source)) if source.arrays["starts"][row] > 0)
    tokens = (source.arrays["starts"][row], source.arrays["ends"][row])
    assert source.text(asked.Answer(row, tokens, 1.0)) == passage(0)["qas"][0]["answers"][0]["text"]


def test_an_answer_that_no_window_holds_is_not_learned_and_told(file, tmp_path, caplog):
    def change(passage):
        passage["qas"][0]["answers"] = [{"text": passage["context"], "answer_start": 0}]

    path = rewritten(file, tmp_path, change)
    with caplog.at_level(logging.WARNING, "jaxmodels"):
        source = opened(path, eval_path=(str(file),))
    assert "1 of 32 answers" in caplog.text and "not learned" in caplog.text
    assert (source.arrays["starts"][source.of == 0] == IGNORED).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answers": [{"text": "elsewhere", "answer_start": 3}]}, "has the answer 'elsewhere' at 3"),
        ({"answers": []}, "has no answer, which --task.unanswerable True allows"),
        ({"answers": [{"text": "x"}]}, "has no answer_start"),
        ({"answers": [{"text": "x", "answer_start": "3"}]}, "expected a part of a text and a number"),
        ({"is_impossible": True}, "has 1 answers and is_impossible True, which differ"),
        ({"question": 5}, "question is 5, expected text"),
    ],
)
def test_a_question_that_is_not_right_is_left_out_and_named(file, tmp_path, caplog, change, message):
    path = rewritten(file, tmp_path, lambda passage: passage["qas"][0].update(change))
    with caplog.at_level(logging.WARNING, "jaxmodels"):
        source = opened(path, eval_path=(str(file),))
    assert len(source.questions) == 31
    assert message in caplog.text and "question 0-0" in caplog.text


def test_articles_are_held_out_whole(file):
    records = [data_of(file, eval_fraction=0.4).records(split) for split in ("train", "eval")]
    assert sum(map(len, records)) == 32
    titles = [{row["title"] for row in each.read(range(len(each)), ["title"])} for each in records]
    assert not titles[0] & titles[1] and len(titles[0] | titles[1]) == 8


def test_the_best_span_is_the_best_of_all_that_may_be(longest=4):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(6, 9, 2)).astype(np.float32)
    may = rng.integers(0, 3, (6, 9)).astype(np.int32)
    may[0] = FIRST
    found = jax.jit(best, static_argnums=2)(logits, may, longest)
    for row in range(6):
        spans = {
            (a, b): logits[row, a, 0] + logits[row, b, 1]
            for a in range(9)
            for b in range(a, min(a + longest, 9))
            if may[row, a] == FIRST and may[row, b] != NOWHERE
        }
        if not spans:
            assert found.score[row] < -1e29
            continue
        assert (int(found.first[row]), int(found.last[row])) == max(spans, key=spans.__getitem__)
        assert found.score[row] == pytest.approx(max(spans.values()), abs=1e-5)
        assert found.total[row] == pytest.approx(np.logaddexp.reduce(list(spans.values())), abs=1e-5)
        assert found.none[row] == pytest.approx(logits[row, 0].sum(), abs=1e-5)


def kept(**columns):
    rows = len(columns["score"])
    usual = {name: np.arange(rows) + k for k, name in enumerate(("first", "last"))}
    columns = {"total": columns["score"], "none": np.full(rows, -9.0), "window": np.arange(rows), **usual, **columns}
    return {name: np.asarray(x) for name, x in columns.items()}


def test_a_question_has_the_best_answer_of_its_windows():
    rows = kept(score=[1.0, 3.0, 2.0], total=[1.0, 3.0, 4.0])
    found = TASK.join(rows, np.array([5, 2, 5]))
    assert {question: each.window for question, each in found.items()} == {2: 1, 5: 2}
    assert found[2].tokens == (1, 2) and found[2].probability == pytest.approx(1)
    assert found[5].probability == pytest.approx(np.exp(2 - np.logaddexp(1, 4)))


def test_of_no_windows_there_are_no_answers():
    assert TASK.join(kept(score=np.zeros(0)), np.array([0])) == {}


def test_a_question_has_no_answer_where_no_window_has_one():
    task = dataclasses.replace(TASK, unanswerable=True)
    rows, of = kept(score=[1.0, 0.0], none=[3.0, 2.0]), np.array([0, 0])
    assert task.join(rows, of)[0].tokens is None
    assert dataclasses.replace(task, margin=1.5).join(rows, of)[0].tokens is not None
    assert task.join({**rows, "none": np.array([3.0, 0.5])}, of)[0].tokens is not None, "one window has it"
    assert TASK.join(rows, of)[0].tokens is not None


@pytest.mark.parametrize("unanswerable", [False, True])
def test_what_is_measured_of_a_set_is_that_of_each_question_by_itself(file, tmp_path, unanswerable):
    """With questions of several windows, by group, and with a last batch that is filled up."""
    task = dataclasses.replace(TASK, unanswerable=unanswerable)
    path = file if not unanswerable else rewritten(file, tmp_path, lambda p: p["qas"][0].update(answers=[]))
    model = BERTConfig(vocab_size=40, context=T, layers=1, heads=2, width=8, mlp_width=16, head="spans", dropout=0.0)
    data = data_of(path, eval_path=(str(path),), group_field="title")
    job = assemble(Config(model=model, task=task, data=data), jax.devices()[:1])
    source = job.sources["eval"]
    params = arrays(job.task.networks["model"])
    batches = []
    for at in range(0, len(source), 5):
        here = np.minimum(np.arange(at, at + 5), len(source) - 1)
        weight = (np.arange(at, at + 5) < len(source)).astype(np.float32)
        batches.append({**source.batch(here, np.zeros(5, int)), "weight": weight})
    found = job.evaluation()({"model": params}, {}, batches)

    logits = np.asarray(jax.jit(job.task.networks["model"].apply)(params, source.arrays["tokens"],
        types=source.arrays["types"], segment_ids=source.arrays["segment_ids"]), np.float64)  # fmt: skip
    judged = {}
    for number, question in enumerate(source.questions):
        spans = {}
        for row in np.flatnonzero(source.of == number):
            may = source.arrays["may"][row]
            for a in np.flatnonzero(may == FIRST):
                for b in range(a, min(a + task.longest, T)):
                    if may[b] != NOWHERE:
                        text = question.context[source.windows[row].places[a, 0] : source.windows[row].places[b, 1]]
                        spans[text, row, a] = logits[row, a, 0] + logits[row, b, 1]
        (text, *_), score = max(spans.items(), key=lambda item: item[1])
        none = min(logits[row, 0].sum() for row in np.flatnonzero(source.of == number))
        text = "" if unanswerable and none > score else text
        judged[number] = judge_answer(text, [each.text for each in question.answers])
    exact, f1 = np.mean(list(judged.values()), 0)
    assert 0 < f1 < 1
    assert (found["exact_match"], found["f1"]) == (pytest.approx(exact), pytest.approx(f1))
    assert found["group/article 3/f1"] == pytest.approx(np.mean([judged[n][1] for n in range(12, 16)]))
    assert found["loss"] > 0 and 0 <= found["accuracy"] <= 1


def test_a_metric_of_a_set_can_choose_the_best_checkpoint(file):
    from jaxmodels.config import Checkpoint, Eval

    model = BERTConfig(vocab_size=40, context=T, layers=1, heads=2, width=8, mlp_width=16, head="spans")
    how = {"task": TASK, "data": data_of(file, eval_fraction=0.4, batch_size=8), "checkpoint": Checkpoint(best=True)}
    assemble(Config(model=model, eval=Eval(every=1, metric="eval/f1", mode="max"), **how)).check_metric()
    with pytest.raises(UserError, match="expected max"):
        assemble(Config(model=model, eval=Eval(every=1, metric="eval/f1", mode="min"), **how)).check_metric()


@pytest.mark.parametrize(
    ("task", "model", "message"),
    [
        (TASK, BERTConfig(), "with head masked_lm"),
        (TASK, BERTConfig(head="spans", context=8), "--model.context 14"),
        (QuestionAnswering(longest=15), BERTConfig(head="spans"), "got task.longest 15, expected at most .*seq_len 14"),
    ],
)
def test_models_that_cannot_answer_are_refused(task, model, message):
    with pytest.raises(UserError, match=message):
        tasks.build(task, model, Stdlib(seq_len=T))


def test_what_leaves_no_room_for_a_context_or_says_nothing_of_pairs_is_refused(file, tokenizer):
    with pytest.raises(UserError, match="try --data.seq-len"):
        asked.windower(tokenizer, Windowing(10, 3, 4))
    with pytest.raises(UserError, match="before, between and behind two texts"):
        opened(file, tokenizer="bytes")
    with pytest.raises(UserError, match="expected both or neither"):
        QuestionAnswering(margin=1.0)
    assert asked.locate(asked.Window(*np.zeros((2, 3), int), np.full((3, 2), -1)), Span("x", 0)) is None
