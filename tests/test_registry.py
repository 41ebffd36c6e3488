"""What is chosen by name is found in any process, wherever it is written, or refused in one line."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from jaxmodels import config as configs
from jaxmodels.commands.options import configured
from jaxmodels.commands.train import RunOptions
from jaxmodels.config import AdamW, Config, Constant, OptimConfig, Train
from jaxmodels.errors import UserError
from jaxmodels.models.config import FAMILIES
from jaxmodels.models.gpt2 import GPT2Config
from jaxmodels.models.mlp import MLPConfig
from jaxmodels.registry import Registry
from jaxmodels.train.optim import OPTIMIZERS
from jaxmodels.train.schedules import SCHEDULES

FILE = "configs/gpt_stdlib.py"
OWN = '''
from dataclasses import dataclass

import jax.numpy as jnp
import optax

from jaxmodels.fields import Share
from jaxmodels.train.optim import OptimConfig
from jaxmodels.train.schedules import ScheduleConfig


@dataclass(frozen=True)
class Signs(OptimConfig):
    """The sign of the gradient."""

    blend: Share = 0.5
    """A field of its own."""

    def rule(self, axes):
        return optax.stateless(lambda updates, params: optax.tree.map(jnp.sign, updates))


@dataclass(frozen=True)
class Halves(ScheduleConfig):
    """The peak, then half of it."""

    def share(self, step, first, last):
        return jnp.where(step > (first + last) / 2, 0.5, 1.0)


class Plain:
    pass
'''


@pytest.fixture(autouse=True)
def at_root(root, monkeypatch):
    monkeypatch.chdir(root)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package that lies outside the tree, on Python's path."""
    (tmp_path / "own_rules").mkdir()
    (tmp_path / "own_rules" / "__init__.py").write_text(OWN)
    (tmp_path / "own_rules" / "broken.py").write_text("1 / 0\n")
    (tmp_path / "own_rules" / "needy.py").write_text("import nothing_like_this\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "own_rules"]:
        del sys.modules[name]


@pytest.mark.parametrize("registry", [FAMILIES, OPTIMIZERS, SCHEDULES], ids=lambda registry: registry.what)
def test_every_short_name_stands_for_a_class_that_has_that_name(registry):
    for name in registry.builtin:
        found = registry.find(name)
        assert registry.name_of(found) == name and dataclasses.is_dataclass(found)


def test_a_kind_from_outside_is_chosen_trained_and_written_down(package):
    argv = [FILE, "--optim", "own_rules:Signs", "--optim.schedule", "own_rules:Halves", "--optim.blend", "0.25"]
    cfg, _ = configured(argv, "jaxmodels train", RunOptions)
    assert (cfg.optim.blend, cfg.optim.peak_lr, cfg.optim.warmup_steps) == (0.25, 4e-3, 50)
    assert [float(cfg.optim.rate(150)(step)) for step in (49, 60, 149)] == pytest.approx([4e-3, 4e-3, 2e-3])
    written = json.loads(json.dumps(configs.to_json(cfg)))
    assert written["optim"]["class"] == "own_rules:Signs"
    assert written["optim"]["schedule"]["class"] == "own_rules:Halves"
    assert configs.from_json(written) == cfg
    assert configs.flatten(cfg)["optim"] == "own_rules:Signs"


def test_another_process_reads_it_or_says_what_is_missing(package, tmp_path):
    cfg, _ = configured([FILE, "--optim", "own_rules:Signs"], "jaxmodels train", RunOptions)
    configs.save(cfg, tmp_path / "config.json", {})
    explain = [sys.executable, "-m", "jaxmodels", "config", "explain", str(tmp_path), "optim.blend"]
    there = subprocess.run(explain, capture_output=True, text=True, env=_environment(package))
    assert there.returncode == 0 and "optim.blend = 0.5  (default)" in there.stdout
    gone = subprocess.run(explain, capture_output=True, text=True, env=_environment())
    assert (
        gone.returncode == 2 and gone.stderr.count("got optimizer own_rules:Signs, whose module own_rules is not") == 1
    )
    assert "PYTHONPATH" in gone.stderr


def _environment(*paths):
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**kept, "PYTHONPATH": os.pathsep.join(map(str, [*paths, os.getcwd()])), "JAX_PLATFORMS": "cpu"}


