"""What the command line does with values, repeated options and files that are not what they should be."""

import dataclasses
import errno
import importlib
import json
import os
import re
import subprocess
import sys
from typing import get_type_hints

import pytest

from jaxmodels import config as configs
from jaxmodels.cli import explain, main
from jaxmodels.commands import COMMANDS, options, parsing, places
from jaxmodels.commands.options import configured
from jaxmodels.commands.train import RunOptions
from jaxmodels.compress.adapters import ADAPTERS
from jaxmodels.config import Adam, AdamW, Checkpoint, Config, Cosine, Eval, Mesh, Table, Text, Train
from jaxmodels.errors import UserError, nearest, printable
from jaxmodels.fields import Section, ranges
from jaxmodels.launch.place import PLACES
from jaxmodels.models.config import FAMILIES
from jaxmodels.models.families import create
from jaxmodels.models.gpt2 import GPT2Config
from jaxmodels.models.mlp import MLPConfig
from jaxmodels.train.optim import OPTIMIZERS
from jaxmodels.train.schedules import SCHEDULES
from jaxmodels.train.space import TuneOptions

FILE = "configs/gpt_stdlib.py"


@pytest.fixture(autouse=True)
def at_root(root, monkeypatch):
    monkeypatch.chdir(root)


@pytest.mark.parametrize(
    ("kind", "field", "value", "said"),
    [
        (
            AdamW,
            "schedule",
            "cosin",
            "got optim.schedule 'cosin', expected one of Cosine(), Linear(), ",
        ),
        (Eval, "mode", "minimum", "expected one of min, max"),
        (AdamW, "peak_lr", "3e-4", "expected a number, try --optim.peak-lr 0.001"),
        (AdamW, "peak_lr", -1.0, "expected at least 0"),
        (AdamW, "peak_lr", float("inf"), "expected a finite number"),
        (AdamW, "peak_lr", float("nan"), "expected a number"),
        (AdamW, "peak_lr", 1e39, "expected a finite number that float32 holds"),
        (AdamW, "peak_lr", True, "expected a number"),
        (AdamW, "eps", 1e-60, "number that float32 holds"),
        (AdamW, "clip_norm", -1, "got optim.clip_norm -1, expected above 0 or None, try --optim.clip-norm 1.0"),
        (AdamW, "warmup_steps", -5, "expected at least 0, try --optim.warmup-steps 0"),
        (Cosine, "final_lr_fraction", -1, "expected at least 0"),
        (AdamW, "b1", 1, "expected below 1, try --optim.b1 0.9"),
        (AdamW, "decay_on", "matrix", "expected several values"),
        (Train, "ema", 1.5, "expected below 1 or None"),
        (Train, "steps", 1e3, "expected a whole number, try --train.steps 1000"),
        (Train, "steps", True, "expected a whole number"),
        (Checkpoint, "best", 1, "expected True or False"),
        (Text, "path", "a.txt", "expected several values"),
        (Table, "threads", 10**9, "expected at most 1024"),
        (Mesh, "fsdp", 0, "expected at least 1, or -1"),
        (GPT2Config, "layers", 0, "got model.layers 0, expected at least 1, try --model.layers 1"),
        (GPT2Config, "layers", 2**31, "expected at most 16384"),
        (GPT2Config, "dropout", 1.0, "expected below 1"),
        (GPT2Config, "width", "64", "expected a whole number"),
        (MLPConfig, "hidden", (8, 0), "expected at least 1"),
    ],
)
def test_a_value_is_what_its_field_says_or_refused(kind, field, value, said):
    with pytest.raises(UserError) as error:
        kind(**{field: value})
    assert f"got {kind.section}.{field}" in str(error.value) and said in str(error.value)
    with pytest.raises(UserError):
        dataclasses.replace(kind(), **{field: value})
    if kind is GPT2Config:
        with pytest.raises(UserError):
            create("gpt2", **{field: value})


def test_numbers_and_lists_become_what_the_field_says():
    assert type(AdamW(peak_lr=1).peak_lr) is float
    assert Text(path=["a"]).path == ("a",)
    assert AdamW(clip_norm=None).clip_norm is None


def test_every_number_has_a_range():
    kinds = [hint for name, hint in get_type_hints(Config).items() if name in Config.__dataclass_fields__]
    kinds = [kind for kind in kinds if dataclasses.is_dataclass(kind)]
    named = (ADAPTERS, FAMILIES, OPTIMIZERS, SCHEDULES, PLACES)
    kinds += [registry.find(name) for registry in named for name in registry.builtin]
    for kind in kinds:
        for name, hint in get_type_hints(kind, include_extras=True).items():
            if ("int" in str(hint) or "float'" in str(hint)) and "Literal" not in str(hint):
                assert ranges(hint), f"{kind.__name__}.{name}"


