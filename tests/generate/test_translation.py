"""Translations of texts: what the model is given, what becomes of its tokens, and BLEU."""

import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import jaxmodels
from jaxmodels.data.tokenizer import Bytes, train_bpe
from jaxmodels.errors import UserError
from jaxmodels.generate import Decoded, bleu, decode, translate_texts, translation
from jaxmodels.models.transformer import TransformerConfig

TEXTS = [
    "A dog runs.",
    "",
    "Two men in green shirts stand by a tall tree near the river.",
    "Zwei Hunde!",
    "A dog runs.",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_bpe([*TEXTS, "the dog stands near the tree"] * 3, 280, tmp_path_factory.mktemp("bpe") / "t.json")


@pytest.fixture(scope="module")
def case(tokenizer):
    model = jaxmodels.create(
        TransformerConfig(vocab_size=tokenizer.vocab_size, layers=1, heads=2, width=16, mlp_width=24)
    )
    rng = np.random.default_rng(0)
    return model, jax.tree.map(lambda leaf: 0.6 * rng.normal(size=leaf.shape).astype(np.float32), model.shapes())


def echo(seen):
    """Stands for `decode`: gives the sources back, and notes what it was given."""

    def decode(model, params, sources, *, end, limit, segment_ids, beams, alpha, early_stopping, start):
        seen.append(SimpleNamespace(sources=sources, limits=limit, ids=segment_ids))
        tokens = np.where(segment_ids, sources, end)
        return Decoded(np.pad(tokens, ((0, 0), (0, 8)), constant_values=end), np.zeros(len(tokens)))

    return decode


def test_a_text_is_translated_by_its_tokens_and_an_end(case, tokenizer):
    text = TEXTS[2]
    source = [*tokenizer.encode(text), tokenizer.end]
    row = decode(*case, [source], end=tokenizer.end, limit=2 * len(source), beams=2).tokens[0].tolist()
    got = translate_texts(*case, tokenizer, TEXTS, beams=2)
    assert got[2] == tokenizer.decode(row[: row.index(tokenizer.end)]) and len(got[2]) > 3
    assert got[0] == got[4] != got[2] and len(got) == len(TEXTS)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 64])
def test_translations_come_in_the_order_of_the_texts(tokenizer, monkeypatch, batch_size):
    seen = []
    monkeypatch.setattr(translation, "decode", echo(seen))
    assert translate_texts(None, None, tokenizer, TEXTS, batch_size=batch_size, max_ratio=1.5) == TEXTS
    lengths = [len(ids) + 1 for ids in tokenizer.encode_many(TEXTS)]
    for call in seen:
        for row, ids, limit in zip(call.sources, call.ids, call.limits, strict=True):
            n = ids.sum()
            assert (ids == (np.arange(len(ids)) < n)).all() and not row[n:].any()
            assert n == 0 or (row[n - 1] == tokenizer.end and n in lengths and limit == max(np.ceil(1.5 * n), 16))


def test_batches_have_few_shapes(tokenizer, monkeypatch):
    seen = []
    monkeypatch.setattr(translation, "decode", echo(seen))
    translate_texts(None, None, tokenizer, ["dog " * n for n in range(1, 24)], batch_size=4)
    assert len(seen) == 6 and all(len(call.sources) == 4 for call in seen)
    # the room for targets follows from the width of the sources, so that each width is one program
    rooms = {(call.sources.shape[1], -(-max(call.limits) // 16) * 16) for call in seen}
    assert all(width % 8 == 0 and room == 2 * width for width, room in rooms)


def test_nothing_is_translated_to_nothing(case, tokenizer):
    assert translate_texts(*case, tokenizer, []) == []


def test_a_mistake_is_refused(case, tokenizer):
    with pytest.raises(UserError, match=r"got tokenizer bytes \(256\), expected one with an end token, try"):
        translate_texts(*case, Bytes(), TEXTS)
    for options in ({"batch_size": 0}, {"max_ratio": 0.0}):
        with pytest.raises(UserError, match="expected batch_size >= 1, max_ratio > 0"):
            translate_texts(*case, tokenizer, TEXTS, **options)
    with pytest.raises(UserError, match="got 1 translations and 2 references, expected as many"):
        bleu(["a"], ["a", "b"])
    with pytest.raises(UserError, match="got 0 translations"):
        bleu([], [])


def test_bleu_is_that_of_the_paper_on_whole_sets():
    """Counts by hand, of both sentences: 1- to 4-grams 10 of 11, 6 of 9, 3 of 7, 1 of 5; 11 tokens for 12."""
    pytest.importorskip("sacrebleu")
    hypotheses = ["The cat sat on a mat .", "He saw it ."]
    references = ["The cat sat on the mat .", "He saw it yesterday ."]
    precision = (10 / 11 * 6 / 9 * 3 / 7 * 1 / 5) ** 0.25
    assert bleu(hypotheses, references) == pytest.approx(100 * np.exp(1 - 12 / 11) * precision)
    assert bleu(references, references) == pytest.approx(100)
    assert bleu([text.lower() for text in references], references) < 100, "case counts"


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(UserError, match=r"got no package sacrebleu.*try pip install 'jaxmodels\[text\]'"):
        bleu(["a"], ["a"])
