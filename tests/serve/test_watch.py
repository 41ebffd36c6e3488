"""A server that watches its classifier tells what `jaxmodels monitor` would of the records that it was sent."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from jaxmodels.errors import UserError
from jaxmodels.serve import monitor, window
from jaxmodels.serve.classes import Classes
from jaxmodels.serve.opened import Opened
from jaxmodels.serve.watch import Watch, open_watches
from tests.serve import test_inference
from tests.serve.serving import live

ROWS = 120


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    return Opened("tiny", classes=Classes.of_run(test_inference.made(tmp_path_factory.mktemp("run"))))


def saved(folder, images):
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image[..., 0]).save(folder / f"{i:04}.png")
    return folder


def told(server):
    """The metrics of drift by name, and by what they are of."""
    families = text_string_to_metric_families(server.ask("GET", "/metrics")[1])
    samples = [sample for family in families for sample in family.samples if sample.name.startswith("jaxmodels:drift")]
    return {(each.name.removeprefix("jaxmodels:drift_"), each.labels.get("what")): each.value for each in samples}


def test_windows_are_compared_as_the_command_does_and_alarms_are_counted(opened, tmp_path, capfd):
    before = saved(tmp_path / "before", test_inference.images(300))
    (watch,) = open_watches([f"tiny={before}"], [opened], ROWS, 1.0).values()
    usual = test_inference.images(ROWS + 30, 1)
    bright = test_inference.images(ROWS - 30, 2) // 2 + 128
    with live(opened, watch=watch) as server:
        for first in range(0, ROWS + 30, 50):
            assert server.ask("POST", test_inference.PATH, test_inference.asked(usual[first : first + 50]))[0] == 200
        server.until(lambda: watch.windows == 1)
        found = told(server)
        assert found["windows_total", None] == 1 and found["alarms_total", None] == 0
        tests = monitor.compare(
            watch.reference, window.read(opened.classes.run, str(saved(tmp_path / "now", usual[:ROWS])), "", ""), 3
        )
        for test in tests:
            assert found["value", test.name] == pytest.approx(test.value, abs=1e-6)
            assert found["p_value", test.name] == pytest.approx(test.corrected, abs=1e-6)
            assert found["alarm", test.name] == test.alarm
        assert "drift" not in capfd.readouterr().err.replace("/drift", "")
        # the thirty that were left over begin the next window
        assert server.ask("POST", test_inference.PATH, test_inference.asked(bright))[0] == 200
        server.until(lambda: watch.windows == 2)
        found = told(server)
        assert found["alarms_total", None] == 1 and found["alarm", "inputs/brightness"] == 1
        lines = [json.loads(line) for line in capfd.readouterr().err.splitlines() if '"event": "drift"' in line]
        assert len(lines) == 1 and "inputs/brightness" in lines[0]["alarms"] and lines[0]["model"] == "tiny"


def test_a_share_of_the_records_is_taken_and_what_comes_too_fast_is_left_out():
    features = {f"x[{i}]": np.zeros(50) for i in range(2)}
    reference = window.Window(features, np.full((50, 2), 0.5), 0)
    watch = Watch("tiny", reference, 2, rows=50, share=0.25)
    rows = [{"inputs": np.zeros(2, np.float32)}] * 4000
    shares = np.full((4000, 2), 0.5)
    shares[:400] = np.nan
    for _ in range(12):  # with nobody who looks at them yet
        watch.see(rows, shares)
    watch.start()
    watch.stop()
    assert watch.windows * 50 == pytest.approx(8 * 3600 * 0.25, rel=0.05) and watch.alarms == 0


def test_what_cannot_be_watched_is_refused_by_name(opened):
    several = Opened("many", classes=dataclasses.replace(opened.classes, several=True))
    artefact = Opened("artefact", classes=dataclasses.replace(opened.classes, run=None))
    for given, message in (
        (["tiny"], "expected NAME=FILE"),
        (["other=a.csv"], "expected the name of a run that predicts one class"),
        (["many=a.csv"], "expected the name of a run that predicts one class"),
        (["artefact=a.csv"], "expected the name of a run that predicts one class"),
        (["tiny=nowhere.csv"], "nowhere.csv"),
    ):
        with pytest.raises(UserError, match=message):
            open_watches(given, [opened, several, artefact], 100, 1.0)
