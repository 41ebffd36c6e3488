from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from jaxmodels.data.tokenizer import Bytes, Chars, build, load_tokenizer, pieces, train_bpe
from jaxmodels.errors import UserError

TEXT = "def café(x):\n    return '日本' + x\n\n\nclass A: pass\n"


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    texts = [TEXT * 20, "for i in range(10):\n    print(i)\n" * 50]
    return train_bpe(texts, 300, tmp_path_factory.mktemp("bpe") / "t.json")


def test_bytes_are_utf_8():
    ids = Bytes().encode(TEXT)
    assert ids.dtype == np.int32 and ids.tolist() == list(TEXT.encode())
    assert Bytes().decode(ids) == TEXT
    assert Bytes().decode(ids[:8]) == "def caf\N{REPLACEMENT CHARACTER}"
    assert Bytes().decode([97, 256, -1, 50_000, 98]) == "a" + "\N{REPLACEMENT CHARACTER}" * 3 + "b"


def test_chars_are_numbered_in_the_order_of_their_code_points():
    chars = Chars("hello\nwörld")
    assert chars.characters == "\ndehlorwö" and chars.vocab_size == 9
    ids = chars.encode("lö\n")
    assert ids.dtype == np.int32 and ids.tolist() == [4, 8, 0]
    assert chars.decode(ids) == "lö\n"
    assert chars.decode([4, 9, -1]) == "l" + "\N{REPLACEMENT CHARACTER}" * 2


@pytest.mark.parametrize("text", ["xyzé", "日本", "\udc80"])
def test_an_unknown_character_is_named(text):
    unknown = next(c for c in text if c not in "xyz")
    with pytest.raises(UserError, match="expected one of the 3 that") as error:
        Chars("xyz").encode(text)
    assert repr(unknown) in str(error.value)


def test_a_bpe_round_trips_and_is_shorter_than_bytes(bpe):
    ids = bpe.encode(TEXT)
    assert ids.dtype == np.int32 and bpe.decode(ids) == TEXT
    assert len(ids) < len(TEXT.encode()) and ids.max() < bpe.vocab_size == 300
    assert bpe.end == 0 and bpe.decode([0]) == "<|endoftext|>"
    assert bpe.decode([*ids.tolist(), 300, 50_000, -1]) == TEXT


def test_many_texts_encode_as_each_alone(bpe):
    texts = [TEXT, "", "print(1)\n", TEXT[::-1]]
    for tokenizer in (bpe, Bytes(), Chars(TEXT + "print(1)\n")):
        together = tokenizer.encode_many(texts)
        assert [x.tolist() for x in together] == [tokenizer.encode(text).tolist() for text in texts]


def test_pieces_of_a_long_text_encode_as_the_whole(bpe, monkeypatch):
    text = TEXT * 40
    whole = bpe.encode(text)
    monkeypatch.setattr("jaxmodels.data.tokenizer._PIECE", 100)
    cut = pieces(text)
    assert len(cut) > 10 and "".join(cut) == text
    assert np.array_equal(bpe.encode(text), whole)
    assert pieces("x" * 1000) == ["x" * 1000] and pieces("") == [""]


@pytest.mark.parametrize("kind", ["bytes", "chars", "bpe"])
def test_a_saved_tokenizer_comes_back(kind, bpe, tmp_path):
    tokenizer = {"bytes": Bytes(), "chars": Chars(TEXT), "bpe": bpe}[kind]
    tokenizer.save(tmp_path)
    for again in (load_tokenizer(tmp_path), build(str(tmp_path / "tokenizer.json"), lambda: [])):
        assert type(again) is type(tokenizer) and again.vocab_size == tokenizer.vocab_size
        assert again.to_json() == tokenizer.to_json()
        assert again.encode(TEXT).tolist() == tokenizer.encode(TEXT).tolist()


