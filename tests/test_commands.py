"""What a run says at its end, and the commands that it offers next."""

from __future__ import annotations

import contextlib
import io
import shlex
from pathlib import Path

import pytest

from jaxmodels import cli
from jaxmodels.data.tokenizer import Bytes, Chars
from jaxmodels.generate.texts import opening
from jaxmodels.train.checkpoint import CheckpointError

CONFIG = """
from jaxmodels.config import Config, Text
from jaxmodels.models.gpt2 import GPT2Config


def get_config() -> Config:
    model = GPT2Config(layers=1, width=16, heads=2, vocab_size=32, context=16)
    return Config(model=model, data=Text(seq_len=16, batch_size=8))
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What a run with spaces in its names says at its end, whose tokenizer has neither a newline nor a space."""
    folder = tmp_path_factory.mktemp("a run's")
    (folder / "con fig.py").write_text(CONFIG)
    (folder / "letters.txt").write_text("bcdfghjkl" * 200)
    data = ["--data.path", str(folder / "letters.txt"), "--data.tokenizer", "chars"]
    fields = ["--train.steps", "2", "--optim.warmup-steps", "1", "--eval.batches", "1", "--metrics.progress", "plain"]
    arguments = ["train", str(folder / "con fig.py"), "--run-dir", str(folder / "run"), "--resume", "auto"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        return _printed([*arguments, *data, *fields])


def _printed(argv: list[str]) -> str:

    screen = io.StringIO()
    with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen):
        assert cli.main(argv) == 0, screen.getvalue()
    return screen.getvalue()


def test_a_tokenizer_without_a_newline_ends_its_run_with_a_sample(said: str) -> None:
    _, _, sample = said.partition("a sample:\n  | ")
    assert sample and set(sample.splitlines()[0]) <= set("bcdfghjkl")


@pytest.mark.parametrize(
    ("tokenizer", "wanted", "prompt"),
    [(Bytes(), "def ", "def "), (Bytes(), "\n", "\n"), (Chars("bc a"), "\n", " "), (Chars("ycz"), "\n", "c")],
)
def test_a_text_begins_with_what_the_tokenizer_has(tokenizer: Bytes | Chars, wanted: str, prompt: str) -> None:
    assert opening(tokenizer, wanted) == prompt


def test_what_is_offered_next_works_as_it_is_printed(said: str) -> None:
    everything, _, offered = said.partition("everything is in ")[2].partition("\ntry next:\n")
    assert "config.json" in everything and ".lock" not in everything
    commands = [shlex.split(line) for line in offered.splitlines() if line.startswith("  ")]
    assert [words[:2] for words in commands] == [["jaxmodels", w] for w in ("sample", "report", "train", "config")]
    train = commands[2]
    assert "--data.path" in train and "--resume" not in train and train.count("--run-dir") == 1
    for words in commands:
        _printed(words[1:])
    again = Path(train[train.index("--run-dir") + 1])
    assert (again / "config.json").exists() and again.name == "run-2"


def test_a_failed_checkpoint_that_was_shown_is_not_said_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = CheckpointError("checkpoint of step 3 NOT saved: No space left on device")

    def fail(argv: list[str]) -> int:
        raise error

    monkeypatch.setattr(cli, "dispatch", fail)
    assert cli.main([]) == 1 and capsys.readouterr().err.count("NOT saved") == 1
    error.shown = True
    assert cli.main([]) == 1 and capsys.readouterr().err == ""
