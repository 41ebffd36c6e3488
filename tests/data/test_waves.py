"""Windows of sounds: codes as the standard has them, and each sample once."""

import json
import math
import wave

import numpy as np
import pytest

from jaxmodels.config import Table, Waveform
from jaxmodels.data import open_source
from jaxmodels.data.contract import IGNORED
from jaxmodels.data.waves import SILENCE, decode, encode
from jaxmodels.errors import UserError


def test_codes_are_those_of_the_standard_s_curve_and_come_back_within_half_a_step():
    x = np.linspace(-1, 1, 2001).astype(np.float32)
    curve = [math.copysign(math.log1p(255 * abs(v)) / math.log(256), v) for v in x.tolist()]
    assert encode(x).tolist() == [math.floor((v + 1) / 2 * 255 + 0.5) for v in curve]
    assert encode(np.zeros(1))[0] == SILENCE
    np.testing.assert_array_equal(encode(decode(np.arange(256))), np.arange(256))
    assert np.abs(decode(encode(x)) - x).max() < 0.025


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder, rng, rows = tmp_path_factory.mktemp("sounds"), np.random.default_rng(0), []
    for i, (length, part) in enumerate([(50, "train"), (130, "train"), (31, "validation"), (90, "validation")]):
        with wave.open(str(folder / f"{i}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(8000)
            file.writeframes(rng.integers(-20000, 20000, length).astype("<i2").tobytes())
        rows.append({"file": f"{i}.wav", "label": ["one", "two"][i % 2], "speaker": f"s{i % 2}", "split": part})
    path = folder / "index.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def opened(table, split, conditions=(), **more):
    data = Table(path=(str(table),), files=("file",), split_field="split", seq_len=32, batch_size=2, **more)
    return open_source(data, split, Waveform(conditions=conditions, context=8), seed=1)


def test_every_sample_is_a_target_of_evaluation_once_behind_its_context(table):
    source = opened(table, "eval")
    batch = source.batch(np.arange(len(source)), np.zeros(len(source), np.int64))
    assert batch["codes"].shape == (len(source), 32) and (batch["targets"] != IGNORED).sum() == 31 + 90
    with wave.open(str(table.parent / "3.wav")) as file:
        samples = np.frombuffer(file.readframes(90), "<i2") / np.float32(32768)
    rows = batch["targets"][1:]  # of the second sound
    assert rows[rows != IGNORED].tolist() == encode(samples).tolist()
    # what is predicted is the code that follows
    inner = (batch["targets"][:, :-1] != IGNORED) & (batch["targets"][:, 1:] != IGNORED)
    assert (batch["codes"][:, 1:][inner] == batch["targets"][:, :-1][inner]).all()
    assert batch["codes"][0, 0] == SILENCE and (rows[1:, :8] == IGNORED).all()


def test_training_draws_other_windows_in_each_epoch_and_the_same_again(table):
    source = opened(table, "train")
    assert len(source) == 2 + 5
    at, zero = np.arange(len(source)), np.zeros(len(source), np.int64)
    first, second = source.batch(at, zero)["targets"], source.batch(at, zero + 1)["targets"]
    assert (first >= 0).all() and (first != second).any()
    np.testing.assert_array_equal(opened(table, "train").batch(at[3:4], zero[3:4])["targets"], first[3:4])


def test_conditions_are_numbered_by_the_names_in_training(table):
    source = opened(table, "eval", ("label", "group"), group_field="speaker")
    batch = source.batch(np.arange(len(source)), np.zeros(len(source), np.int64))
    assert source.class_names == ("one", "two") and source.groups == ("s0", "s1")
    assert batch["label_condition"].tolist() == batch["group_condition"].tolist() == [0, 1, 1, 1, 1]


def test_a_damaged_sound_is_left_out_by_name_and_a_window_without_targets_refused(table, caplog):
    (table.parent / "2.wav").write_bytes(b"RIFF....")
    with caplog.at_level("WARNING"):
        assert (opened(table, "eval").batch(np.arange(1), np.zeros(1, int))["targets"] >= 0).all()
    assert "index.jsonl:3" in caplog.text
    with pytest.raises(UserError, match=r"got task.context 8, expected less than data.seq_len 8"):
        data = Table(path=(str(table),), files=("file",), split_field="split", seq_len=8)
        open_source(data, "eval", Waveform(context=8))
