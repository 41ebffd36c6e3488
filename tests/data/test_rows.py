"""Texts in rows: packed without sharing attention, pairs for teacher forcing, captions."""

import functools
import json

import jax
import numpy as np
import pytest

import jaxmodels
from jaxmodels import tasks
from jaxmodels.config import TFDS, CausalLM, Classification, MaskedLM, Stdlib, Table
from jaxmodels.data import open_pairs, open_source, texts
from jaxmodels.data import tokenizer as tokenizers
from jaxmodels.errors import UserError

END, T = 0, 12
SIZE = {"layers": 2, "width": 16, "heads": 2, "mlp_width": 24, "dropout": 0.0}


def some(count=9, longest=20, vocab_size=40, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(1, vocab_size, n).astype(np.int32) for n in rng.integers(1, longest + 1, count)]


def read(rows, field):
    """The texts of packed rows, each as a tuple."""
    found = []
    for row, marks in zip(rows[field], rows["segment_ids"], strict=True):
        found += [tuple(row[marks == k].tolist()) for k in range(1, marks.max() + 1)]
    return found


@pytest.mark.parametrize("follow", [None, END])
def test_each_token_of_each_text_is_there_exactly_once(follow):
    ids = some()
    rows = texts.packed(ids, T, follow)
    expected = [tuple(x.tolist()) for x in ids] if follow is None else [(END, *x.tolist()) for x in ids]
    pieces = [x[i : i + T] for x in expected for i in range(0, len(x), T)]
    assert sorted(read(rows, "tokens")) == sorted(pieces)
    if follow is not None:
        expected = [(*x.tolist(), END) for x in ids]
        pieces = [x[i : i + T] for x in expected for i in range(0, len(x), T)]
    assert sorted(read(rows, "targets")) == sorted(pieces)
    empty = rows["segment_ids"] == 0
    assert (rows["targets"][empty] == -1).all() and (rows["tokens"][empty] == 0).all() and empty.any()


def test_positions_begin_anew_with_each_text():
    rows = texts.packed(some(), T, END)
    assert any(marks.max() > 1 for marks in rows["segment_ids"]), "several texts share a row"
    for marks, positions in zip(rows["segment_ids"], rows["positions"], strict=True):
        for k in range(1, marks.max() + 1):
            at = np.flatnonzero(marks == k)
            assert (np.diff(at) == 1).all()
            np.testing.assert_array_equal(positions[at], np.arange(len(at)))


def test_a_plan_is_the_best_fit_the_longest_first_and_always_the_same():
    lengths = np.array([3, 7, 2, 5, 10, 5, 4])
    plan = texts.plan(lengths, 10)
    assert plan == [[4], [1, 0], [3, 5], [6, 2]] == texts.plan(lengths.copy(), 10)
    assert texts.plan(np.array([], int), 10) == []


def test_a_plan_fills_the_rows_of_real_sentences(shared_data):
    cfg = TFDS(name="multi30k", dir=str(shared_data / "tfds"), input_field="en", target_field="de")
    lengths = np.array([len(text.split()) + 1 for text in open_pairs(cfg, "eval")[0]])
    rows = texts.plan(lengths, 64)
    sums = [lengths[row].sum() for row in rows]
    assert max(sums) <= 64 and sum(sums) / (64 * len(rows)) >= 0.9 and len(lengths) > 900
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))


def apart(values, first, second):
    """Rows of a table of embeddings with and without a gradient: texts of tokens 1 to 9, and 11 to 19."""
    mine, other = (np.abs(np.asarray(values))[low:high].max(1) for low, high in (first, second))
    assert (other == 0).all(), "a text sees another one"
    assert (mine > 0).any()


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_no_text_has_a_gradient_at_another_one_s_embeddings(family):
    a, b = np.arange(1, 6, dtype=np.int32), np.arange(11, 15, dtype=np.int32)
    if family == "gpt2":
        model = jaxmodels.create("gpt2", vocab_size=20, context=T, layers=2, width=16, heads=2, dropout=0.0)
        rows = texts.packed([a, b], T, END)
    else:
        model = jaxmodels.create("bert", vocab_size=20, context=T, head="none", **SIZE)
        rows = texts.packed([a, b], T, None)
    assert rows["tokens"].shape == (1, T)
    params = model.init(jax.random.key(0))
    weights = jax.random.normal(jax.random.key(1), (T, 16))

    @jax.jit
    def gradient(params, which):
        def total(params):
            how = {"head": False} if family == "gpt2" else {}
            given = {name: rows[name] for name in ("segment_ids", "positions")}
            out = model.apply(params, rows["tokens"], **given, **how)
            out = out if family == "gpt2" else out[0]
            return (out[0] * weights * (rows["segment_ids"][0] == which)[:, None]).sum()

        return jax.grad(total)(params)["embed"]["w"]

    apart(gradient(params, 1), (1, 6), (11, 15))
    apart(gradient(params, 2), (11, 15), (1, 6))


