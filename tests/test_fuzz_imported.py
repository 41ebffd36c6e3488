"""Damage to the files of a run that was imported ends in one line, and changes nothing else."""

import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxmodels.cli import main
from jaxmodels.data import tokenizer
from jaxmodels.models.bert import BERTConfig
from tests.fuzzing import damaged, drawn, ends_in_one_line, tree
from tests.hf.small import change, saved

TEXTS = "one two three four"
BESIDE = {
    "tokenizer_config.json": {"model_max_length": 16, "pad_token": "<|endoftext|>"},
    "special_tokens_map.json": {"pad_token": "<|endoftext|>"},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A classifier of texts with names for its classes, imported from a directory of transformers."""
    folder = tmp_path_factory.mktemp("made")
    model = BERTConfig(
        vocab_size=280, layers=1, width=16, heads=2, mlp_width=24, context=16, head="classification", classes=2
    )
    saved(model, folder / "source")
    change(folder / "source", id2label={"0": "low", "1": "high"})
    tokenizer.train_bpe([TEXTS] * 5, 280, folder / "source" / tokenizer.FILE)
    for name, values in BESIDE.items():
        (folder / "source" / name).write_text(json.dumps(values))
    assert main(["import", str(folder / "source"), "--out", str(folder / "run")]) == 0
    (folder / "new.csv").write_text("sentence\none two\nfour\n")
    return folder


FILES = ["config.json", "data.json", "tokenizer.json", "pretrained/config.json", "pretrained/tokenizer_config.json"]
COMMANDS = {
    "predict": ("predict", "run", "new.csv"),
    "report": ("report", "run", "--out", "page"),
    "export": ("export", "run", "exported"),
    "explain": ("config", "explain", "run"),
}


@pytest.mark.parametrize("name", FILES)
@drawn(6)
@given(data=st.data())
def test_a_damaged_file_of_an_imported_run_ends_in_one_line(made, tmp_path_factory, monkeypatch, capsys, name, data):
    folder = tmp_path_factory.mktemp("damaged") / "here"
    shutil.copytree(made, folder)
    monkeypatch.chdir(folder)
    file = folder / "run" / name
    file.write_bytes(data.draw(damaged(file.read_bytes())))
    before = tree(folder / "run")
    ends_in_one_line(COMMANDS[data.draw(st.sampled_from(sorted(COMMANDS)))], capsys, 3)
    assert tree(folder / "run") == before
    shutil.rmtree(folder.parent)
