"""The metrics that a run writes: a full disk loses no line, and a restart shows no step twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jaxmodels.train import metrics


def steps(run: Path) -> list[int]:
    """Of each line of metrics.jsonl."""
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_full_disk_is_said_once_and_no_line_of_the_metrics_is_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record = metrics.Record(tmp_path, 0)

    class Full:
        def write(self, data: bytes) -> int:
            raise OSError(28, "No space left on device")

        def fileno(self) -> int:
            return file.fileno()

        def close(self) -> None:
            raise AssertionError

    file, record.file = record.file, Full()  # type: ignore[assignment]
    for step in (1, 2, 3):
        record.scalars(step, {"train/loss": 1.0})
    record.flush()
    assert caplog.text.count("metrics NOT written") == 1 and "No space left on device" in caplog.text
    record.file = file
    record.scalars(4, {"train/loss": 1.0})
    record.close()
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
    record = metrics.Record(tmp_path, 2, expected=2)
    assert caplog.text.count("\n") == 1 and "has no metrics of a step in line 2; skipped" in caplog.text
    record.scalars(3, {"train/loss": 0.25})
    record.close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == GOOD + b'{"step": 3, "train/loss": 0.25}\n'
    assert metrics.read(tmp_path)[1:] == [{"step": 2, "train/loss": 0.5}, {"step": 3, "train/loss": 0.25}]


def test_lines_of_one_step_are_one_and_in_order(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 2, "a": 1}\n{"step": 1, "a": 1}\n{"step": 2, "a": 3, "b": 2}\n')
    assert metrics.read(tmp_path) == [{"step": 1, "a": 1}, {"step": 2, "a": 3, "b": 2}]


@pytest.mark.parametrize("hole", ["file", "line"])
def test_metrics_that_are_missing_are_said_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, hole: str
) -> None:
    record = metrics.Record(tmp_path, 0)
    for step in (10, 20, 30):
        record.scalars(step, {"train/loss": 1.0})
    record.flush()
    assert record.count == 3
    record.close()
    path = tmp_path / "metrics.jsonl"
    if hole == "file":
        path.unlink()
    else:
        path.write_text("".join(line for line in path.open() if '"step": 20' not in line))
    record = metrics.Record(tmp_path, 30, expected=3)
    record.close()
    missing = 3 if hole == "file" else 1
    assert caplog.text.count("\n") == 1 and f"lacks {missing} of the 3 lines up to step 30" in caplog.text


def test_a_line_has_what_an_evaluation_is_judged_by_before_the_parts_of_its_loss():
    values = {f"eval/{name}": 1.0 for name in ("loss", "box_loss", "class_loss", "object_loss", "ap", "ap50", "ap/cat")}
    assert list(metrics.main_metrics(values)) == ["eval/loss", "eval/ap", "eval/ap50", "eval/box_loss"]
