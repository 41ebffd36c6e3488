"""Whatever a field is given, it is taken or refused in one line: no traceback, no other exit code.

By hand for longer: JAXMODELS_FUZZ=5000 pytest tests/test_fuzz.py.
"""

import dataclasses
import functools
import json

from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmodels import config as configs
from jaxmodels.cli import main
from jaxmodels.commands.options import configured
from jaxmodels.commands.train import RunOptions
from jaxmodels.config import Config
from jaxmodels.errors import UserError
from jaxmodels.models.gpt2 import GPT2Config
from tests.fuzzing import drawn

LONG = drawn(30)
CONFIG = Config(model=GPT2Config(layers=1, width=8, heads=2))
FIELDS = sorted(configs.flatten(CONFIG))
WORDS = st.sampled_from(
    ["-1", "0", "1", "nan", "inf", "1e999", "2147483648", "None", "True", "", "x", "adamW", "\x1b[2J"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def one_line(error):
    assert "\n" not in str(error) and str(error).startswith("got "), error


@LONG
@given(argv=st.lists(st.tuples(st.sampled_from(FIELDS), st.lists(WORDS, max_size=2)), min_size=1, max_size=3))
def test_options_are_taken_or_refused_in_one_line(root, argv):
    flat = [word for name, words in argv for word in ("--" + name.replace("_", "-"), *words)]
    try:
        cfg, _ = configured([str(root / "configs/gpt_stdlib.py"), *flat], "jaxmodels train", RunOptions)
    except UserError as error:
        one_line(error)
    else:
        assert configs.from_json(json.loads(json.dumps(configs.to_json(cfg)))) == cfg


@settings(LONG, max_examples=5 * LONG.max_examples)
@given(name=st.sampled_from(FIELDS), value=VALUES)
def test_values_in_a_saved_config_are_taken_or_refused_in_one_line(name, value):
    whole = json.loads(json.dumps(configs.to_json(CONFIG)))
    *path, last = name.split(".")
    owner = functools.reduce(dict.__getitem__, path, whole)
    if isinstance(owner[last], dict):  # a section of several kinds
        owner, last = owner[last], "class"
    owner[last] = value
    try:
        cfg = configs.from_json(whole)
    except UserError as error:
        one_line(error)
    else:
        assert (
            dataclasses.replace(cfg) == cfg and configs.from_json(json.loads(json.dumps(configs.to_json(cfg)))) == cfg
        )


COMMANDS = [
    "train", "eval", "tune", "plan", "predict", "sample", "report", "import", "export", "data inspect", "data prepare",
    "data clean", "data train-tokenizer", "config explain", "config diff",
]  # fmt: skip
ARGUMENTS = WORDS | st.sampled_from(
    [
        "--help",
        "--best",
        "--out",
        "--tokens",
        "--beams=0",
        "--split",
        "--on",
        "--space",
        "--trials",
        "-",
        "--",
        "no/such",
    ]
)


def ends_in_one_line(argv, capsys):
    code = main(argv)
    said = capsys.readouterr().err
    assert code in (0, 1, 2) and said.count("\n") <= 1, (argv, said)
    assert "Traceback" not in said and "a fault of jaxmodels" not in said, (argv, said)


@LONG
@given(command=st.sampled_from(COMMANDS), words=st.lists(ARGUMENTS, max_size=3))
def test_any_arguments_end_in_one_line(tmp_path, monkeypatch, capsys, command, words):
    monkeypatch.chdir(tmp_path)
    ends_in_one_line([*command.split(), "no/such/run", *words], capsys)


@LONG
@given(data=st.data())
def test_a_damaged_config_of_a_run_ends_in_one_line(tmp_path, capsys, data):
    file = tmp_path / "config.json"
    configs.save(CONFIG, file, {"file": "x.py", "overrides": [], "versions": {}, "commit": ""})
    whole = file.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    put = data.draw(st.sampled_from([b"", b"null", b"[]", b"5", b"\x00\xff", b"[" * 100_000, b'"', b"}", b"-1"]))
    gone = data.draw(st.sampled_from([0, 1, 10, len(whole)]))
    file.write_bytes(whole[:at] + put + whole[at + gone :])
    ends_in_one_line(["config", "explain", str(tmp_path)], capsys)
    ends_in_one_line(["config", "diff", str(tmp_path), str(tmp_path)], capsys)
