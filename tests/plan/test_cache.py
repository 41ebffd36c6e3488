"""Compiled steps on disk: what is damaged is not read, and two that finish together do not collide."""

import dataclasses
import signal

import pytest

from jaxmodels.config import Config
from jaxmodels.errors import UserError
from jaxmodels.models.mlp import MLPConfig
from jaxmodels.plan import cache, compile, topology

FACTS = {"mesh": {"data": 2}, "peak": 7}


def left(folder, text="HloModule step"):
    folder.mkdir()
    cache.leave(folder, FACTS, text)
    return folder


@pytest.mark.parametrize("name", ["facts.json", "program.hlo.gz"])
@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_a_damaged_result_is_none(tmp_path, name, damage):
    folder = left(tmp_path / "one")
    assert cache.intact(folder) == {**FACTS, "text": "HloModule step"}
    content = (folder / name).read_bytes()
    if damage == "gone":
        (folder / name).unlink()
    else:
        changed = content.replace(b"7", b"8") if name == "facts.json" else content[:-1] + bytes([content[-1] ^ 1])
        (folder / name).write_bytes(content[: len(content) // 2] if damage == "cut" else changed)
    assert cache.intact(folder) is None


def test_the_second_of_two_leaves_the_first_and_replaces_a_damaged_one(tmp_path):
    place = tmp_path / "key"
    cache.publish(left(tmp_path / "first"), place)
    cache.publish(left(tmp_path / "second", "another"), place)
    assert cache.intact(place) == {**FACTS, "text": "HloModule step"}
    (place / "facts.json").write_text("{")
    cache.publish(left(tmp_path / "third", "anew"), place)
    assert cache.intact(place) == {**FACTS, "text": "anew"}


def test_a_result_that_has_other_facts_than_are_known_now_is_not_read(tmp_path, monkeypatch):
    """The hash of a lowered step stays the same where code changes that says what is known of it."""
    places = []
    monkeypatch.setattr(compile.topologies, "check_compiler", lambda topology: None)
    monkeypatch.setattr(compile, "_read", lambda folder, topology: places.append(folder.name) or "found")
    changed = dataclasses.make_dataclass("Compiled", ["more"])
    for known in (compile.Compiled, compile.Compiled, changed):
        monkeypatch.setattr(compile, "Compiled", known)
        compile.compiled(Config(model=MLPConfig()), topology.parse("h100:1x2"), tmp_path, program="the same")
    assert places[0] == places[1] != places[2]


@pytest.mark.parametrize(
    ("code", "said", "told"),
    [
        (2, "Traceback\nerror: got this, try that\n", "got this, try that"),
        (-signal.SIGKILL, "", "SIGKILL ended it, which is how a machine short of memory"),
        (1, "Traceback\n  File\nValueError: odd\n", "code 1: ValueError: odd"),
        (1, "", "no message"),
    ],
)
def test_whatever_a_child_ends_with_is_one_line(code, said, told):
    line = compile.failure(topology.parse("h100:1x2"), code, said)
    assert told in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (UserError("got this,\ntry that"), "got this, try that"),
        (MemoryError(), "the machine is out of memory"),
        (RuntimeError("INVALID_ARGUMENT: No such compile option: 'xla_x'"), "got train.xla xla_x, which this compiler"),
        (ValueError("odd\nlayout"), "got v5e:2x2, expected a step that its compiler takes (ValueError: odd layout)"),
    ],
)
def test_an_error_of_the_child_is_one_line(error, told):
    line = compile.in_one_line(error, {"on": "v5e:2x2"})
    assert line.startswith(told)
    assert "\n" not in line


def test_a_compiler_that_hangs_is_ended_with_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(compile, "LIMIT", 0.01)
    with pytest.raises(UserError, match=r"got v5e:2x2, expected its compiler to finish within 0 min, .*try another"):
        compile._compile(tmp_path, topology.parse("v5e:2x2"))
