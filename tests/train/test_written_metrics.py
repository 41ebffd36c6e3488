"""What a run writes down of its metrics: a full disk loses no line, and a restart shows no step twice."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from jaxmodels import config as configs
from jaxmodels.train import metrics


def steps(run: Path) -> list[int]:
    """Of each line of metrics.jsonl."""
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_full_disk_is_said_once_and_no_line_of_the_metrics_is_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = metrics.Writer(tmp_path, configs.MetricsConfig(tensorboard=False), 0)

    class Full:
        def write(self, data: bytes) -> int:
            raise OSError(28, "No space left on device")

        def fileno(self) -> int:
            return file.fileno()

        def close(self) -> None:
            raise AssertionError

    file, writer.file = writer.file, Full()  # type: ignore[assignment]
    for step in (1, 2, 3):
        writer.add(step, {"train/loss": 1.0})
    writer.sync()
    assert caplog.text.count("metrics NOT written") == 1 and "No space left on device" in caplog.text
    writer.file = file
    writer.add(4, {"train/loss": 1.0})
    writer.close()
    assert steps(tmp_path) == [1, 2, 3, 4]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_ends_the_events_and_not_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboardX import record_writer

    monkeypatch.setattr(record_writer, "open_file", lambda path: Path("/dev/full").open("wb"))  # noqa: SIM115
    writer = metrics.Writer(tmp_path, configs.MetricsConfig(), 0)
    for step in range(1, 30):
        writer.add(step, {"train/loss": 1.0})
        writer.sync()
    writer.close()
    assert caplog.text.count("TensorBoard events") == 1 and "No space left on device" in caplog.text
    assert steps(tmp_path) == list(range(1, 30))


def test_tensorboard_shows_each_step_once_after_a_restart(tmp_path: Path) -> None:
    from tensorboardX.proto.event_pb2 import Event

    for start, stop in ((0, 4), (2, 5)):
        writer = metrics.Writer(tmp_path, configs.MetricsConfig(), start)
        for step in range(start + 1, stop + 1):
            writer.add(step, {"train/loss": 1 / step})
        writer.close()
        time.sleep(1.1)  # an event file is named by the second
    shown: dict[int, float] = {}
    for path in sorted((tmp_path / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            event, data = Event.FromString(data[12 : 12 + size]), data[16 + size :]
            if event.HasField("session_log"):  # as TensorBoard reads it: forget this step and all beyond
                shown = {step: value for step, value in shown.items() if step < event.step}
            for value in event.summary.value:
                assert event.step not in shown and value.tag == "train/loss"
                shown[event.step] = value.simple_value
    assert shown == pytest.approx({step: 1 / step for step in range(1, 6)})
