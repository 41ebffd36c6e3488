from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from jaxmodels.data import spec, unigram_loss
from jaxmodels.data.source import Windows, blocks, fingerprint, shift
from jaxmodels.data.tokenizer import Bytes
from jaxmodels.errors import UserError


def every(source: Windows, epoch: int = 0) -> dict[str, np.ndarray]:
    indices = np.arange(len(source))
    return source.batch(indices, np.full_like(indices, epoch))


@pytest.mark.parametrize("lengths", [[2], [9], [16], [17], [18], [1000], [100, 2, 33, 1, 0, 17]])
def test_evaluation_predicts_each_token_but_the_first_once(lengths):
    total = np.cumsum([0, *lengths])
    arrays = [np.arange(a, b, dtype=np.uint16) for a, b in itertools.pairwise(total)]
    rows = every(Windows(arrays, 16, split="eval", label="numbers"))
    expected = np.concatenate([a[1:] for a in arrays])
    real = rows["targets"] >= 0
    assert np.array_equal(rows["targets"][real], expected)
    assert np.array_equal(rows["tokens"][real], expected - 1)
    assert rows["tokens"].min() >= 0 and (rows["targets"][~real] == -1).all()
    assert rows["tokens"].dtype == rows["targets"].dtype == np.int32


@pytest.mark.parametrize("epoch", range(6))
def test_training_windows_are_consecutive_and_start_at_the_epoch_s_shift(epoch):
    source = Windows([np.arange(1003, dtype=np.uint16)], 16, split="train", label="numbers")
    rows = every(source, epoch)
    begin = int(shift(np.array([epoch]), 16)[0])
    assert np.array_equal(rows["tokens"].reshape(-1), begin + np.arange(len(source) * 16))
    assert np.array_equal(rows["targets"], rows["tokens"] + 1)
    assert 1003 - rows["targets"].size < 2 * 16


def test_shifts_spread_over_the_window():
    shifts = shift(np.arange(256), 256)
    assert shifts[0] == 0 and shifts.min() >= 0 and shifts.max() < 256
    assert len(np.unique(shifts)) > 150
    assert np.bincount(shifts // 32, minlength=8).tolist() == pytest.approx([32] * 8, abs=2)


def test_several_files_give_windows_that_never_cross_from_one_to_the_next():
    parts = [np.arange(a, b, dtype=np.uint16) for a, b in [(0, 100), (1000, 1010), (2000, 2333)]]
    source = Windows(parts, 16, split="train", label="numbers")
    rows = every(source, 1)
    assert len(source) == 100 // 16 - 1 + 333 // 16 - 1
    assert np.array_equal(rows["targets"], rows["tokens"] + 1)


def test_too_few_tokens_are_refused():
    with pytest.raises(UserError, match=r"got 31 tokens to train on \(numbers\), expected at least 32"):
        Windows([np.arange(31, dtype=np.uint16)], 16, split="train", label="numbers")
    with pytest.raises(UserError, match=r"got 1 tokens to eval on"):
        Windows([np.arange(1, dtype=np.uint16)], 16, split="eval", label="numbers")


def test_the_fingerprint_changes_with_data_tokenizer_length_and_split():
    a = np.arange(1000, dtype=np.uint16) % 256
    b = a.copy()
    b[500] ^= 1
    made = [
        Windows([a], 16, split="train", label="x"),
        Windows([b], 16, split="train", label="x"),
        Windows([a], 8, split="train", label="x"),
        Windows([a], 16, split="eval", label="x"),
        Windows([a], 16, split="train", label="x", tokenizer=Bytes()),
    ]
    assert len({source.fingerprint for source in made}) == len(made)
    assert Windows([a.copy()], 16, split="train", label="elsewhere").fingerprint == made[0].fingerprint


def test_a_large_array_is_known_by_blocks_from_beginning_to_end(monkeypatch):
    monkeypatch.setattr("jaxmodels.data.source._WHOLE", 1 << 20)
    array = np.zeros(1 << 22, np.uint16)
    assert len(blocks(array)) == 256 and sum(b.nbytes for b in blocks(array)) == 1 << 22
    before = fingerprint([array])
    for place in (0, len(array) - 1):
        array[place] = 1
        after = fingerprint([array])
        assert after != before
        before = after


def test_unigram_loss_is_the_entropy_where_both_texts_are_alike():
    tokens = np.tile(np.array([0, 0, 0, 1], np.uint8), 25_000)
    train = Windows([tokens], 16, split="train", label="x")
    held_out = Windows([tokens], 16, split="eval", label="x")
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert unigram_loss(train, held_out) == pytest.approx(entropy, abs=1e-4)
    other = Windows([1 - tokens], 16, split="eval", label="x")
    assert unigram_loss(train, other) == pytest.approx(-(0.25 * math.log(0.75) + 0.75 * math.log(0.25)), abs=1e-4)


def test_the_spec_is_the_batch():
    source = Windows([np.arange(1000, dtype=np.uint16)], 16, split="train", label="x")
    batch = source.batch(np.arange(5), np.zeros(5, np.int64))
    stated = spec(source, 5)
    assert {k: (v.shape, v.dtype) for k, v in stated.items()} == {k: (v.shape, v.dtype) for k, v in batch.items()}
