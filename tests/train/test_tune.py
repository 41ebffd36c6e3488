"""Search: the better values win, a study goes on where it stopped, workers share it, mistakes are said in one line."""

import fcntl
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import jax
import optuna
import pytest

from jaxmodels import cli
from jaxmodels import config as configs
from jaxmodels.commands.options import configured
from jaxmodels.commands.train import RunOptions
from jaxmodels.config import Config, Muon
from jaxmodels.errors import UserError
from jaxmodels.models.mlp import MLPConfig
from jaxmodels.train import directory, tune
from jaxmodels.train.loop import NotFinite
from jaxmodels.train.space import TuneOptions

SPACE = "optim.peak_lr=1e-7,1e-1"
FILE = """
from jaxmodels.config import *
from jaxmodels.models.mlp import MLPConfig

def get_config():
    return Config(
        model=MLPConfig((2, 2, 1), 2, ()),
        task=Classification(),
        data=Synthetic(batch_size=16),
        optim=SGD(schedule=Constant(), weight_decay=0.0),
        train=Train(steps=6),
        eval=Eval(every=2),
        checkpoint=Checkpoint(every=0),
        metrics=Metrics(loggers=()),
    )
"""


@pytest.fixture(autouse=True)
def seeded(monkeypatch):
    """Searches of this process draw the same values each time; otherwise its number is part of their seed."""
    sampler = optuna.samplers.TPESampler
    monkeypatch.setattr(optuna.samplers, "TPESampler", lambda *_, **named: sampler(**{**named, "seed": 0}))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tune")
    (folder / "tiny.py").write_text(FILE)
    return folder / "tiny.py"


def tuned(file, out, trials, *more):
    return cli.main(["tune", str(file), "--space", SPACE, "--trials", str(trials), "--out", str(out), *more])


def study(out):
    return optuna.load_study(study_name="tune", storage=f"sqlite:///{out / 'study.db'}").trials


