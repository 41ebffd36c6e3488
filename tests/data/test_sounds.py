"""Sounds are decoded to samples of one rate; those that cannot be read are bad records by name."""

from __future__ import annotations

import io
import json
import logging
import struct
import sys
import wave
from pathlib import Path

import numpy as np
import pytest

from jaxmodels import tasks
from jaxmodels.config import Table, Transcription
from jaxmodels.data import open_source
from jaxmodels.data.records import Sound
from jaxmodels.data.sounds import Unreadable, decode, samples_of
from jaxmodels.errors import UserError
from jaxmodels.models.wav2vec2 import Wav2Vec2Config

RATE = 4000


def wav(samples: np.ndarray, rate: int = RATE, width: int = 2) -> bytes:
    """A WAV file of floats (N,) or (N, channels)."""
    samples = np.atleast_2d(samples.T).T
    whole = np.rint(samples * 2 ** (8 * width - 1)).astype(np.int64) + (128 if width == 1 else 0)
    raw = np.stack([(whole >> 8 * k) & 0xFF for k in range(width)], -1).astype(np.uint8)
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((samples.shape[1], width, rate, 0, "NONE", ""))
        file.writeframes(raw.tobytes())
    return buffer.getvalue()


def tone(seconds: float, frequency: float = 440.0, rate: int = RATE) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_whole_numbers_of_any_width_are_read_by_the_standard_library(width, monkeypatch):
    monkeypatch.setitem(sys.modules, "soundfile", None)
    x = np.array([0.0, 0.5, -0.25, -1.0])
    assert samples_of(wav(x, width=width), RATE).tolist() == [0, 16384, -8192, -32768]
    two = samples_of(wav(np.stack([x, [0.5] * 4], 1), width=width), RATE)
    assert two.tolist() == [8192, 16384, 4096, -8192], "the mean of the channels"


@pytest.mark.parametrize("whole, samples", [(0xFFFFFFFF, 0xFFFFFFFF), (0x7FFFF024, 0x7FFFF000), (0, 0), (36, 0)])
def test_a_wav_file_of_unknown_length_as_pipes_write_it_is_read_to_its_end(whole, samples):
    for more in (b"", b"LIST\x04\0\0\0INFO"):  # ffmpeg's comes before the samples
        piped = wav(tone(0.1))
        piped = b"RIFF" + struct.pack("<I", whole + len(more) * (whole == 36)) + piped[8:36] + more
        piped += b"data" + struct.pack("<I", samples) + wav(tone(0.1))[44:]
        np.testing.assert_array_equal(samples_of(piped, RATE), samples_of(wav(tone(0.1)), RATE))


def test_a_wav_file_without_samples_is_not_taken_for_one_of_unknown_length():
    listed = wav(np.zeros(0)) + b"LIST\x04\0\0\0INFO"
    with pytest.raises(Unreadable, match="holds no samples"):
        samples_of(b"RIFF" + struct.pack("<I", len(listed) - 8) + listed[8:], RATE)


def test_flac_is_what_wav_is_and_needs_a_package(monkeypatch):
    soundfile = pytest.importorskip("soundfile", reason="needs the audio extra")
    buffer, x = io.BytesIO(), tone(0.1)
    soundfile.write(buffer, x, RATE, format="FLAC", subtype="PCM_16")
    np.testing.assert_allclose(samples_of(buffer.getvalue(), RATE), samples_of(wav(x), RATE), atol=1)
    assert decode(buffer.getvalue()).rate == RATE
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(UserError, match=r"expected the package soundfile for it, try pip install 'jaxmodels\[audio\]'"):
        samples_of(buffer.getvalue(), RATE)


