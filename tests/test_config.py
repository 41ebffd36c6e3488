"""Configs as data, and the one line that a mistake on the command line gets."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from jaxmodels import config as configs
from jaxmodels.commands import parsing
from jaxmodels.commands.options import configured
from jaxmodels.commands.train import RunOptions
from jaxmodels.config import Config, Lion, Muon
from jaxmodels.errors import UserError
from jaxmodels.models.gpt2 import GPT2Config
from jaxmodels.models.llama import LlamaConfig, RopeScaling
from jaxmodels.models.mlp import MLPConfig
from tests.quick import own_lines

FILE = "configs/gpt_stdlib.py"


@pytest.fixture(autouse=True)
def at_root(root, monkeypatch):
    monkeypatch.chdir(root)


@pytest.mark.parametrize("model", [GPT2Config(layers=3), LlamaConfig(rope_scaling=RopeScaling(8.0)), MLPConfig()])
def test_a_config_survives_json(model):
    cfg = Config(model=model, optim=Lion(clip_norm=None, decay_on=("matrix",)))
    assert configs.from_json(json.loads(json.dumps(configs.to_json(cfg)))) == cfg


def test_every_config_file_loads(root):
    for path in sorted((root / "configs").glob("*.py")):
        cfg = configs.load(path)
        assert configs.from_json(configs.to_json(cfg)) == cfg, path


def test_options_override_fields_of_every_section():
    argv = [
        FILE,
        "--optim.peak-lr",
        "1e-4",
        "--mesh.fsdp",
        "4",
        "--model.layers",
        "2",
        "--run-dir",
        "x",
        "--resume",
        "must",
        "--train.ema",
        "0.99",
        "--data",
        "text",
        "--data.path",
        "a",
        "b",
        "--metrics.loggers",
        "a.b:C",
        "--optim.clip_norm",
        "None",
    ]
    cfg, where = configured(argv, "jaxmodels train", RunOptions)
    assert (cfg.optim.peak_lr, cfg.mesh.fsdp, cfg.model.layers, cfg.train.ema) == (1e-4, 4, 2, 0.99)
    assert cfg.data.path == ("a", "b") and cfg.metrics.loggers == ("a.b:C",) and cfg.optim.clip_norm is None
    assert where == RunOptions("x", "must")


def test_the_help_documents_every_field(capsys):
    with pytest.raises(SystemExit) as stop:
        configured([FILE, "--help", "all"], "jaxmodels train", RunOptions)
    assert not stop.value.code
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for kind, section in ((Muon, "optim."), (GPT2Config, "model."), (RunOptions, "")):
        for name, text in configs.docs(kind).items():
            assert f"--{section}{name}".replace("_", "-") in shown
            assert " ".join(text.split()[:4]) in shown, (name, text)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (
            ["--optim.peek-lr", "3"],
            "got '--optim.peek-lr', expected an option of jaxmodels train configs/gpt_stdlib.py, "
            "did you mean '--optim.peak-lr'?",
        ),
        (["--modl.layers", "3"], "did you mean '--model.layers'?"),
        (["--batch-size", "3"], "did you mean '--data.batch-size'?"),
        (["--optim.peak-lr", "high"], "got --optim.peak-lr 'high', expected FLOAT"),
        (["--train.steps", "1.5"], "got --train.steps '1.5', expected INT"),
        (["--train.steps", "1,5"], "got --train.steps '1,5', expected INT, try jaxmodels train"),
        (["--optim", "adamw2"], "got optimizer 'adamw2', expected one of adamw, "),
        (["--optim", "adamww"], "did you mean 'adamw'?"),
        (["--optim.peak-lr"], "--optim.peak-lr"),
        (["extra"], "got 'extra', expected options only"),
        (["--metrics.every", "0"], "got metrics.every 0, expected at least 1, try --metrics.every 1"),
        (["--train.xla", "xla_a"], "got train.xla 'xla_a', expected NAME=VALUE, try xla_"),
        (["--model.heads", "7"], "got width 128 with heads 7, expected width to be a multiple of heads, try heads 8"),
    ],
)
def test_a_mistake_gets_one_line(argv, said):
    with pytest.raises(UserError) as error:
        configured([FILE, *argv], "jaxmodels train", RunOptions)
    assert said in str(error.value) and "Error parsing" not in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "got no config, expected a config file first, try jaxmodels train configs/gpt_stdlib.py"),
        (["--train.steps", "3"], "expected a config file first"),
        (["configs/gpt_stdlb.py"], "did you mean 'configs/gpt_stdlib.py'?"),
        (["README.md"], "expected"),
    ],
)
def test_a_config_that_is_not_there_gets_one_line(argv, said):
    with pytest.raises(UserError, match="got") as error:
        configured(argv, "jaxmodels train", RunOptions)
    assert said in str(error.value)


def test_an_error_inside_a_config_file_names_the_file(tmp_path):
    file = tmp_path / "wrong.py"
    file.write_text("from jaxmodels.models.gpt2 import GPT2Config\ndef get_config():\n    return GPT2Config()\n")
    with pytest.raises(UserError, match=r"got GPT2Config from get_config\(\)"):
        configs.load(file)
    file.write_text("import nothing_like_this\n")
    with pytest.raises(UserError, match=r"wrong.py' that fails with ModuleNotFoundError"):
        configs.load(file)


def test_differences_and_provenance():
    cfg = configs.load(FILE)
    other = dataclasses.replace(cfg, optim=dataclasses.replace(cfg.optim, peak_lr=1.0))
    assert configs.differences(cfg, other) == {"optim.peak_lr": (cfg.optim.peak_lr, 1.0)}
    origin = {"file": FILE, "overrides": ["--optim.peak-lr", "1.0"]}
    assert configs.provenance(other, "optim.peak_lr", origin) == "command line"
    assert configs.provenance(cfg, "model.width", {"file": FILE}) == f"config file {FILE}"
    assert configs.provenance(cfg, "optim.b1", {"file": FILE}) == "default"
    assert configs.documentation(cfg, "optim.b1").startswith("Decay rate of the momentum")


def test_a_config_of_another_version_is_refused_by_name():
    value = configs.to_json(configs.load(FILE))
    value["optim"]["peak_rate"] = 3
    with pytest.raises(UserError, match="got unknown field 'peak_rate' for Muon"):
        configs.from_json(value)
    del value["optim"]["peak_rate"]
    for changed, message in (
        ({"optim": value["optim"] | {"peak_rl": 1}}, "'peak_rl' for Muon, expected .*, did you mean 'peak_lr'?"),
        ({"mesh": value["mesh"] | {"class": "a"}}, "'class' for Mesh, expected .*, try the version that wrote this"),
        ({"trian": {}}, "'trian' for a config, expected one of model, task, .*, did you mean 'train'?"),
    ):
        with pytest.raises(UserError, match=f"got unknown (field|section) {message}"):
            configs.from_json(value | changed)
    assert configs.from_json(value | {"origin": {}}) == configs.load(FILE)


def test_a_section_is_explained_by_its_fields(capsys):
    from jaxmodels.cli import main

    assert main(["config", "explain", FILE, "eval"]) == 0
    shown = capsys.readouterr().out
    assert "eval.batches = " in shown and "Batches in an evaluation." in shown and "train.steps" not in shown
    assert main(["config", "explain", FILE, "evl"]) == 2


def run(*argv, **env):
    return subprocess.run(
        [sys.executable, "-m", "jaxmodels", *argv],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **env},
    )


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--data.batch-size", "12", "--mesh.fsdp", "8"], "got data.batch_size 12, expected a multiple of 8"),
        (["--model.vocab-size", "100"], "got model.vocab_size 100, expected at least the tokenizer's 256"),
        (["--data", "text", "--data.path", "no/such/*.txt"], "no/such/*.txt"),
        (["--mesh.data", "3"], "expected 8"),
        (["--data.seq-len", "4096"], "got data.seq_len 4096, expected at most model.context"),
        (["--train.strategy", "pmap", "--mesh.data", "4", "--mesh.tensor", "2"], "expected data only"),
        (["--model.attention", "flash"], "flash"),
        (["--task", "classification"], "expected a classifier"),
        (["--profile.steps", "9:3"], "got profile.steps '9:3'"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_compiled(argv, said, capsys, tmp_path, monkeypatch):
    import jax

    from jaxmodels.cli import main

    def never(*_, **__):
        raise AssertionError("compiled")

    monkeypatch.setattr(jax._src.compiler, "backend_compile_and_load", never)
    assert main(["train", FILE, "--run-dir", str(tmp_path / "run"), *argv]) == 2
    shown = capsys.readouterr().err
    assert said in shown and shown.startswith("error: got") and shown.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_command_line_in_a_process_of_its_own():
    typo = run("trian")
    assert typo.returncode == 2
    (said,) = own_lines(typo.stderr)
    assert said.startswith("error: got command 'trian', expected one of train, eval, ")
    assert said.endswith(", did you mean 'train'?")
    assert run("--version").stdout.startswith("jaxmodels 0.")
    assert run("--help").stdout.startswith("usage: jaxmodels COMMAND")
    traced = run("sample", "no/such/run", "--traceback")
    assert traced.returncode == 1 and "Traceback" in traced.stderr and "UserError" in traced.stderr


@pytest.mark.parametrize("origin", [None, "x", {"file": 3, "overrides": "x", "versions": [1], "commit": {}}])
def test_an_origin_that_is_damaged_takes_nothing_from_a_run(tmp_path, origin):
    path = tmp_path / "config.json"
    configs.save(Config(model=MLPConfig()), path, {})
    for more in (origin, {"overrides": [1], "job": {"name": "a"}}):
        path.write_text(json.dumps({**json.loads(path.read_text()), "origin": more}))
        _, found = configs.read(tmp_path)
        assert found == ({"job": {"name": "a"}} if more is not origin else {})
        assert configs.provenance(Config(model=MLPConfig()), "optim.peak_lr", found) == "default"


def test_a_command_takes_flags(capsys):
    from jaxmodels.cli import main

    assert main(["eval", "no/such/run", "--best"]) == 2
    assert capsys.readouterr().err.startswith("error: got run 'no/such/run', expected a directory with config.json")


def test_models_lists_presets_and_shows_a_tree(capsys, monkeypatch):
    from jaxmodels.cli import main
    from jaxmodels.models import families

    # two presets stand for all: each is traced, which takes half a second
    few = {family: {"gpt2-small", "llama3-8b"} & {*presets} for family, presets in families.list_models().items()}
    monkeypatch.setattr(families, "list_models", lambda: few)
    assert main(["models"]) == 0
    listed = capsys.readouterr().out
    assert "llama3-8b" in listed and "8,030,261,248" in listed and "124,439,808" in listed
    assert main(["models", "llama3-8b"]) == 0
    assert "layers/attn/k/w          layers=32  embed=4096  kv_heads=8  head_dim=128" in capsys.readouterr().out
    assert main(["models", "llama3-8"]) == 2
    assert "did you mean 'llama3-8b'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["import"], "got too few arguments, expected a folder with config.json"),
        (["import", "DIR"], "got too few arguments, expected --out PATH"),
        (
            ["import", "DIR", "--ou", "RUN"],
            "got '--ou', expected --out PATH the run directory to create, did you mean '--out'?",
        ),
        (["sample", "RUN", "--promt", "a"], "did you mean '--prompt'?"),
    ],
)
def test_a_command_is_not_begun_before_all_of_its_arguments_are_known(argv, said, capsys):
    from jaxmodels.cli import main

    assert main(argv) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert "got run" not in error and "got 'DIR'" not in error, "the command itself was called"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["4,4,1"], "got --shape '4,4,1', expected INT [INT ...], try --shape 4 4 1"),
        (["4", "a"], "got --shape '4 a', expected INT [INT ...], try p --help"),
        (["1", "--pair", "1"], "got --pair with fewer values, expected 2 values, try p --help"),
        (["1", "--pair", "1", "b"], "got --pair '1 b', expected INT INT, try p --help"),
        (["1", "--maybe", "1,2"], "got --maybe '1,2', expected INT [INT ...] or None, try --maybe 1 2"),
    ],
)
def test_an_option_of_several_values_says_what_they_are(argv, said):
    @dataclasses.dataclass
    class Sizes:
        shape: tuple[int, ...] = (1,)
        pair: tuple[int, int] = (1, 2)
        maybe: tuple[int, ...] | None = None

    with pytest.raises(UserError) as error:
        parsing.parse(Sizes, ["--shape", *argv], "p")
    assert str(error.value) == said