def kinds_of(command, monkeypatch):
    """What a command's arguments are parsed as."""
    found = []
    # all are imported before the first is changed, so that none keeps the change for good
    for module in (parsing, options, places, importlib.import_module("jaxmodels.commands.eval")):
        monkeypatch.setattr(module, "parse", lambda kind, *rest: found.append(kind) or exit(0))
    main([*command.split(), *{"launch": ["local"], "compress": [FILE, "wanda"]}.get(command, [FILE])])
    return found


@pytest.mark.parametrize("command", COMMANDS.builtin)
def test_every_number_of_every_command_has_a_range(command, monkeypatch):
    kinds = kinds_of(command, monkeypatch)
    assert kinds
    while kinds:
        kind = kinds.pop()
        for name, hint in get_type_hints(kind, include_extras=True).items():
            inner = getattr(hint, "__origin__", hint)
            if dataclasses.is_dataclass(inner):
                assert issubclass(inner, Section)
                kinds.append(inner)
            elif name == "mean":  # of pixels: any finite number
                assert hint == tuple[float, ...]
            elif name != "return" and re.search(r"\b(int|float)\b", str(hint)) and "Literal" not in str(hint):
                assert ranges(hint), f"{kind.__name__}.{name}"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("sample RUN --tokens -1", "got tokens -1, expected at least 1 or None, try --tokens 1"),
        ("sample RUN --temperature nan", "got temperature nan, expected a number"),
        ("sample RUN --temperature -1", "got temperature -1.0, expected at least 0"),
        ("sample RUN --top-p 7", "got top_p 7.0, expected at most 1"),
        ("sample RUN --top-k 0", "got top_k 0, expected at least 1"),
        ("sample RUN --seed -1", "got seed -1, expected at least 0"),
        ("sample RUN --temperature 0 --top-k 3", "got --top-k 3 with --temperature 0, at which nothing is drawn"),
        ("eval RUN --beams 0", "got beams 0, expected at least 1"),
        ("eval RUN --data.bad-records -1", "got data.bad_records -1, expected at least 0"),
        ("predict RUN FILE --beams 99999", "got beams 99999, expected at most 1024"),
        ("data train-tokenizer FILE --vocab-size -1", "got vocab_size -1, expected at least 1"),
        ("data clean FILE --out X --min-words -1", "got min_words -1, expected at least 0"),
        ("data clean FILE --out X --letters nan", "got letters nan, expected a number"),
        ("tune CONFIG --trials 0", "got trials 0, expected at least 1, try --trials 1"),
        ("tune CONFIG --workers -3", "got workers -3, expected at least 1, try --workers 1"),
        ("plan CONFIG --candidates 0", "got candidates 0, expected at least 1"),
        ("plan CONFIG --workers -1", "got workers -1, expected at least 1"),
    ],
)
def test_a_number_of_a_command_is_in_its_range_or_refused_before_any_work(line, said, capsys):
    assert main(line.replace("CONFIG", FILE).split()) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {said}") and error.count("\n") == 1, error