@pytest.fixture(scope="module")
def searched(file, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "study"
    assert tuned(file, out, 4) == 0
    return out


def test_each_trial_is_a_run_with_the_values_that_were_drawn(searched):
    trials = study(searched)[:4]
    rates = []
    for trial in trials:
        run = searched / "trials" / f"{trial.number:04d}"
        cfg, origin = configs.read(run)
        rates.append(cfg.optim.peak_lr)
        assert cfg.optim.peak_lr == (1e-7, 1e-1)[trial.params["optim.peak_lr"]]
        assert origin["overrides"] == [f"--optim.peak_lr={cfg.optim.peak_lr}"]
        assert trial.intermediate_values and max(trial.intermediate_values) == 6
        assert trial.value == pytest.approx(min(trial.intermediate_values.values()))
    assert len(trials) == 4 and set(rates) <= {1e-7, 1e-1}


def test_a_study_goes_on_with_the_trials_that_are_left(file, searched, capsys):
    before = {trial.number: trial.value for trial in study(searched)}
    assert tuned(file, searched, len(before) + 1) == 0
    after = {trial.number: trial.value for trial in study(searched)}
    assert len(after) == len(before) + 1 and before.items() <= after.items()
    said = capsys.readouterr().out
    assert said.count("eval/loss") == 2 and f"{len(after)} trials in {searched}/" in said
    assert tuned(file, searched, len(after)) == 0 and len(study(searched)) == len(after), "nothing is left"


def test_the_picture_is_drawn(searched):
    assert (searched / "tune.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_another_search_in_the_same_directory_is_refused(file, searched, capsys):
    argv = ["tune", str(file), "--space", "optim.peak_lr=1:2", "--trials", "9", "--out", str(searched)]
    assert cli.main(argv) == 2
    message = capsys.readouterr().err
    assert "of another search" in message and message.count("\n") == 1


def test_two_workers_share_a_study(file, tmp_path):
    argv = ["tune", str(file), "--space", SPACE, "--trials", "3", "--workers", "2", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-m", "jaxmodels", *argv], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    trials = study(tmp_path / "out")
    assert 3 <= len(trials) <= 4 and all(trial.state.is_finished() for trial in trials)


@pytest.fixture
def played(monkeypatch):
    """Runs whose metric at each step is a function of the learning rate alone; which steps each of them came to."""
    seen = []

    def train(cfg, run, resume, origin, watch):
        progress, losses, ended = SimpleNamespace(best=None, best_step=0), [], "done"
        for step in range(1, 6):
            value = abs(cfg.optim.peak_lr - 3) + 1 / step
            losses.append(float("nan") if cfg.optim.b1 == 0.5 else value)
            if watch(step, {"eval/loss": losses[-1]}):
                ended = "preempted"
                break
        progress.best = min(losses)
        seen.append((cfg.optim.peak_lr, step))
        return None, SimpleNamespace(progress=progress, ended=ended)

    monkeypatch.setattr(tune.runs, "train", train)
    return seen


CFG = Config(model=MLPConfig((2, 2, 1), 2, ()))


def test_good_values_are_found_and_poor_trials_end_early(played, tmp_path):
    options = TuneOptions(space=("optim.peak_lr=0:10",), trials=25, out=str(tmp_path / "out"))
    out = tune.search(CFG, options, "tiny.py", [])
    trials = tune.read_trials(CFG, options, out)
    best = min((trial for trial in trials if not trial["pruned"]), key=lambda trial: trial["value"])
    assert len(trials) == 25 and abs(best["optim.peak_lr"] - 3) < 2 and best["value"] < 2.2
    pruned = {trial["optim.peak_lr"] for trial in trials if trial["pruned"]}
    assert pruned and pruned == {rate for rate, step in played if step < 5}
    assert all(abs(rate - 3) > abs(best["optim.peak_lr"] - 3) for rate in pruned)
    shown = tune.ranking(CFG, options, trials, rows=30).splitlines()
    assert shown[0].split() == ["trial", "eval/loss", "optim.peak_lr", "seconds"] and len(shown) == 26
    assert [line.endswith("stopped early") for line in shown[1:]] == sorted(
        line.endswith("early") for line in shown[1:]
    )
    values = [float(line.split()[1]) for line in shown[1:] if not line.endswith("early")]
    assert values == sorted(values)


def test_of_two_rates_the_better_one_wins(played, tmp_path):
    options = TuneOptions(space=("optim.peak_lr=9.0,3.0",), trials=12, out=str(tmp_path / "out"))
    trials = tune.read_trials(CFG, options, tune.search(CFG, options, "tiny.py", []))
    assert {trial["optim.peak_lr"] for trial in trials} == {9.0, 3.0}
    assert min(trials, key=lambda trial: trial["value"])["optim.peak_lr"] == 3.0


def test_a_metric_that_is_no_number_ends_its_trial_alone(played, tmp_path):
    options = TuneOptions(space=("optim.b1=0.5,0.5",), trials=3, out=str(tmp_path / "out"))
    trials = tune.read_trials(CFG, options, tune.search(CFG, options, "tiny.py", []))
    assert [(trial["pruned"], trial["value"]) for trial in trials] == [(True, None)] * 3
    assert len(tune.ranking(CFG, options, trials).splitlines()) == 1


def test_a_trial_whose_loss_is_no_number_counts(played, tmp_path, monkeypatch):
    def diverge(*given, **named):
        raise NotFinite("the loss of step 3 is nan")

    options = TuneOptions(space=("optim.peak_lr=0:10",), trials=2, out=str(tmp_path / "out"))
    monkeypatch.setattr(tune.runs, "train", diverge)
    trials = tune.read_trials(CFG, options, tune.search(CFG, options, "tiny.py", []))
    assert [(trial["pruned"], trial["value"]) for trial in trials] == [(True, None)] * 2


def test_a_combination_that_cannot_be_is_a_trial_with_its_reason_and_the_search_goes_on(
    played, tmp_path, monkeypatch, capsys
):
    train = tune.runs.train

    def some(cfg, *given, **named):
        if cfg.data.batch_size == 16:
            raise UserError("got data.batch_size 16, expected 8")
        if cfg.data.batch_size == 32:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 GB")
        return train(cfg, *given, **named)

    monkeypatch.setattr(tune.runs, "train", some)
    options = TuneOptions(space=("data.batch_size=8,16,32",), trials=9, out=str(tmp_path / "out"))
    trials = tune.read_trials(CFG, options, tune.search(CFG, options, "tiny.py", []))
    assert len(trials) == 9 and {trial["data.batch_size"] for trial in trials if not trial["pruned"]} == {8}
    reasons = {
        trial["data.batch_size"]: kept.user_attrs["refused"]
        for trial, kept in zip(trials, study(tmp_path / "out"), strict=True)
        if "refused" in kept.user_attrs
    }
    assert reasons == {16: "got data.batch_size 16, expected 8", 32: "it does not fit into the device's memory"}
    assert "refused: got data.batch_size 16, expected 8  data.batch_size=16" in capsys.readouterr().out


def test_a_search_of_which_every_trial_is_refused_ends_with_one_line_and_can_go_on(played, tmp_path):
    options = TuneOptions(space=("train.accumulate=0,0",), trials=2, out=str(tmp_path / "out"))
    for trials in (2, 2, 3):  # anew, again with nothing left, and with one more
        with pytest.raises(UserError, match=f"got {trials} trials, all refused, the last because: got train.accum"):
            tune.search(CFG, replace(options, trials=trials), "tiny.py", [])
    assert [trial.state.name for trial in study(tmp_path / "out")] == ["PRUNED"] * 3


def test_a_disk_that_is_full_keeps_no_part_of_a_new_study(played, tmp_path, monkeypatch):
    def full(storage, **_):
        (tmp_path / "out" / "study.db").write_bytes(b"a part")
        raise RuntimeError("(sqlite3.OperationalError) database or disk is full")

    monkeypatch.setattr(optuna, "create_study", full)
    monkeypatch.setattr(tune, "storage", lambda out: None)
    options = TuneOptions(space=("optim.peak_lr=0:10",), trials=2, out=str(tmp_path / "out"))
    with pytest.raises(RuntimeError, match="full"):
        tune.search(CFG, options, "tiny.py", [])
    assert not (tmp_path / "out").exists()


def test_a_search_does_not_go_into_the_directory_of_a_run(file, tmp_path, capsys):
    with directory.held(tmp_path):
        assert tuned(file, tmp_path, 1) == 2
    assert f"got run directory {tmp_path}, to which process" in (said := capsys.readouterr().err)
    assert "try another --out" in said
    (tmp_path / "config.json").write_text("{}")
    assert tuned(file, tmp_path, 1) == 2
    assert f"got --out {tmp_path}, which holds a run, expected" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "config.json"}


def test_a_directory_s_name_may_have_any_character(played, tmp_path):
    out = tmp_path / "x" / "tune?x=1%20{a}#b&c"
    options = TuneOptions(space=("optim.peak_lr=0:10",), trials=2, out=str(out))
    assert tune.search(CFG, options, "tiny.py", []) == out
    assert [path.name for path in (tmp_path / "x").iterdir()] == [out.name] and (out / "study.db").stat().st_size
    assert len(tune.read_trials(CFG, options, out)) == 2


def test_the_command_for_the_best_one_has_all_that_the_search_was_given(file):
    argv = [str(file), "--space", "optim.peak_lr=1e-7,1e-1", "data.pack=True,False", "--data", "text", "--data.path",
            "a b.txt", "c'd.txt", "--trials", "3", "--optim.peak-lr", "0.5", "--out=x", "--eval.metric",
            "eval/accuracy", "--eval.mode=max", "--workers", "2", "--data.pack", "True"]  # fmt: skip
    chosen = {"optim.peak_lr": 1e-7, "data.pack": False, "optim.clip_norm": None, "optim": "muon"}
    words = shlex.split(tune.train_command(str(file), argv, chosen))
    assert words[:3] == ["jaxmodels", "train", str(file)] and "--space" not in words
    cfg, _ = configured(words[2:], "jaxmodels train", RunOptions)
    assert cfg.data.path == ("a b.txt", "c'd.txt") and (cfg.eval.metric, cfg.eval.mode) == ("eval/accuracy", "max")
    for field, value in chosen.items():
        assert configs.flatten(cfg)[field] == value


def interrupt(monkeypatch, options):
    """A search that is told to stop within its next trial."""
    stopped = SimpleNamespace(progress=SimpleNamespace(best=None, best_step=0), ended="preempted")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tune.runs, "train", lambda *given, **named: (None, stopped))
        tune.search(CFG, options, "tiny.py", [])


def test_an_interrupted_trial_and_one_of_a_process_that_is_gone_are_not_counted(played, tmp_path, monkeypatch):
    options = TuneOptions(space=("optim.peak_lr=0:10",), trials=2, out=str(tmp_path / "out"))
    tune.search(CFG, options, "tiny.py", [])
    options = replace(options, trials=4)
    interrupt(monkeypatch, options)
    optuna.load_study(study_name="tune", storage=f"sqlite:///{tmp_path / 'out' / 'study.db'}").ask()  # and no more
    assert [trial.state.name for trial in study(tmp_path / "out")] == ["COMPLETE"] * 2 + ["FAIL", "RUNNING"]
    trials = tune.read_trials(CFG, options, tune.search(CFG, options, "tiny.py", []))
    assert [trial["number"] for trial in trials] == [0, 1, 4, 5] and len(played) == 4
    assert study(tmp_path / "out")[3].state.name == "FAIL"


def test_a_trial_that_another_process_is_at_is_left_to_it_and_counts(played, tmp_path):
    options = TuneOptions(space=("optim.peak_lr=0:10",), trials=1, out=str(tmp_path / "out"))
    tune.search(CFG, options, "tiny.py", [])
    optuna.load_study(study_name="tune", storage=f"sqlite:///{tmp_path / 'out' / 'study.db'}").ask()
    with (tmp_path / "out" / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        tune.search(CFG, replace(options, trials=3), "tiny.py", [])
    assert [trial.state.name for trial in study(tmp_path / "out")] == ["COMPLETE", "RUNNING", "COMPLETE"]


def test_workers_are_told_to_stop_when_the_search_is(played, tmp_path, monkeypatch):
    start, begun = subprocess.Popen, []
    sleep = [sys.executable, "-c", "import time; time.sleep(100)"]
    monkeypatch.setattr(tune.subprocess, "Popen", lambda argv: begun.append(start(sleep)) or begun[-1])
    interrupt(monkeypatch, TuneOptions(space=(SPACE,), trials=9, workers=3, out=str(tmp_path / "out")))
    assert [process.returncode for process in begun] == [-signal.SIGTERM] * 2


def test_a_field_s_values_are_read_as_its_type():
    assert tune.parse_choice("--optim.peak-lr=1e-4:1e-1:log", CFG) == tune.Choice("optim.peak_lr", 1e-4, 0.1, log=True)
    assert tune.parse_choice("data.batch_size=8:64", CFG).whole
    assert tune.parse_choice("optim=adamw,muon", CFG).values == ("adamw", "muon")
    assert tune.parse_choice("optim.clip_norm=None,1.0", CFG).values == (None, 1.0)
    assert tune.parse_choice("data.pack=True,False", CFG).values == (True, False)
    assert configs.replaced(CFG, "optim", "muon") == replace(CFG, optim=Muon())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "optim.peak_lt=1:2",
            r"got --space 'optim.peak_lt=1:2', expected FIELD=LOW:HIGH.*did you mean 'optim.peak_lr'",
        ),
        ("optim.peak_lr", "got --space 'optim.peak_lr', expected FIELD=LOW:HIGH"),
        ("optim.peak_lr=2:1", "expected numbers from low to high, try optim.peak_lr=1:10"),
        ("optim.peak_lr=a:b", "expected numbers from low to high"),
        ("optim.peak_lr=1:2:lin", "expected numbers from low to high"),
        ("optim.peak_lr=0:1:log", "expected a low end above 0 for log"),
        ("optim=1:2", "got optimizer '1:2', expected one of adamw, "),
        ("optim=adamw,adafactr", "got optimizer 'adafactr', expected one of .*did you mean 'adafactor'"),
        ("optim.peak_lr=high,low", "got 'high' in --space .*, expected a value of"),
        ("data.batch_size=1.5,2", "got '1.5' in --space .*, expected a value of"),
    ],
)
def test_a_space_that_is_none_is_refused_in_one_line(text, message):
    with pytest.raises(UserError, match=message) as caught:
        tune.parse_choice(text, CFG)
    assert "\n" not in str(caught.value)


def test_a_search_for_nothing_is_refused():
    with pytest.raises(UserError, match="got no --space, expected fields to choose"):
        tune.search(CFG, TuneOptions(), "tiny.py", [])


def test_two_spaces_of_one_field_are_refused_before_anything_is_written(tmp_path):
    spaces = ("optim.peak_lr=1e-3:1e-2", "--optim.peak-lr=1e-1,1", "data.batch_size=4:8")
    with pytest.raises(UserError, match=r"got --space for optim.peak_lr 2 times, expected each field once"):
        tune.search(CFG, TuneOptions(space=spaces, out=str(tmp_path / "out")), "tiny.py", [])
    assert not (tmp_path / "out").exists()
