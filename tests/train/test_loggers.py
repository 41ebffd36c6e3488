"""What a run reports: to TensorBoard and to loggers from outside, none of which can harm the run."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxmodels import cli
from jaxmodels.config import Config
from jaxmodels.models.mlp import MLPConfig
from jaxmodels.train.display import Display
from jaxmodels.train.loggers import Logger, Report, TensorBoard, opened
from jaxmodels.train.metrics import Record, read

CONFIG = Config(model=MLPConfig())


def started(run: Path, step: int, **loggers: Logger) -> Report:
    report = Report(Record(run, step), Display("none", 100, "tokens"), loggers)
    report.start(run, CONFIG, step)
    return report


def events(run: Path) -> list[Any]:
    """What is in the event files of a run, in order."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted((run / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            found.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return found


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_ends_the_events_and_not_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboardX import record_writer

    monkeypatch.setattr(record_writer, "open_file", lambda path: Path("/dev/full").open("wb"))  # noqa: SIM115
    report = started(tmp_path, 0, tensorboard=TensorBoard())
    for step in range(1, 30):
        report.scalars(step, {"train/loss": 1.0})
        report.flush()
    report.close()
    assert caplog.text.count("logger tensorboard failed") == 1 and "No space left on device" in caplog.text
    assert [row["step"] for row in read(tmp_path)] == list(range(1, 30))


def test_tensorboard_shows_each_step_once_after_a_restart(tmp_path: Path) -> None:
    for start, stop in ((0, 4), (2, 5)):
        report = started(tmp_path, start, tensorboard=TensorBoard())
        for step in range(start + 1, stop + 1):
            report.scalars(step, {"train/loss": 1 / step})
        report.close()
        time.sleep(1.1)  # an event file is named by the second
    shown: dict[int, float] = {}
    for event in events(tmp_path):
        if event.HasField("session_log"):  # as TensorBoard reads it: forget this step and all beyond
            shown = {step: value for step, value in shown.items() if step < event.step}
        for value in event.summary.value:
            assert event.step not in shown and value.tag == "train/loss"
            shown[event.step] = value.simple_value
    assert shown == pytest.approx({step: 1 / step for step in range(1, 6)})


def test_tensorboard_shows_images(tmp_path: Path) -> None:
    report = started(tmp_path, 0, tensorboard=TensorBoard())
    report.images(3, "samples", np.full((4, 8, 8, 1), 200, np.uint8))
    report.close()
    (value,) = [value for event in events(tmp_path) for value in event.summary.value]
    assert value.tag == "samples" and value.image.encoded_image_string.startswith(b"\x89PNG")


class Kept(Logger):
    """Keeps what it is told, and fails where it is asked to."""

    def __init__(self, fails: str = "", error: BaseException | None = None) -> None:
        self.fails, self.error, self.told = fails, error or ValueError("no\nnetwork"), list[Any]()

    def take(self, name: str, *what: Any) -> None:
        if name == self.fails:
            raise self.error
        self.told.append((name, *what))

    def start(self, run: Path, config: Config, step: int) -> None:
        self.take("start", step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.take("scalars", step, dict(values))
        values.clear()  # type: ignore[attr-defined]

    def flush(self) -> None:
        self.take("flush")

    def close(self) -> None:
        self.take("close")


def told(report: Report) -> None:
    for step in (1, 2, 3):
        report.scalars(step, {"train/loss": float(step)})
    report.flush()
    report.close()


@pytest.mark.parametrize("error", [ValueError("no\nnetwork"), SystemExit(1)], ids=repr)
@pytest.mark.parametrize("where", ["start", "scalars", "flush", "close"])
def test_a_logger_that_fails_is_named_once_and_harms_neither_the_run_nor_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, where: str, error: BaseException
) -> None:
    good = Kept()
    told(started(tmp_path, 0, bad=Kept(where, error), good=good))
    rows = [{"step": step, "train/loss": float(step)} for step in (1, 2, 3)]
    assert read(tmp_path) == rows, "nor does one that changes what it was given"
    assert caplog.text.count("\n") == 1 and f"logger bad failed ({type(error).__name__}" in caplog.text
    scalars = [("scalars", step, {"train/loss": float(step)}) for step in (1, 2, 3)]
    assert good.told == [("start", 0), *scalars, ("flush",), ("close",)]


def test_a_logger_that_cannot_be_made_is_named_and_the_others_are(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Logger):
        def __init__(self) -> None:
            raise OSError("no account")

    assert list(opened({"broken": Broken, "kept": Kept})) == ["kept"]
    assert "logger broken failed (OSError: no account)" in caplog.text


OUTSIDE = """
import json
import jaxmodels

class Lines(jaxmodels.Logger):
    def start(self, run, config, step):
        self.file = (run / "lines.txt").open("a")
        print("start", step, type(config.model).__name__, file=self.file)

    def scalars(self, step, values):
        print(step, *sorted(name for name in values if name.endswith("/loss")), file=self.file)

    def close(self):
        print("close", file=self.file)
        self.file.close()

NONE = 5
"""


PLAIN = """
from jaxmodels.config import *
from jaxmodels.models.mlp import MLPConfig

def get_config():
    return Config(
        model=MLPConfig(input_shape=(4,), classes=3, hidden=()),
        task=Classification(),
        data=Synthetic(batch_size=8),
        eval=Eval(batches=1),
        metrics=Metrics(every=1, progress="none"),
    )
"""


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a logger in a package that is not this one."""
    (tmp_path / "package/my_logs").mkdir(parents=True)
    (tmp_path / "package/my_logs/__init__.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(str(tmp_path / "package"))
    return "my_logs:Lines"


def test_a_logger_of_another_package_is_told_all_and_goes_on_with_a_resumed_run(
    tmp_path: Path, outside: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plain.py").write_text(PLAIN)
    command = ["train", str(tmp_path / "plain.py"), "--run-dir", str(tmp_path / "run")]
    assert cli.main([*command, "--metrics.loggers", outside, "--train.steps", "2"]) == 0
    resumed = [*command, "--metrics.loggers", outside, "--train.steps", "3", "--resume", "must"]
    assert cli.main(resumed) == 0
    assert (tmp_path / "run/lines.txt").read_text().splitlines() == [
        "start 0 MLPConfig", "1 train/loss", "2 train/loss", "2 eval/loss", "close",
        "start 2 MLPConfig", "3 train/loss", "3 eval/loss", "close",
    ]  # fmt: skip
    assert not (tmp_path / "run/tensorboard").exists()
    assert json.loads((tmp_path / "run/config.json").read_text())["metrics"]["loggers"] == [outside]
    assert [row["step"] for row in read(tmp_path / "run")] == [1, 2, 3]
    capsys.readouterr()
    for name, said in (
        ("my_logs:NONE", "got logger my_logs:NONE, which is an int, expected a class that derives from Logger"),
        ("tensorbord", "did you mean 'tensorboard'?"),
        ("not_there:Lines", "not_there"),
    ):
        assert cli.main([*command, "--metrics.loggers", name, "--train.steps", "4", "--resume", "must"]) == 2
        errors = capsys.readouterr().err
        assert said in errors and errors.count("\n") == 1
