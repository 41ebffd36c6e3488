"""Sounds as the sources of a decoder: how their texts are laid out, and what is written of them."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import jaxmodels
from jaxmodels import tasks
from jaxmodels.config import Seq2Seq, Table
from jaxmodels.data import open_source
from jaxmodels.data.special import Special, stated
from jaxmodels.errors import UserError
from jaxmodels.generate.beam import decode
from jaxmodels.generate.speech import error_rates, plain
from jaxmodels.models.transformer import TransformerConfig
from jaxmodels.models.whisper import WhisperConfig
from tests.data.test_sounds import wav
from tests.zoo import ZOO, arrays

SMALL: WhisperConfig = ZOO["whisper"][1]
TASK = Seq2Seq(seconds=0.24)
HEARD = dataclasses.replace(SMALL, sample_rate=2000)  # no sound is as slow as the zoo's


@pytest.fixture
def spoken(tmp_path):
    """A table of three sounds, the second too long, and a tokenizer whose texts begin with two tokens."""
    from tokenizers import Tokenizer, decoders, models

    rust = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate("abc<>[")}, merges=[]))
    rust.decoder = decoders.Fuse()
    (tmp_path / "tokenizer.json").write_text(rust.to_str())
    Special(end=4, ends=(4,), start=(3, 5)).save(tmp_path)
    rows = [("a.wav", "abc", 480), ("b.wav", "a", 481), ("c.wav", "c", 40)]
    for name, _, count in rows:
        (tmp_path / name).write_bytes(wav(np.full(count, 0.5), 2000))
    lines = [json.dumps({"file": name, "text": text}) for name, text, _ in rows]
    (tmp_path / "index.jsonl").write_text("\n".join(lines))
    return Table(
        path=(str(tmp_path / "index.jsonl"),), eval_path=(str(tmp_path / "index.jsonl"),), files=("file",), seq_len=6,
        tokenizer=str(tmp_path), bad_records=1,
    )  # fmt: skip


def test_what_precedes_a_text_is_given_and_its_end_is_to_be_predicted(spoken):
    fields = tasks.build(TASK, HEARD, spoken).fields
    source = open_source(spoken, "train", TASK, vocab_size=48, fields=fields)
    batch = source.batch(np.arange(3), np.zeros(3, np.int64))
    assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {
        "inputs": ((3, 480), np.int16), "tokens": ((3, 6), np.int32), "targets": ((3, 6), np.int32),
    }  # fmt: skip
    # the sound that is too long is replaced by the next one
    assert batch["tokens"].tolist() == [[3, 5, 0, 1, 2, 0], [3, 5, 2, 0, 0, 0], [3, 5, 2, 0, 0, 0]]
    assert batch["targets"].tolist() == [[-1, 0, 1, 2, 4, -1], [-1, 2, 4, -1, -1, -1], [-1, 2, 4, -1, -1, -1]]
    assert (batch["inputs"] != 0).sum(1).tolist() == [480, 40, 40]


@pytest.mark.parametrize(
    "task, model, wrong",
    [
        (Seq2Seq(), SMALL, "got no task.seconds with WhisperConfig, .* of at most 0.24, try --task.seconds 30"),
        (Seq2Seq(seconds=0.5), SMALL, "got task.seconds 0.5 .*, try --task.seconds 0.24"),
        (TASK, TransformerConfig(layers=1), "got task.seconds 0.24 with TransformerConfig, which reads texts"),
    ],
)
def test_sounds_and_models_that_do_not_fit_together_are_refused(task, model, wrong):
    with pytest.raises(UserError, match=wrong):
        tasks.build(task, model, Table(seq_len=6))


def test_tokens_that_are_refused_are_in_no_target_or_do_not_begin_one():
    model = jaxmodels.create(SMALL)
    params = arrays(model)
    sounds = np.random.default_rng(0).normal(size=(2, 96)).astype(np.float32)
    how = {"start": (1, 2), "end": 0, "limit": 6}
    free = decode(model, params, sounds, **how).tokens[:, :6]
    never, not_first = [int(free[0, 1])], [int(free[0, 0]), int(free[1, 0])]
    found = decode(model, params, sounds, never=never, not_first=not_first, **how).tokens[:, :6]
    step = jax.jit(lambda tokens: model.apply(params, sounds, tokens))
    tokens = np.zeros((2, 8), np.int32)
    tokens[:, :2] = (1, 2)
    for at in range(1, 6):
        logits = np.array(step(tokens))[:, at]
        logits[:, never] = -np.inf
        if at == 1:
            logits[:, not_first] = -np.inf
        tokens[:, at + 1] = np.where((tokens[:, 2 : at + 1] == 0).any(1), 0, logits.argmax(1))
    np.testing.assert_array_equal(found[:, :5], tokens[:, 2:7])
    assert not np.array_equal(found, free)


@pytest.mark.parametrize(
    "told, start",
    [
        ({"no_timestamps_token_id": 9}, (3, 9)),
        ({"lang_to_id": {"<|en|>": 4, "<|de|>": 5}, "task_to_id": {"transcribe": 6, "translate": 7}}, (3, 4, 6)),
        ({"lang_to_id": {"<|en|>": 4, "<|de|>": 5}, "language": "de", "no_timestamps_token_id": 9}, (3, 5, 9)),
        ({"forced_decoder_ids": [[1, 4], [2, 6], [3, 9]], "no_timestamps_token_id": 9}, (3, 4, 6, 9)),
    ],
)
def test_a_model_that_came_in_says_what_precedes_its_texts(told, start, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "whisper", "decoder_start_token_id": 3}))
    (tmp_path / "generation_config.json").write_text(json.dumps({**told, "decoder_start_token_id": 3}))
    assert (stated(tmp_path) or {})["start"] == start
    if "language" in told:
        (tmp_path / "generation_config.json").write_text(json.dumps({**told, "language": "fr"}))
        with pytest.raises(UserError, match="got language 'fr' .*, expected a code such as en, de"):
            stated(tmp_path)


def test_error_rates_disregard_case_and_punctuation_and_count_what_is_inserted_deleted_and_replaced():
    assert plain("“I’m SORRY…  there’s no—match!”") == "i'm sorry there's no match"
    rates = error_rates(["The cat sat", "a", ""], ["the cat sat down.", "A b", "yes"])
    assert rates == pytest.approx({"wer": 3 / 7, "cer": (5 + 2 + 3) / (16 + 3 + 3)})
    assert error_rates([], []) == {}
