"""Damage to any file of a run, of published weights or of data ends in one line, and changes nothing else."""

import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxmodels.config import Checkpoint, Classification, Config, Metrics, Table, Train
from jaxmodels.models.lstm import LSTMConfig
from jaxmodels.train import metrics
from jaxmodels.train import run as runs
from tests.fuzzing import damaged, drawn, ends_in_one_line, taken_or_refused, tree

WORDS = "one two three four five six seven eight nine ten".split()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run that tells low numbers from high ones, of two checkpoints."""
    folder = tmp_path_factory.mktemp("made")
    rng = np.random.default_rng(0)
    rows = [f"{' '.join(rng.choice(WORDS[5 * c :][:5], 3))},{('low', 'high')[c]}" for c in rng.integers(0, 2, 60)]
    (folder / "a.csv").write_text("\n".join(["sentence,label", *rows]) + "\n")
    (folder / "new.csv").write_text("sentence\none two\nsix\n")
    cfg = Config(
        model=LSTMConfig(vocab_size=64, width=8, hidden=8, layers=1, classes=2, dropout=0.0),
        task=Classification(),
        data=Table(path=(str(folder / "a.csv"),), tokenizer="words:64", seq_len=8, batch_size=8),
        train=Train(steps=4),
        checkpoint=Checkpoint(every=2),
        metrics=Metrics(every=1, progress="none", loggers=()),
    )
    runs.train(cfg, folder / "run")
    return folder


FILES = [
    "metrics.jsonl", "config.json", "data.json", "tokenizer.json", "special_tokens.json", "checkpoints/4/manifest.json",
    "checkpoints/4/meta.json", "checkpoints/4/state/manifest.ocdbt", "checkpoints/4/state/_METADATA",
]  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@drawn(4)
@given(data=st.data())
def test_a_damaged_file_of_a_run_ends_in_one_line(made, tmp_path_factory, capsys, name, data):
    run = tmp_path_factory.mktemp("damaged") / "run"
    shutil.copytree(made / "run", run)
    (run / name).write_bytes(data.draw(damaged((run / name).read_bytes())))
    before = tree(run)
    if name == "metrics.jsonl":
        taken_or_refused(lambda: metrics.read(run))
    else:
        # a damaged checkpoint is told of, and the one before it read
        ends_in_one_line(["predict", run, made / "new.csv"], capsys, 2 if "checkpoints" in name else 1)
    assert tree(run) == before
    shutil.rmtree(run.parent)


COMMANDS = ["eval", "predict", "sample", "export", "config explain", "train"]
ARGUMENTS = st.sampled_from(
    ["--best", "--out", "--tokens", "--split", "--data.path", "--data.batch-size", "--json", "--top", "--run-dir",
     "--resume", "-1", "0", "1e999", "nan", "None", "", "x", "-", "--", "\x1b[2J", "no/such",
     "new.csv", "run", "a.csv", "train"]
)  # fmt: skip


@drawn(15)
@given(command=st.sampled_from(COMMANDS), words=st.lists(ARGUMENTS, min_size=1, max_size=3))
def test_any_arguments_for_a_run_that_is_there_end_in_one_line_and_leave_it_alone(
    made, monkeypatch, capsys, command, words
):
    monkeypatch.chdir(made)
    before = tree(made / "run")
    ends_in_one_line([*command.split(), "run", *words], capsys, 3)
    assert tree(made / "run") == before
    for path in set(made.iterdir()) - {made / name for name in ("run", "a.csv", "new.csv")}:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
