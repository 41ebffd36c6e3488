"""`jaxmodels monitor RUN --reference FILE --current FILE`: whether data are still what they were."""

from __future__ import annotations

import sys
from pathlib import Path

from jaxmodels import config as configs
from jaxmodels.errors import UserError, check_place
from jaxmodels.tasks.task import tasks_that_answer

ALARM = 3
"""The exit code if something raises an alarm; 0 if nothing does."""


def monitor(
    run: str,
    /,
    reference: str,
    current: str,
    label_field: str = "",
    group_field: str = "",
    out: Path | None = None,
    best: bool = False,
) -> int:
    """Compare current records with earlier ones, as a classifier sees them; exit with 3 if something raises an alarm.

    Prints one line of JSON, and writes a page of pictures. Inputs, predicted classes and confidence are compared by
    tests whose p-values are corrected for their number; with labels also accuracy, by group, and calibration.

    Args:
        run: run directory of a classifier.
        reference: earlier records, such as those it was evaluated on: a table, a folder of images, or lines.
        current: the records to compare with them.
        label_field: table column of the true classes; default: that of the training data, if it is there. Images are
            labeled by the names of their folders.
        group_field: table column by which accuracy is also compared.
        out: folder of the page; default: monitor/ in the run directory.
        best: use the best checkpoint instead of the newest.
    """
    from jaxmodels.generate.classes import class_names
    from jaxmodels.serve import monitor as comparison
    from jaxmodels.serve import window
    from jaxmodels.train import load_run
    from jaxmodels.train.run import compilation_cache

    cfg, _ = configs.read(run)
    if cfg.task.answers != "class":
        raise UserError(
            f"got a run of task {cfg.task.kind}, expected one that predicts one class of a record "
            f"({tasks_that_answer('class')}), try jaxmodels eval {run}"
        )
    folder = out or Path(run) / "monitor"
    check_place(folder, "--out", folder=True)
    compilation_cache()
    opened = load_run(run, best=best)
    before, now = (window.read(opened, path, label_field, group_field) for path in (reference, current))
    classes = opened.model.config.classes
    tests = comparison.compare(before, now, classes)
    names = class_names(opened)
    page = comparison.page(folder, run, tests, before, now, names)
    facts = {"run": run, "step": opened.step, "page": str(page)}
    print(comparison.line(tests, before, now, **facts))
    alarms = [test.name for test in tests if test.alarm]
    print(f"{page}: {', '.join(alarms) if alarms else 'no'} alarm{'s' * (len(alarms) > 1)}", file=sys.stderr)
    return ALARM if alarms else 0