def test_no_tokenizer_and_no_json_are_named(tmp_path):
    with pytest.raises(UserError, match=r"got tokenizer 'char', expected bytes, chars or the path .* try chars"):
        build("char", lambda: [])
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(UserError, match=r"got .*tokenizer.json, expected a Hugging Face tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("[1, 2")
    with pytest.raises(UserError, match="expected a Hugging Face tokenizer.json"):
        load_tokenizer(tmp_path)


def test_a_vocabulary_below_the_bytes_is_refused(tmp_path):
    with pytest.raises(UserError, match="got vocab_size 256, expected at least 257"):
        train_bpe([TEXT], 256, tmp_path / "t.json")


WORDS = ["The cat sat.", "the dog ran, and the cat RAN", "a café of cats"]


@pytest.mark.parametrize(("kind", "unseen"), [("bpe:262", "zyzzyva"), ("words:30", "zyzzyva")])
def test_a_vocabulary_is_learned_from_the_texts_to_train_on_alone(kind, unseen):
    everything = [*WORDS, *[unseen] * 100]
    alone, both = (build(kind, lambda texts=texts: texts) for texts in (WORDS, everything))
    found = build(kind, lambda: everything, lambda: WORDS)
    assert found.to_json() == alone.to_json() != both.to_json()
    assert len(both.encode(unseen)) < len(unseen), "it would have been learned"


@pytest.mark.parametrize("kind", ["bpe:300", "words:12"])
def test_two_processes_learn_the_same_vocabulary(kind):
    code = f"from jaxmodels.data.tokenizer import build; print(build({kind!r}, lambda: {WORDS * 3!r}).to_json())"
    procs = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    first, second = (process.communicate(timeout=120)[0].strip() for process in procs)
    assert first == second == build(kind, lambda: WORDS * 3).to_json()


def test_bpe_of_a_config_round_trips_and_begins_a_whole_text():
    learned = build("bpe:280", lambda: WORDS)
    assert learned.vocab_size <= 280
    for text in (*WORDS, TEXT, " x\n\n"):
        assert learned.decode(learned.encode(text)) == text
        plain, special = learned.encode_many([text])[0], learned.encode_many([text], special=True)[0]
        np.testing.assert_array_equal(special, [learned.end, *plain])
    assert learned.sizes()[learned.end] == 0 and learned.sizes()[learned.encode(TEXT)].sum() == len(TEXT.encode())


def test_words_are_in_lower_case_the_frequent_ones_and_the_rest_unknown():
    learned = build("words:6", lambda: WORDS)
    assert learned.vocab_size == 6 and learned.end == 0
    assert learned.decode(learned.encode("The CAT sang")) == "the cat [UNK]"
    assert learned.encode_many(["the"], special=True)[0].tolist() == [0, *learned.encode("the").tolist()]
    assert learned.sizes() is None


@pytest.mark.parametrize("name", ["bpe:", "bpe:x", "words:-3", "words:1", "bpe:100", "bpe:8e3"])
def test_a_vocabulary_of_no_size_is_refused_in_one_line(name):
    with pytest.raises(UserError, match="^got .*, expected .*, try") as caught:
        build(name, lambda: WORDS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["bpe", "words"])
def test_a_vocabulary_that_would_end_the_process_is_refused(kind):
    with pytest.raises(UserError, match="got a vocabulary of 99,999,999,999 tokens, expected at most"):
        build(f"{kind}:99999999999", lambda: ["text"])


@pytest.mark.parametrize("kind", ["bytes", "chars", "bpe"])
def test_a_text_that_utf8_cannot_write_is_refused_in_a_line(kind, tmp_path):
    made = {
        "bytes": lambda: Bytes(),
        "chars": lambda: Chars("abc"),
        "bpe": lambda: train_bpe(["abc " * 50], 270, tmp_path / "tokenizer.json"),
    }[kind]()
    for encode in (made.encode, lambda text: made.encode_many([text], special=True)):
        with pytest.raises(UserError, match="got .*\\\\ud800.*expected"):
            encode("ab\ud800")
