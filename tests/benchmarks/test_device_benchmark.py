"""`python -m benchmarks device`: parts in the order of worth, each recorded as it comes, whatever happens to one."""

from __future__ import annotations

import importlib.metadata
import json
import tomllib

import jax
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks import cells, device, parts, record, worker
from benchmarks.__main__ import main
from jaxmodels.errors import UserError
from jaxmodels.train.job import assemble


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A record of a part that ran in a process of its own, and the command."""
    folder = tmp_path_factory.mktemp("device")
    asked = ["device", "--budget", "600", "--parts", "gpt2", "--out", str(folder)]
    assert main(asked) == 0
    (path,) = folder.glob("device_*.json")
    return asked, path


def test_a_part_is_done_in_a_process_of_its_own_and_recorded(recorded):
    _, path = recorded
    saved = json.loads(path.read_text())
    (row,) = saved["rows"]
    assert row["part"] == "gpt2" and saved["platform"] == "cpu" and not row["failure"]
    assert row["figures"]["tokens/s"] > 0 and row["figures"]["GiB at the peak"] > 0
    text = path.with_suffix(".md").read_text()
    assert "NO SECONDS MEAN ANYTHING" in text and "| gpt2 | tokens/s |" in text
    assert list(path.parent.glob(".device*")) == []


def test_what_is_done_is_not_done_again_and_what_fails_is_named_and_stops_nothing(recorded, monkeypatch, capsys):
    asked, path = recorded
    before = json.loads(path.read_text())
    answers = {
        "about": {"figures": {key: before[key] for key in before if key not in ("rows", "notes", "title")}},
        "llama": {"failure": "MemoryError: too much"},
        "vit": {"figures": {"examples/s": 2.0}},
        "attention": {"failure": "its time was up after 9 s", "late": True},
    }
    given = []

    def finished(name, folder, seconds):
        given.append((name, seconds))
        return {"figures": {}, "failure": "", "late": False, "seconds": 1.0, **answers[name]}

    monkeypatch.setattr(device, "finished", finished)
    position = asked.index("--parts")
    more = [*asked[: position + 1], "llama", "vit", *asked[position + 1 :]]
    assert main(more) == 1
    rows = json.loads(path.read_text())["rows"]
    assert [row["part"] for row in rows] == ["gpt2", "llama", "vit"]
    assert [name for name, _ in given] == ["about", "llama", "vit"]
    assert rows[:1] == before["rows"] and rows[1]["failure"] and rows[2]["figures"] == {"examples/s": 2.0}
    assert "| llama | failed | MemoryError: too much |" in path.with_suffix(".md").read_text()
    answers["llama"] = {"figures": {"tokens/s": 1.0}}  # a failed part is tried again, and nothing else
    given.clear()
    assert main([*more[: position + 1], "attention", *more[position + 1 :]]) == 0
    assert [name for name, _ in given] == ["about", "attention", "llama", "attention"]
    shares = [seconds for name, seconds in given if name == "attention"]
    assert shares[0] < 0.36 * 600 and shares[1] > shares[0]  # it goes on with the time that is left
    text = path.with_suffix(".md").read_text()
    assert "| attention | not done | its time was up after 9 s |" in text and "no time was left for attention" in text
    capsys.readouterr()


def test_what_the_budget_has_no_time_for_is_said(recorded, monkeypatch, capsys):
    asked, path = recorded
    saved = json.loads(path.read_text())
    about = {key: saved[key] for key in saved if key not in ("rows", "notes", "title")}
    monkeypatch.setattr(device, "finished", lambda *_: {"figures": about, "failure": ""})
    monkeypatch.setattr(device, "LEAST", 1e9)
    position = asked.index("--parts")
    assert main([*asked[: position + 1], "bert", *asked[position + 1 :]]) == 0
    assert "no time was left for bert: the same command does them" in capsys.readouterr().out


class Child:
    """A process that does nothing, and that ends when it is told to, if `stuck`."""

    exitcode = 7

    def __init__(self, stuck):
        self.stuck, self.told = stuck, []

    def start(self):
        pass

    def join(self, seconds=None):
        pass

    def is_alive(self):
        return self.stuck

    def terminate(self):
        self.told.append("terminate")

    def kill(self):
        self.told.append("kill")
        self.stuck = False


def test_a_part_whose_time_is_up_is_ended_and_one_whose_process_dies_is_named(tmp_path):
    stuck = Child(stuck=True)
    found = device.waited(stuck, tmp_path / "none", 3.0)
    assert found["late"] and found["failure"] == "its time was up after 3 s" and stuck.told == ["terminate", "kill"]
    found = device.waited(Child(stuck=False), tmp_path / "none", 3.0)
    assert not found["late"] and found["failure"] == "its process ended with 7"


@pytest.mark.parametrize("name", ["parity", "attention", "checkpoint", "sampling"])
def test_parts_run_with_small_sizes(name, tmp_path):
    figures = parts.PARTS[name].run(True, tmp_path)
    assert figures and all(value is None or value >= 0 for value in figures.values())
    assert all(isinstance(record.show(value), str) for value in figures.values()) and json.dumps(figures)
    if name == "parity":
        assert {"error of xla", "error of blockwise", "error of grouped products of experts"} == set(figures)
        assert max(figures.values()) < 1e-4


def test_parity_names_the_kernels_that_differ(monkeypatch, tmp_path):
    rows = [{"kernel": "xla", "key": "causal", "pass": "forward", "error": 0.5}]
    monkeypatch.setattr(cells, "parity", lambda *_: rows)
    monkeypatch.setattr(parts, "_grouped", lambda *_: 0.0)
    with pytest.raises(UserError, match=r"1 kernels that differ from the reference: xla on causal, forward: 0.5"):
        parts.parity(True, tmp_path)


@pytest.mark.parametrize("name", ["engine", "data"])
def test_contestants_take_turns_on_one_device(name, tmp_path, monkeypatch):
    made = []

    def contestant(kind):
        def make(cfg, devices):
            made.append((kind, type(cfg.data).__name__, len(devices)))
            return lambda steps: made.append(steps)

        return make

    monkeypatch.setattr(worker, "engine", contestant("engine"))
    monkeypatch.setattr(worker, "bare", contestant("bare"))
    (ratio,) = parts.PARTS[name].run(True, tmp_path).values()
    assert ratio > 0
    assert (
        sorted(each for each in made if each != 1)
        == {
            "engine": [("bare", "Synthetic", 1), ("engine", "Synthetic", 1)],
            "data": [("engine", "Stdlib", 1), ("engine", "Synthetic", 1)],
        }[name]
    )


@pytest.mark.parametrize("name", parts.STEPS)
def test_every_named_model_has_both_sizes(name):
    small, full = (parts.config(name, small) for small in (True, False))
    assert small.model.dtype == "float32" and full.model.dtype == "bfloat16"
    assert small.data.batch_size == 2 and full.data.batch_size >= 8
    if name == "resnet":  # of those whose step no test runs, the one that is quickest to assemble
        assert assemble(small, jax.devices()[:1]).units == 2


def test_a_mistake_is_answered_in_one_line(capsys):
    for arguments, message in (
        (["--parts", "gpt3"], "got part 'gpt3', expected one of parity"),
        (["--budget", "0"], "got budget 0.0, expected at least 1"),
        (["--out", "/dev/null"], "got --out /dev/null, which is a file"),
    ):
        assert main(["device", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


IMAGE = ("jax", "flax", "optax", "orbax-checkpoint", "numpy", "matplotlib", "pillow", "tokenizers", "einops", "pyyaml",
         "pyarrow", "packaging")  # fmt: skip
"""What an image for accelerators has, with all that these need."""


def needed(names):
    """Packages that these need, with those, on Linux and Python 3.12, by the versions that are installed."""
    place = {"python_version": "3.12", "python_full_version": "3.12.4", "sys_platform": "linux", "extra": "",
             "platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix"}  # fmt: skip
    found, waiting = set(), list(names)
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name not in found:
            found.add(name)
            told = [Requirement(each) for each in importlib.metadata.requires(name) or []]
            waiting += [each.name for each in told if each.marker is None or each.marker.evaluate(place)]
    return found


def test_the_kit_has_all_that_the_package_needs_beside_an_image():
    project = tomllib.loads((record.ROOT / "pyproject.toml").read_text())["project"]
    wanted = needed(Requirement(each).name for each in project["dependencies"])
    lines = (record.ROOT / "benchmarks" / "kit.txt").read_text().splitlines()
    kit = {canonicalize_name(Requirement(line).name) for line in lines if not line.startswith("#")}
    kit |= {"promise"} & {word for word in (record.ROOT / "Makefile").read_text().split()}
    assert wanted - needed(IMAGE) <= kit <= wanted
