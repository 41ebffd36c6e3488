"""Strings of digits are a function of the seed and the index, and none of the test's recordings is trained on."""

from __future__ import annotations

import json

import numpy as np
import pytest

from examples.connected_digits import RATE, ConnectedDigits
from jaxmodels.data.records import Bad
from jaxmodels.errors import UserError
from tests.data.test_sounds import tone, wav


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("digits")
    rows = []
    for k, (speaker, text) in enumerate((speaker, text) for speaker in "ab" for text in ("one", "two", "six")):
        for split, take in (("train", 0), ("train", 1), ("test", 2)):
            seconds = 0.2 + 0.01 * k
            (where / f"{k}_{take}.wav").write_bytes(wav(tone(seconds, rate=RATE), RATE))
            row = {"file": f"{k}_{take}.wav", "text": text, "speaker": speaker, "seconds": seconds, "split": split}
            rows.append(row)
    strings = [
        {"id": 0, "speaker": "a", "files": ["0_2.wav", "2_2.wav"], "gaps": [0.1, 0.2, 0.05]},
        {"id": 1, "speaker": "b", "files": ["3_2.wav", "5_2.wav"], "gaps": [0.1, 0.1, 0.1]},
    ]
    for name, lines in (("index", rows), ("test_strings", strings)):
        (where / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return where


def test_listed_strings_are_their_recordings_with_silence_between(folder):
    records = ConnectedDigits(path=str(folder)).records("eval")
    first, second = records.read([0, 1], ["audio", "text", "speaker"])
    assert (first["text"], second["text"], second["speaker"]) == ("one six", "one six", "b")
    samples = first["audio"].samples
    assert len(samples) == RATE * (0.1 + 0.2 + 0.2 + 0.22 + 0.05) and first["audio"].rate == RATE
    loud = np.abs(samples) > 0
    assert not loud[:800].any() and loud[810:2390].any() and not loud[2400:4000].any() and not loud[-400:].any()


def test_drawn_strings_depend_on_seed_and_index_and_leave_the_test_alone(folder):
    config = ConnectedDigits(path=str(folder), strings=60, longest=1.0)
    records, again = config.records("train"), config.records("train")
    found = [records._drawn(i) for i in range(60)]
    assert found == [again._drawn(i) for i in range(60)] and records.fingerprint == again.fingerprint
    assert found != [
        ConnectedDigits(path=str(folder), strings=60, seed=1).records("train")._drawn(i) for i in range(60)
    ]
    assert all("_2" not in file for each in found for file in each["files"]) and len({*map(str, found)}) > 50
    assert all(len({file[0] in "012" for file in each["files"]}) == 1 for each in found), "one speaker each"
    seconds = [len(row["audio"].samples) / RATE for row in records.read(range(60), ["audio"])]
    assert 0.5 < max(seconds) <= 1.0


def test_a_speaker_is_held_out_whole_and_a_lost_file_is_a_bad_record(folder):
    config = ConnectedDigits(path=str(folder), held_out="b", strings=30)
    assert all(row["speaker"] == "a" for row in config.records("train").read(range(30), ["speaker"]))
    assert [row["speaker"] for row in config.records("eval").read([0], ["speaker"])] == ["b"]
    with pytest.raises(UserError, match="got data.held_out 'c', expected one of a, b"):
        ConnectedDigits(path=str(folder), held_out="c").records("eval")
    records = config.records("eval")
    (folder / "3_2.wav").rename(folder / "gone")
    assert isinstance(records.read([0], ["audio"])[0], Bad)
    (folder / "gone").rename(folder / "3_2.wav")