def test_another_rate_keeps_a_tone_and_takes_away_what_it_cannot_hold():
    there = samples_of(wav(tone(0.5)), 2 * RATE) / 32768
    np.testing.assert_allclose(there[200:-200], tone(0.5, rate=2 * RATE)[200:-200], atol=2e-3)
    high = samples_of(wav(tone(0.5, 1500.0)), RATE // 2)
    assert len(high) == RATE // 4 and np.abs(high[100:-100]).max() < 200
    assert samples_of(Sound(np.ones((4, 2), np.float32), RATE), RATE).tolist() == [32767] * 4


@pytest.mark.parametrize(
    "damage, why",
    [
        (lambda data: data[:-100], "ends after"),
        (lambda data: data[:20], "is no WAV file that can be decoded"),
        (lambda data: wav(np.zeros(0)), "holds no samples"),
        (lambda data: wav(tone(0.1), 1 << 30), "has 1,073,741,824 samples a second, expected 1,000 to 400,000"),
        (lambda data: b"no sound", r"is no sound that can be decoded \(Format not"),
        (lambda data: Sound(500 * np.ones((9, 1), np.float32), RATE), "holds samples of up to 500, expected -1 to 1"),
        (lambda data: flac()[:-300], "is no sound that can be decoded|ends after"),
    ],
)
def test_what_is_damaged_says_why(damage, why):
    with pytest.raises(Unreadable, match=why):
        samples_of(damage(wav(tone(0.2))), RATE)


def flac() -> bytes:
    soundfile = pytest.importorskip("soundfile", reason="needs the audio extra")
    buffer = io.BytesIO()
    soundfile.write(buffer, np.random.default_rng(0).normal(size=5000) * 0.1, RATE, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


TINY = {"conv_widths": (4,), "conv_windows": (40,), "conv_strides": (40,), "layers": 1, "heads": 1, "width": 4}
MODEL = Wav2Vec2Config(vocab_size=6, sample_rate=RATE, mlp_width=4, position_window=2, position_groups=1, **TINY)
TASK = Transcription(seconds=0.5)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Ten sounds, of which one is cut off, one too long, and one has too much text."""
    rows = []
    for i in range(10):
        data = wav(tone(0.1 + 0.03 * i if i != 4 else 0.7, rate=2 * RATE), 2 * RATE)
        (tmp_path / f"{i}.wav").write_bytes(data[:300] if i == 2 else data)
        rows.append({"audio": f"{i}.wav", "text": "ab a" if i != 6 else "ab" * 9, "who": "xy"[i % 2]})
    path = tmp_path / "index.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def open_table(path: Path, split="train", task=TASK, **fields):
    data = Table(path=(str(path),), files=("audio",), eval_path=(str(path),), tokenizer="chars", **fields)
    contract = tasks.build(task, MODEL, data).fields
    return open_source(data, split, task, vocab_size=MODEL.vocab_size, fields=contract)


def test_recordings_are_padded_to_one_length_and_bad_ones_are_named_and_replaced(table, caplog):
    source = open_table(table, seq_len=8, group_field="who", target_field="text")
    with caplog.at_level(logging.WARNING, logger="jaxmodels"):
        batch = source.batch(np.arange(10), np.zeros(10, np.int64))
    assert {name: (x.shape, x.dtype.name) for name, x in batch.items()} == {
        "inputs": ((10, 2000), "int16"), "lengths": ((10,), "int32"), "targets": ((10, 8), "int32"),
        "group": ((10,), "int32"),
    }  # fmt: skip
    lengths = [400 + 120 * i for i in range(10)]
    lengths[2], lengths[4], lengths[6] = lengths[3], lengths[5], lengths[7]
    assert batch["lengths"].tolist() == lengths and batch["group"].tolist() == [0, 1, 1, 1, 1, 1, 1, 1, 0, 1]
    assert not batch["inputs"][0, 400:].any() and batch["inputs"][0, :400].any()
    assert source.tokenizer.decode(batch["targets"][0][:4]) == "ab a" and (batch["targets"][0][4:] < 0).all()
    said = " ".join(record.message for record in caplog.records)
    assert "index.jsonl:3: audio ends after 128 of 1,280 samples" in said
    assert "lasts 0.7 s, expected at most task.seconds, 0.5" in said
    assert "has 18 tokens, expected at most data.seq_len, 8" in said
    evaluated = open_table(table, "eval", seq_len=8, target_field="text").batch(np.arange(10), np.zeros(10, np.int64))
    assert [i for i, row in enumerate(evaluated["targets"]) if (row < 0).all()] == [2, 4, 6], "and count for nothing"


def test_a_vocabulary_without_room_for_the_blank_and_another_space_are_refused(table):
    with pytest.raises(UserError, match=r"expected the field of the transcripts, of text, who"):
        open_table(table)
    with pytest.raises(
        UserError, match="got task.space 2 .* expected the id of the space in it, 1, try --task.space 1"
    ):
        open_table(table, task=Transcription(seconds=0.5, space=2), target_field="text")
    with pytest.raises(UserError, match=r"got model.vocab_size 6, expected at least 257: .* and the blank"):
        data = Table(path=(str(table),), files=("audio",), eval_path=(str(table),), target_field="text")
        fields = tasks.build(TASK, MODEL, data).fields
        open_source(data, "train", TASK, vocab_size=MODEL.vocab_size, fields=fields)
    with pytest.raises(UserError, match="got 3 bad records"):
        open_table(table, seq_len=8, target_field="text", bad_records=2).batch(np.arange(10), np.zeros(10, np.int64))