def test_a_folder_given_to_a_command_is_answered_with_arguments_that_it_has(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text("{}\n")
    for command in (["data", "clean", "--out", "x.jsonl"], ["data", "train-tokenizer"]):
        assert main([*command, str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert f"try '{tmp_path}/**/*" in error and "--data" not in error, error
        assert main([*command, str(tmp_path / "none")]) == 2
        assert "got data.path" not in capsys.readouterr().err
    assert main(["data", "clean", str(tmp_path / "a.jsonl"), str(tmp_path), "--out", "x.jsonl"]) == 2
    assert f"try '{tmp_path}/**/*.jsonl'" in capsys.readouterr().err


def test_the_list_of_commands_is_read_without_loading_them():
    listed = "import sys; from jaxmodels.cli import main; main([]); print('loaded', {'jax', 'tyro'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", listed], capture_output=True, text=True, check=True).stdout
    assert "loaded set()" in shown
    for name in COMMANDS.builtin:
        line = next(line for line in shown.splitlines() if line.startswith(f"  {name} "))
        assert len(line) <= 88 and line.strip().count("  "), line  # what it takes, and what it is for


@pytest.mark.parametrize("command", ["train", "tune", "plan", "data inspect", "data prepare"])
@pytest.mark.parametrize("file", [[], [FILE]])
def test_help_is_short_and_fits_a_terminal(command, file, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert main([*command.split(), *file, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 48 and max(map(len, lines)) <= 80
    assert lines[0].startswith(f"usage: jaxmodels {command} {FILE if file else 'CONFIG.py'}")
    assert all(any(line.startswith(f"  {f.name} ") for line in lines) for f in dataclasses.fields(Config))
    assert any(line.split()[:2] == ["--optim.peak-lr", "0.004" if file else "0.001"] for line in lines)


def test_help_of_a_section_is_its_fields(capsys):
    assert main(["train", FILE, "--optim", "adam", "--help", "optim"]) == 0
    shown = capsys.readouterr().out
    assert all(f"--optim.{name}".replace("_", "-") in shown for name in configs.docs(Adam))
    assert "--optim.weight-decay" not in shown, "a field that adam does not have"
    assert "adam, of adamw, adam, sgd" in " ".join(shown.split())
    assert "--train.steps" not in shown and "--run-dir" not in shown
    assert main(["train", FILE, "--help", "optm"]) == 2
    assert "did you mean 'optim'?" in capsys.readouterr().err
    assert main(["train", FILE, "--optim.zzzz", "1"]) == 2
    assert f"try jaxmodels train {FILE} --help optim" in capsys.readouterr().err


def test_an_option_given_twice_counts_twice_or_is_refused():
    argv = [FILE, "--data", "text", "--data.path", "a", "b", "--train.steps", "3", "--data.path=c"]
    cfg, _ = configured(argv, "jaxmodels train", RunOptions)
    assert cfg.data.path == ("a", "b", "c") and cfg.train.steps == 3
    _, options = configured([FILE, "--space", "x=1:2", "--space", "y=1:2"], "jaxmodels tune", TuneOptions)
    assert options.space == ("x=1:2", "y=1:2")
    for twice in (["--optim.peak-lr", "1", "--optim.peak_lr", "2"], ["--run-dir=a", "--run-dir", "b"]):
        with pytest.raises(UserError, match=r"got --[a-z.-]+ twice, expected it once"):
            configured([FILE, *twice], "jaxmodels train", RunOptions)


def test_an_option_that_does_not_exist_is_called_unknown_however_often_it_is_given(capsys):
    assert main(["train", FILE, "--optim.beta3", "1", "--optim.beta3", "2"]) == 2
    said = capsys.readouterr().err
    assert "'--optim.beta3', expected an option of" in said and "twice" not in said


@pytest.mark.parametrize(
    "argv", [["data", "clean", "x", "--out", "y"], ["launch", "slurm"], ["doctor"], ["train", FILE], ["eval", "x"]]
)
def test_options_are_those_that_the_help_shows(argv, capsys, monkeypatch):
    seen = {}
    real = parsing.options
    monkeypatch.setattr(parsing, "options", lambda kind, default=None: seen.setdefault("found", real(kind, default)))
    assert main([*argv, "--no.such.option", "1"]) == 2
    capsys.readouterr()
    main([*argv, "--help", *(["all"] if argv[0] == "train" else [])])
    lines = re.findall(r"(?m)^[^\w-]*(--[a-z].*)", capsys.readouterr().out)
    shown = {name for line in lines for name in re.match(r"--[\w.-]+(, --[\w.-]+)*", line)[0].split(", ")}
    assert shown - {"--help"} == set(seen["found"])


def test_a_flag_given_twice_is_refused(capsys):
    assert main(["eval", "no/such/run", "--best", "--best"]) == 2
    assert "got --best twice" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        "", "null", "5", "[]", "{", "{}", "\x00\xff", "[" * 100_000, '{"model": null}',
        '{"model": {"class": 3}}', '{"model": {"class": "nonsense"}}', '{"model": []}',
    ],
)  # fmt: skip
def test_a_damaged_config_of_a_run_gets_one_line(text, tmp_path, capsys):
    (tmp_path / "config.json").write_bytes(text.encode("latin1"))
    assert main(["eval", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: got ") and error.count("\n") == 1 and "config.json" in error


@pytest.mark.parametrize("section", [f.name for f in dataclasses.fields(Config)])
@pytest.mark.parametrize("value", [None, [], "x", {"nonsense": 1}])
def test_a_section_of_another_type_is_refused_by_name(section, value):
    whole = json.loads(json.dumps(configs.to_json(Config(model=MLPConfig()))))
    default = getattr(Config(model=MLPConfig()), section)
    later = section in ("adapter", "compress", "distill")  # which older runs do not have, and most have none
    if later:
        missing = {name: each for name, each in whole.items() if name != section}
        assert getattr(configs.from_json(missing), section) == default
    if default is None:
        assert getattr(configs.from_json({**whole, section: None}), section) is None
        if value is None:
            return
    with pytest.raises(UserError, match="got"):
        configs.from_json({**whole, section: value})
    del whole[section]
    if not later:
        with pytest.raises(UserError, match=f"section '{section}' is missing"):
            configs.from_json(whole)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def get_config():\n    return 1 / 0\n", "ZeroDivisionError in line 2"),
        ("import sys\nsys.exit(0)\n", "SystemExit in line 2"),
        ("get_config = 3\n", "without get_config()"),
        ("def get_config():\n    return None\n", "got NoneType from get_config()"),
        ("def get_config(x):\n    return x\n", "TypeError"),
        ("x = (\n", "SyntaxError"),
        ("\x00", "fails with"),
        ("from jaxmodels.config import AdamW\nAdamW(schedule='cosin')\n", "got optim.schedule 'cosin'"),
        ("from jaxmodels.config import Config\ndef get_config():\n    return Config(model=3)\n", "got model 3"),
    ],
)
def test_a_config_file_that_is_none_gets_one_line(text, said, tmp_path):
    file = tmp_path / "wrong.py"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        configs.load(file)
    assert said in str(error.value)


def test_did_you_mean_offers_no_other_thing_that_exists():
    known = ["gpt2", "bert", "llama", "mixtral", "mistral-7b", "resnet-50", "vgg-16", "adam", "adamw"]
    for other in ("bart", "gpt3", "albert", "roberta", "nadam", "adamax", "vgg-17", "llama4"):
        assert nearest(other, known) == "", other
    for typo, meant in {"bret": "bert", "lama": "llama", "mixtrl": "mixtral", "mistral": "mistral-7b"}.items():
        assert nearest(typo, known) == f", did you mean {meant!r}?"


def test_errors_of_files_and_disks_get_one_line():
    assert explain(PermissionError(errno.EACCES, "Permission denied", "x"))[1] == 2
    assert explain(OSError(errno.EROFS, "Read-only file system", "x"))[1] == 2
    assert explain(NotADirectoryError(errno.ENOTDIR, "Not a directory", "x"))[1] == 2
    message, code = explain(OSError(errno.ENOSPC, "No space left on device"))
    assert code == 1 and "the disk is full" in message
    message, code = explain(RuntimeError("(sqlite3.OperationalError) database or disk is full\n[SQL: CREATE TABLE x]"))
    assert code == 1 and "the disk is full" in message and "\n" not in message
    message, code = explain(RuntimeError("(sqlite3.OperationalError) attempt to write a readonly database"))
    assert code == 2 and "cannot be written" in message
    assert explain(KeyError("x")) == (None, 1)


def test_a_platform_that_is_not_here_gets_one_line(tmp_path):
    command = [sys.executable, "-m", "jaxmodels", "train", FILE, "--train.steps", "2", "--run-dir", str(tmp_path / "a")]
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "JAX_PLATFORMS": "cuda"}
    )
    if ended.returncode == 0:
        pytest.skip("has CUDA")
    said = [line for line in ended.stderr.splitlines() if line.startswith("error:")]
    assert ended.returncode == 2 and len(said) == 1 and said[0].startswith("error: got JAX_PLATFORMS"), ended.stderr


