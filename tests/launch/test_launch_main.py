from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from launch.__main__ import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("", "got no place to launch to, expected one of local"),
        ("locl -- c.py", "got 'locl', expected one of local, try python -m launch local"),
        ("local --proceses 2 -- c.py", "got --proceses, expected one of --processes"),
        ("local --processes two -- c.py", "Error parsing --processes"),
        ("local --platform tpu -- c.py", "invalid choice 'tpu' for argument '--platform'"),
        ("local --processes 0 -- c.py", "got 0 processes with 1 devices each, expected at least one"),
        ("local c.py", "Unrecognized options: c.py"),
        ("local", "got nothing to train, expected a config after --"),
    ],
)
def test_a_mistake_is_one_line_and_2(arguments: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"launch: error: {said}")
    assert err.count("\n") == 1 and ", try " in err


def test_more_gpus_than_there_are_is_a_mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert main(["local", "--devices-per-process", "2", "--platform", "gpu", "--", "c.py"]) == 2
    assert "got 2 processes with 2 GPUs each, expected at most the 2 visible here" in capsys.readouterr().err


def test_gpus_are_shared_out_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    from launch.local import Local, _environments

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6,7")
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    environments = _environments(Local(processes=2, devices_per_process=2))
    assert [environment["CUDA_VISIBLE_DEVICES"] for environment in environments] == ["3,5", "6,7"]
    assert all("JAX_PLATFORMS" not in environment for environment in environments)


def test_help_tells_places_the_double_dash_and_exit_codes() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "launch", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert all(word in shown for word in ("local", " -- ", "75 saved", "--devices-per-process"))
