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
from jaxmodels.config import VAE, WSD, AdamW, Config, Constant, Images, Metrics, Momentum, OptimConfig, Train
from jaxmodels.errors import UserError
from jaxmodels.models.config import FAMILIES
from jaxmodels.models.gpt2 import GPT2Config
from jaxmodels.models.mlp import MLPConfig
from jaxmodels.models.vae import VAEConfig
from jaxmodels.registry import Registry
from jaxmodels.train import tune
from jaxmodels.train.optim import OPTIMIZERS
from jaxmodels.train.schedules import SCHEDULES

FILE = "configs/gpt_stdlib.py"
OWN = '''
from dataclasses import dataclass

import jax
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
        return optax.stateless(lambda updates, params: jax.tree.map(jnp.sign, updates))


@dataclass(frozen=True)
class Halves(ScheduleConfig):
    """The peak, then half of it."""

    def share(self, step, first, last):
        return jnp.where(step > (first + last) / 2, 0.5, 1.0)


class Plain:
    pass


@dataclass(frozen=True)
class Ruleless(OptimConfig):
    pass


@dataclass(frozen=True)
class Short(OptimConfig):
    def rule(self):
        return optax.identity()


class Bare(Signs):
    strength: float = 1.0
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
        (
            "own_rules:Ruleless",
            r"got optimizer own_rules:Ruleless, which has no method rule, .* try def rule\(self, axes",
        ),
        ("own_rules:Short", r"whose rule takes \(self\), expected rule\(self, axes\)"),
        ("own_rules:Bare", r"whose strength is no field, expected a dataclass, try @dataclass\(frozen=True\)"),
        ("../own:Signs", "got optimizer '../own:Signs', expected one of"),
    ],
)
def test_a_name_that_stands_for_nothing_gets_one_line(package, name, said):
    with pytest.raises(UserError, match=said):
        configured([FILE, "--optim", name], "jaxmodels train", RunOptions)


UNFINISHED = '''
from dataclasses import dataclass

from jaxmodels import Logger
from jaxmodels.data import RecordsConfig
from jaxmodels.data.tokenizer import BaseTokenizer
from jaxmodels.tasks.task import TaskConfig
from jaxmodels.train.schedules import ScheduleConfig


@dataclass(frozen=True)
class Task(TaskConfig):
    def examples(self, opening): ...


@dataclass(frozen=True)
class Source(RecordsConfig):
    pass


@dataclass(frozen=True)
class Schedule(ScheduleConfig):
    pass


class Deaf(Logger):
    def scalars(self, values): ...


class Tokenizer(BaseTokenizer):
    vocab_size = 3

    def encode(self, text): ...


def one(first):
    """What takes one argument is neither a metric nor a transform."""


