"""A run of sounds draws them by name, into a file and onto the page."""

import json
import wave

import numpy as np
import pytest

from jaxmodels.cli import main
from jaxmodels.config import Config, Table, Waveform
from jaxmodels.data.waves import wav
from jaxmodels.generate.sounds import draw_sounds
from jaxmodels.models.wavenet import WaveNetConfig
from jaxmodels.report import sounds as pictures
from jaxmodels.report.page import html
from jaxmodels.train.saved import load_run
from tests.sections import untrained


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder, rows = tmp_path_factory.mktemp("sounds"), []
    for i in range(4):
        (folder / f"{i}.wav").write_bytes(wav(np.sin(np.arange(200) / (i + 2)), 8000))
        part = "validation" if i > 1 else "train"
        rows.append({"file": f"{i}.wav", "label": ["one", "two"][i % 2], "who": ["ann", "bob"][i % 2], "split": part})
    table = folder / "index.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = Config(
        model=WaveNetConfig(stacks=1, depth=2, width=8, skip=8, conditions=(2, 2)),
        task=Waveform(conditions=("label", "group"), context=8),
        data=Table(
            path=(str(table),), files=("file",), split_field="split", group_field="who", seq_len=32, batch_size=8
        ),
    )
    return untrained(cfg, folder / "run")


def test_sample_writes_the_sound_that_is_named(run, tmp_path, capsys):
    out = tmp_path / "said.wav"
    assert (
        main(["sample", str(run), "--prompt", "two, ann", "--seconds", "0.01", "--out", str(out), "--seed", "3"]) == 0
    )
    assert capsys.readouterr().out == f"{out}: 0.0 seconds at 8,000 samples a second\n"
    with wave.open(str(out)) as file:
        assert (file.getframerate(), file.getnchannels(), file.getnframes()) == (8000, 1, 80)
        heard = np.frombuffer(file.readframes(80), "<i2") / 32767
    opened = load_run(run)
    expected, rate = draw_sounds(opened, [("two", "ann")], seconds=0.01, seed=3)
    assert rate == 8000 and expected.shape == (1, 80)
    np.testing.assert_allclose(heard, expected[0], atol=1 / 32767)
    other, _ = draw_sounds(opened, [("one", "ann")], seconds=0.01, seed=3)
    assert (other != expected).any()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "got no --prompt for"),
        (["--prompt", "two"], "expected 2 name(s) of what is to be drawn, try --prompt 'one, ann'"),
        (["--prompt", "tow, ann"], "got 'tow' to draw, expected one of one, two, did you mean 'two'?"),
        (["--prompt", "two, ann", "--top-k", "3"], "got --top-k for a run of waveform, expected it for one of texts"),
        (["--prompt", "two, ann", "--out", "no/where.wav"], "whose folder does not exist"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_line(run, argv, said, capsys):
    assert main(["sample", str(run), *argv]) == 2
    assert said in capsys.readouterr().err


def test_the_page_has_players_and_spectrograms(run, monkeypatch):
    monkeypatch.setattr(pictures, "SECONDS", 0.1)
    heard, picture = pictures.pieces(load_run(run).evaluation())
    assert [title for title, _ in heard.sounds] == ["one, ann", "two, bob"]
    assert html(heard, {}).count('<audio controls preload="metadata" src="data:audio/wav;base64,UklGR') == 2
    assert picture.png().startswith(b"\x89PNG")


def test_other_sounds_are_numbered_by_the_names_that_were_trained_on(run, tmp_path, caplog):
    rows = []
    for i, (word, who) in enumerate([("two", "bob"), ("two", "bob"), ("one", "zoe")]):
        (tmp_path / f"{i}.wav").write_bytes(wav(np.sin(np.arange(40) / (i + 2)), 8000))
        rows.append({"file": f"{i}.wav", "label": word, "who": who})
    table = tmp_path / "other.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    batch = load_run(run).evaluation({"path": (str(table),)}).examples(0, 2)
    assert batch["label_condition"].tolist() == batch["group_condition"].tolist() == [1, 1]
    assert "other.jsonl:3: has the group 'zoe', which is not in training" in caplog.text
