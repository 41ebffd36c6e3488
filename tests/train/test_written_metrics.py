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


GOOD = b'{"step": 1, "train/loss": 1.5}\n{"step": 2, "train/loss": 0.5}\n'
NONE = [b"\xff\xfe\x00", b"5", b"null", b"[]", b"[" * 100_000, b'{"train/loss": 1}', b'{"step": "2"}', b'{"step": 1.5}',
        b'{"step": true}', b'{"step": -1}', b'{"step": 1' + b"0" * 5000 + b"}", b'{"step": 2, "train/loss": "low"}',
        b'{"step": 2, "train/loss": null}', b"", '{"step": 2, "a\u2028'.encode(), b"\x1b[2J"]  # fmt: skip


@pytest.mark.parametrize("line", NONE, ids=lambda line: line[:24])
def test_a_line_that_is_none_is_said_and_left_out_and_the_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, line: bytes
) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(GOOD[:31] + line + b"\n" + GOOD[31:] + b'{"step": 3, "trai')
    writer = metrics.Writer(tmp_path, configs.MetricsConfig(tensorboard=False), 2, expected=2)
    assert caplog.text.count("\n") == 1 and "has no metrics of a step in line 2; left out" in caplog.text
    writer.add(3, {"train/loss": 0.25})
    writer.close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == GOOD + b'{"step": 3, "train/loss": 0.25}\n'
    assert metrics.read(tmp_path)[1:] == [{"step": 2, "train/loss": 0.5}, {"step": 3, "train/loss": 0.25}]


def test_lines_of_one_step_are_one_and_in_order(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 2, "a": 1}\n{"step": 1, "a": 1}\n{"step": 2, "a": 3, "b": 2}\n')
    assert metrics.read(tmp_path) == [{"step": 1, "a": 1}, {"step": 2, "a": 3, "b": 2}]


@pytest.mark.parametrize("hole", ["file", "line"])
def test_metrics_that_are_missing_are_said_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, hole: str
) -> None:
    writer = metrics.Writer(tmp_path, configs.MetricsConfig(tensorboard=False), 0)
    for step in (10, 20, 30):
        writer.add(step, {"train/loss": 1.0})
    writer.sync()
    assert writer.count == 3
    writer.close()
    path = tmp_path / "metrics.jsonl"
    if hole == "file":
        path.unlink()
    else:
        path.write_text("".join(line for line in path.open() if '"step": 20' not in line))
    writer = metrics.Writer(tmp_path, configs.MetricsConfig(tensorboard=False), 30, expected=3)
    writer.close()
    missing = 3 if hole == "file" else 1
    assert caplog.text.count("\n") == 1 and f"lacks {missing} of the 3 lines up to step 30" in caplog.text


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