def test_no_pair_has_a_gradient_at_another_one_s_embeddings():
    a, b = np.arange(1, 5, dtype=np.int32), np.arange(11, 14, dtype=np.int32)
    rows = texts.translations([a, b], [a[::-1], b], T, END, pack=True)
    assert rows["inputs"].shape == (1, T) and rows["target_segment_ids"].max() == 2
    model = jaxmodels.create("transformer", vocab_size=20, **SIZE)
    params = model.init(jax.random.key(0))
    ids = {name: rows[name] for name in ("segment_ids", "target_segment_ids")}
    weights = jax.random.normal(jax.random.key(1), (T, 16))

    @jax.jit
    def gradient(params, which):
        def total(params):
            out = model.apply(params, rows["inputs"], rows["tokens"], head=False, **ids)
            return (out[0] * weights * (rows["target_segment_ids"][0] == which)[:, None]).sum()

        return jax.grad(total)(params)

    for which, mine, other in ((1, (1, 5), (11, 14)), (2, (11, 14), (1, 5))):
        apart(gradient(params, which)["embed"]["w"], mine, other)


def test_the_loss_of_a_packed_row_is_that_of_its_texts_alone():
    config = jaxmodels.create("gpt2", vocab_size=40, context=T, layers=2, width=16, heads=2, dropout=0.0).config
    task = tasks.build(CausalLM(), config, Stdlib(seq_len=T))
    params = {"model": task.networks["model"].init(jax.random.key(0))}
    measure = jax.jit(task.metrics)
    ids = [x[:4] for x in some(count=4)]
    together = texts.packed(ids, T, END)
    alone = [texts.packed([x], T, END) for x in ids]
    alone = {name: np.concatenate([rows[name] for rows in alone]) for name in together}
    assert len(together["tokens"]) < len(alone["tokens"]) == 4
    a, b = (measure(params, {}, rows)["loss"] for rows in (together, alone))
    assert float(a[0]) == pytest.approx(float(b[0]), rel=1e-5) and int(a[1]) == int(b[1]) == sum(map(len, ids)) + 4


def test_packed_texts_to_evaluate_on_know_the_bytes_that_their_targets_stand_for(tmp_path):
    held_out = ["the café is full of cats", "and so was the other one, with all its chairs and tables"]
    for i, text in enumerate(["the cat sat on the mat"] * 3 + held_out):
        (tmp_path / f"{i}.jsonl").write_text(json.dumps({"text": text}) + "\n")
    paths = [str(tmp_path / f"{i}.jsonl") for i in range(5)]
    cfg = Table(path=tuple(paths[:3]), eval_path=tuple(paths[3:]), tokenizer="bpe:270", pack=True, seq_len=T)
    opened = {split: open_source(cfg, split, CausalLM(), vocab_size=270) for split in ("train", "eval")}
    rows = opened["eval"].batch(np.arange(len(opened["eval"])), np.zeros(len(opened["eval"]), int))
    real = rows["targets"] >= 0
    assert rows["bytes"][real].sum() == sum(len(text.encode()) for text in held_out) < real.size * 2
    config = jaxmodels.create("gpt2", vocab_size=270, context=T, layers=1, width=16, heads=2, dropout=0.0).config
    task = tasks.build(CausalLM(), config, cfg)
    found = jax.jit(task.metrics)({"model": task.networks["model"].init(jax.random.key(0))}, {}, rows)
    bits, counted = map(float, found["bits_per_byte"])
    assert bits == pytest.approx(float(found["loss"][0]) / np.log(2)) and counted == rows["bytes"][real].sum()
    assert "bytes" not in opened["train"].batch(np.arange(1), np.zeros(1, int))
    masked = open_source(cfg, "eval", MaskedLM(), vocab_size=270)
    assert "bytes" not in masked.batch(np.arange(1), np.zeros(1, int)), "only what predicts every byte has bits a byte"