kernel = one
number = 3
'''


def test_what_is_not_finished_is_refused_when_it_is_named(package, tmp_path):
    from jaxmodels.commands import COMMANDS
    from jaxmodels.data.section import SOURCES, TRANSFORMS
    from jaxmodels.data.tokenizer import TOKENIZERS
    from jaxmodels.models.kernels.kernel import KERNELS
    from jaxmodels.tasks.task import METRICS, TASKS
    from jaxmodels.train.loggers import LOGGERS

    (package / "own_rules" / "unfinished.py").write_text(UNFINISHED)
    for registry, name, said in (
        (TASKS, "Task", r"which has no method build, expected one, try def build\(self, model, data\)"),
        (SOURCES, "Source", r"which has no method records, expected one, try def records\(self, split\)"),
        (SCHEDULES, "Schedule", "which has no method share"),
        (TOKENIZERS, "Tokenizer", "which has no method decode"),
        (LOGGERS, "Tokenizer", "which is a class, expected a class that derives from Logger"),
        (LOGGERS, "Deaf", r"whose scalars takes \(self, values\), expected scalars\(self, step, values\)"),
        (COMMANDS, "number", "which is an int, expected a function"),
        (METRICS, "one", r"which takes \(first\), expected a function\(outputs, batch\)"),
        (TRANSFORMS, "one", r"which takes \(first\), expected a function\(image, rng\)"),
        (KERNELS, "kernel", r"which is a function, expected a .*Kernel, try mine = Kernel\(attend, features\)"),
    ):
        with pytest.raises(UserError, match=f"got {registry.what} own_rules.unfinished:{name}, {said}"):
            registry.find(f"own_rules.unfinished:{name}")
    # in a config file no name is looked up
    made = "from own_rules.unfinished import Task\nfrom jaxmodels.config import Config\n"
    (tmp_path / "made.py").write_text(f"{made}get_config = lambda: Config(0, Task())\n")
    with pytest.raises(UserError, match="^got task own_rules.unfinished:Task, which has no method build"):
        configs.load(tmp_path / "made.py")


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
    with pytest.raises(UserError, match="got a value for weight_decay, which Adam does not have"):
        configs.replaced(configs.replaced(cfg, "optim", "adam"), "optim.weight_decay", 0.1)


def test_a_class_that_no_other_process_can_import_is_refused(tmp_path):
    file = tmp_path / "experiment.py"
    body = "from jaxmodels.config import Config\nfrom jaxmodels.models.mlp import MLPConfig\n"
    file.write_text(OWN + body + "def get_config():\n    return Config(model=MLPConfig(), optim=Signs())\n")
    with pytest.raises(UserError, match=r"got optimizer Signs of experiment, which other processes cannot import"):
        configs.load(file)
    (tmp_path / "neighbor.py").write_text(OWN)
    file.write_text(
        "from neighbor import Signs\n" + body + "def get_config():\n    return Config(MLPConfig(), optim=Signs())\n"
    )
    with pytest.raises(UserError, match=r"got optimizer Signs of neighbor, which other processes cannot import"):
        configs.load(file)
    del sys.modules["neighbor"]


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
    assert written["format"] == 3
    for version in (None, 0, 4, "3", 3.0, True):
        with pytest.raises(UserError, match=r"got a config of format .*, expected one of 1, 2, 3, try the version"):
            configs.from_json({**written, "format": version})


def test_a_config_of_the_second_format_did_not_tell_the_lowest_value_from_one_that_nobody_asked_for():
    written = configs.to_json(configs.load(FILE))
    for before, now in (("min", None), ("max", "max")):
        read = configs.from_json({**written, "format": 2, "eval": {**written["eval"], "mode": before}})
        assert read.eval.mode == now
    asked = configs.from_json({**written, "eval": {**written["eval"], "mode": "min"}})
    assert asked.eval.mode == "min"


def test_a_config_of_the_first_format_is_read_as_it_was_meant():
    """As the version before kinds wrote it: all fields of all kinds in one section, kinds under names of their own."""
    every = {
        "task": {"name": "vae", "beta": 4.0, "multi_label": False, "label_smoothing": 0.1, "pixels": "gaussian"},
        "data": {"source": "images", "path": ["set"], "name": "mnist", "eval_fraction": 0.3, "threads": 2},
        "optim": {
            "name": "momentum", "peak_lr": 0.5, "schedule": "wsd", "final_lr_fraction": 0.3, "decay_fraction": 0.5,
            "b1": 0.8, "b2": 0.9, "eps": 1e-6, "weight_decay": 0.2, "clip_norm": None,
        },
        "metrics": {"every": 7, "tensorboard": True, "progress": "none"},
    }  # fmt: skip
    rest = {name: {} for name in ("augment", "train", "eval", "checkpoint", "mesh", "profile", "init")}
    model = {"family": "vae", **dataclasses.asdict(VAEConfig(latents=3))}
    read = configs.from_json(json.loads(json.dumps({"model": model, **every, **rest})))
    assert read == Config(
        model=VAEConfig(latents=3),
        task=VAE(beta=4.0, pixels="gaussian"),
        data=Images(path=("set",), eval_fraction=0.3, threads=2),
        optim=Momentum(
            peak_lr=0.5, schedule=WSD(final_lr_fraction=0.3, decay_fraction=0.5), b1=0.8, weight_decay=0.2,
            clip_norm=None,
        ),
        metrics=Metrics(every=7, loggers=("tensorboard",), progress="none"),
    )  # fmt: skip
    quiet = {**every, "metrics": {"tensorboard": False}, "optim": {"name": "adamw", "schedule": "constant"}}
    read = configs.from_json({"model": model, **quiet, **rest})
    assert read.metrics.loggers == () and read.optim == AdamW(schedule=Constant())
    for section, wrong, said in (
        ("task", {"name": "vea"}, "got task 'vea', expected one of"),
        ("task", {"name": 3}, "got task.class None, expected text"),
        ("optim", {"name": "adamw", "schedule": "cosin"}, "got schedule 'cosin'"),
        ("data", "images", "section 'data' is 'images'"),
    ):
        with pytest.raises(UserError, match=said):
            configs.from_json({"model": model, **every, **rest, section: wrong})


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--task.name", "vae"], "got --task.name vae, expected a kind as the option of its section, try --task vae"),
        (["--data.source=table"], "try --data table"),
        (["--optim.name", "muon"], "try --optim muon"),
        (["--optim.schedule.name", "wsd"], "try --optim.schedule wsd"),
        (["--model.family", "llama"], "try --model llama"),
        (["--optim.final-lr-fraction", "0.2"], "did you mean '--optim.schedule.final-lr-fraction'"),
        (["--data.name", "mnist"], "got '--data.name', expected an option of"),
    ],
)
def test_the_kind_as_a_field_is_told_how_it_is_written(argv, said):
    with pytest.raises(UserError, match=said):
        configured([FILE, *argv], f"jaxmodels train {FILE}", RunOptions)


def test_a_field_called_name_is_no_kind():
    cfg, _ = configured([FILE, "--data", "tfds", "--data.name", "table"], "jaxmodels train", RunOptions)
    assert cfg.data.name == "table"
    with pytest.raises(UserError, match="try optim=adamw,muon"):
        tune.parse_choice("optim.name=adamw,muon", cfg)


def test_a_ctrl_c_waits_until_a_module_is_imported(tmp_path):
    (tmp_path / "interrupted.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nfor _ in range(1000):\n    pass\nmine = 1\n"
    )
    code = (  # in a process without other threads, which would receive it
        "import signal, sys\nfrom jaxmodels.registry import Registry\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\ntry:\n"  # a shell's background job ignores it
        "    Registry('thing', 'things', {'mine': 'interrupted:mine'}).find('mine')\n"
        "except KeyboardInterrupt:\n    print(sys.modules['interrupted'].mine)\n"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True)
    assert done.stdout == b"1\n", done.stderr