def test_an_installed_package_gives_short_names(package):
    info = package / "own_rules-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own-rules\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[jaxmodels.optimizers]\nsigns = own_rules:Signs\n")
    assert OPTIMIZERS.names()[-1] == "signs" and OPTIMIZERS.find("signs").__name__ == "Signs"
    cfg, _ = configured([FILE, "--optim", "signs"], "jaxmodels train", RunOptions)
    assert configs.kind_name(cfg.optim) == "signs"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("adm", "got optimizer 'adm', expected one of adamw, .*, did you mean 'adam'?"),
        ("own_rules:Sings", "expected a name of own_rules, did you mean 'Signs'"),
        ("own_rules:Plain", "expected a frozen dataclass that derives from OptimConfig"),
        ("own_rules:Halves", "expected a frozen dataclass that derives from OptimConfig"),
        ("jaxmodels.train.optim:OptimConfig", "which every optimizer has in common"),
        ("own_rules.broken:Signs", "whose module fails with ZeroDivisionError"),
        ("own_rules.needy:Signs", "needs nothing_like_this, which is not there"),
        ("nothing_like_this:Signs", "whose module nothing_like_this is not there"),
        ("os:path", "expected a frozen dataclass"),
        ("../own:Signs", "got optimizer '../own:Signs', expected one of"),
    ],
)
def test_a_name_that_stands_for_nothing_gets_one_line(package, name, said):
    with pytest.raises(UserError, match=said):
        configured([FILE, "--optim", name], "jaxmodels train", RunOptions)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--optim"], "got --optim without a kind, expected one of adamw"),
        (["--optim", "--train.steps", "3"], "got --optim without a kind"),
        (["--optim", "sgd", "--optim=lion"], "got --optim twice"),
        (["--optim", "adam", "--optim.weight-decay", "1"], "got '--optim.weight-decay', expected an option of"),
        (["--optim.schedule", "constant", "--optim.schedule.final-lr-fraction", "0"], "final-lr-fraction"),
        (["--train", "x"], "got '--train'"),
    ],
)
def test_a_kind_that_is_asked_for_wrongly_gets_one_line(argv, said):
    with pytest.raises(UserError) as error:
        configured([FILE, *argv], "jaxmodels train", RunOptions)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_another_kind_keeps_what_was_set_and_both_have():
    before = AdamW(peak_lr=0.1, b1=0.5, weight_decay=0.3, schedule=Constant(), freeze=("embed/*",))
    after = configs.of_kind(before, "muon")
    assert (after.peak_lr, after.b1, after.weight_decay, after.freeze) == (0.1, 0.5, 0.3, ("embed/*",))
    assert after.schedule == Constant()
    assert configs.of_kind(before, "adam").b1 == 0.5
    model = configs.of_kind(GPT2Config(layers=3, width=64, heads=4), "llama")
    assert (type(model).__name__, model.layers, model.width) == ("LlamaConfig", 3, 64)
    cfg = Config(model=MLPConfig(), optim=before, train=Train(steps=3))
    assert configs.replaced(cfg, "optim.schedule", "wsd").optim.schedule.decay_fraction == 0.2


def test_a_class_that_no_other_process_can_import_is_refused(tmp_path):
    file = tmp_path / "experiment.py"
    body = "from jaxmodels.config import Config\nfrom jaxmodels.models.mlp import MLPConfig\n"
    file.write_text(OWN + body + "def get_config():\n    return Config(model=MLPConfig(), optim=Signs())\n")
    with pytest.raises(UserError, match=r"got optimizer Signs of experiment, which other processes cannot import"):
        configs.load(file)
    (tmp_path / "neighbour.py").write_text(OWN)
    file.write_text(
        "from neighbour import Signs\n" + body + "def get_config():\n    return Config(MLPConfig(), optim=Signs())\n"
    )
    with pytest.raises(UserError, match=r"got optimizer Signs of neighbour, which other processes cannot import"):
        configs.load(file)
    del sys.modules["neighbour"]


def test_a_name_is_given_once():
    registry = Registry("thing", "jaxmodels.things", {"a": "os:path"})
    registry.register("b")(OptimConfig)
    registry.register("b")(OptimConfig)
    assert registry.find("b") is OptimConfig and registry.names() == ["a", "b"]
    for name in ("a", "b"):
        with pytest.raises(UserError, match=f"got a second thing '{name}'"):
            registry.register(name)(AdamW)


def test_a_config_of_another_format_is_refused():
    written = configs.to_json(configs.load(FILE))
    assert written["format"] == 2
    for version in (None, 1, 3, "2"):
        with pytest.raises(UserError, match=r"got a config of format .*, expected 2"):
            configs.from_json({**written, "format": version})