def test_texts_are_balanced_in_training_alone_and_only_where_they_have_labels(tmp_path):
    file = tmp_path / "some.jsonl"
    rows = [{"text": f"text {i}", "label": "rare" if i < 4 else "common"} for i in range(40)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = Table(path=(str(file),), eval_fraction=0.3, balance=True, seq_len=8)
    train, held_out = (open_source(cfg, split, Classification(), vocab_size=256) for split in ("train", "eval"))
    labels = train.batch(np.arange(len(train)), np.zeros(len(train), int))["labels"]
    assert np.ptp(np.bincount(labels)) == 0 and len(train) + len(held_out) > 40
    assert isinstance(held_out, texts.Rows)
    with pytest.raises(UserError, match="got none without a label, expected one class each, try --data.balance False"):
        texts.Rows({"inputs": np.zeros((2, 3))}, split="train", label="none").labels()


@pytest.mark.parametrize("pack", [False, True])
def test_pairs_are_laid_out_for_teacher_forcing(pack):
    rows = texts.translations([np.int32([5, 6, 7]), np.int32([8])], [np.int32([9]), np.int32([3, 4])], 8, END, pack)
    if pack:
        assert {name: x.tolist() for name, x in rows.items()} == {
            "inputs": [[5, 6, 7, END, 8, END, 0, 0]],
            "segment_ids": [[1, 1, 1, 1, 2, 2, 0, 0]],
            "tokens": [[END, 9, END, 3, 4, 0, 0, 0]],
            "targets": [[9, END, 3, 4, END, -1, -1, -1]],
            "target_segment_ids": [[1, 1, 2, 2, 2, 0, 0, 0]],
        }
    else:
        assert rows["inputs"].tolist() == [[5, 6, 7, END, 0, 0, 0, 0], [8, END, 0, 0, 0, 0, 0, 0]]
        assert rows["tokens"][1].tolist() == [END, 3, 4, 0, 0, 0, 0, 0]
        assert rows["targets"][1].tolist() == [3, 4, END, -1, -1, -1, -1, -1]
        assert rows["target_segment_ids"].max() == 1


def test_pairs_that_are_too_long_are_cut_and_still_end():
    rows = texts.translations([np.arange(1, 20, dtype=np.int32)], [np.arange(1, 30, dtype=np.int32)], 6, END, False)
    assert rows["inputs"].tolist() == [[1, 2, 3, 4, 5, END]]
    assert rows["tokens"].tolist() == [[END, 1, 2, 3, 4, 5]] and rows["targets"].tolist() == [[1, 2, 3, 4, 5, END]]


def test_single_texts_are_cut_or_filled_up():
    rows = texts.single([np.int32([4, 5, 6]), np.int32([7]), np.int32([])], 2)
    assert rows["inputs"].tolist() == [[4, 5], [7, 0], [0, 0]]
    assert rows["segment_ids"].tolist() == [[1, 1], [1, 0], [0, 0]]


@functools.cache
def captioned(seq_len=6):
    names = ("zero", "one", "two")
    arrays = {"inputs": np.zeros((7, 2, 2, 1), np.uint8), "labels": np.int32([0, 1, 2, 2, 1, 0, 1])}
    images = texts.Rows(arrays, split="train", label="digits", classes=names, what="images")
    captions = [template.format(name) for name in names for template in ("the digit {}", "a {}")]
    tokenizer = tokenizers.build("words:32", lambda: captions)
    return texts.Captioned(images, captions, tokenizer, seq_len)


def test_captions_are_of_the_image_s_class_and_another_one_each_epoch():
    source = captioned()
    at = np.arange(7)
    seen = []
    for epoch in range(3):
        batch = source.batch(at, np.full(7, epoch))
        assert set(batch) == {"images", "tokens", "segment_ids", "labels", "classes"}
        np.testing.assert_array_equal(batch["classes"], source.images.arrays["labels"])
        lengths = batch["segment_ids"].sum(1)
        assert all(x[n - 1] == source.tokenizer.end for x, n in zip(batch["tokens"], lengths, strict=True))
        said = [source.tokenizer.decode(x[: n - 1]) for x, n in zip(batch["tokens"], lengths, strict=True)]
        classes = [source.class_names[k] for k in batch["classes"]]
        assert all(text.split()[-1] == name for text, name in zip(said, classes, strict=True))
        seen.append(said)
    assert all(a != b for a, b in zip(seen[0], seen[1], strict=True)) and seen[0] == seen[2]
    assert len({len(text.split()) for text in seen[0]}) == 2, "both forms in one epoch"


def test_captions_that_say_the_same_of_every_class_are_refused():
    assert texts.filled(("a {label}", "the {label}"), ("x", "y")) == ["a x", "the x", "a y", "the y"]
    assert texts.filled(("a photo",), ("x",)) == ["a photo"]
    with pytest.raises(UserError, match="got captions 'a {label}' 'a photo', expected {label} in each"):
        texts.filled(("a {label}", "a photo"), ("x", "y"))


def test_captions_that_are_too_long_are_refused():
    with pytest.raises(
        UserError, match="got captions of up to 4 tokens, expected at most data.seq_len 3, try shorter ones"
    ):
        captioned(3)


def test_no_rows_are_refused():
    with pytest.raises(UserError, match="got no texts to eval on"):
        texts.Rows({"inputs": np.zeros((0, 3), np.int32)}, split="eval", label="none")


def test_fingerprints_know_the_rows():
    a, b = ({"inputs": np.full((2, 3), k, np.int32)} for k in (1, 2))
    first, same, other = (texts.Rows(x, split="train", label="x").fingerprint for x in (a, dict(a), b))
    assert first == same != other