def test_control_characters_are_shown_not_obeyed(capsys):
    assert printable("a\x1b[31m\x9b\udc80\u202e é\tb") == "a\\x1b[31m\\x9b\\udc80\\u202e é\tb"
    assert main(["eval", "no/\x1b[2Jrun"]) == 2
    assert "\x1b" not in capsys.readouterr().err


def test_the_list_of_models_looks_for_no_accelerator():
    asked = "from jaxmodels.cli import main; main(['models', 'gpt2']); import jax; print(jax.default_backend())"
    shown = subprocess.run(
        [sys.executable, "-c", asked],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "JAX_PLATFORMS": "no_such_platform"},
    )
    assert shown.stdout.splitlines()[-2:] == ["124,439,808 parameters", "cpu"], shown.stderr


def test_an_error_that_nobody_foresaw_is_one_line_and_keeps_its_traceback(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("jaxmodels.cli.dispatch", lambda argv: {}["x"])
    assert main(["models"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: KeyError") and error.count("\n") == 1
    assert "KeyError" in next(tmp_path.glob("*.traceback")).read_text()
    with pytest.raises(KeyError):
        main(["models", "--traceback"])


def test_output_that_nobody_reads_ends_quietly():
    piped = f"{sys.executable} -m jaxmodels models | head -n 0"
    ended = subprocess.run(["bash", "-c", piped], capture_output=True, text=True, timeout=120)
    assert "Traceback" not in ended.stderr and "Broken" not in ended.stderr
