"""`jaxmodels report RUN...`: a page of curves and pictures of runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from jaxmodels import config as configs
from jaxmodels.errors import UserError, check_place


def report(runs: tuple[str, ...], /, out: Path | None = None, split: str | None = None, best: bool = False) -> None:
    """Write one HTML page about what runs did, with its pictures beside it.

    Args:
        runs: run directories; their curves are overlaid.
        out: where report.html goes; default: report/ in the first run's directory.
        split: split to evaluate on instead of the runs' own.
        best: use the best checkpoints instead of the newest.
    """
    from jaxmodels.report.build import write
    from jaxmodels.train.run import compilation_cache

    compilation_cache()
    if not runs:
        raise UserError("got no run, expected one or more run directories, try jaxmodels report runs/NAME")
    for run in runs:
        cfg, _ = configs.read(run)  # fails if it is not a run
        if split is not None and not hasattr(cfg.data, "eval_split"):
            raise UserError(
                f"got --split {split!r} for {run}, whose data {cfg.data.kind} has no splits, "
                "expected data with named splits, try it without"
            )
        if split is not None:
            cfg.data.evaluated_on({"eval_split": split})  # refuses it for a table without a column of splits
    check_place(out or Path(runs[0]) / "report", "--out", folder=True)
    found = write({name: Path(run) for name, run in zip(names(runs), runs, strict=True)}, out, split, best)
    print(f"{found}, and {len(list(found.parent.glob('*.png')))} pictures beside it")


def names(runs: Sequence[str]) -> list[str]:
    """Return a short name for each run: its folder's name, or the whole path if two are equal."""
    short = [Path(run).resolve().name for run in runs]
    many = Counter(short)
    found = [run if many[name] > 1 else name for run, name in zip(runs, short, strict=True)]
    if len(set(found)) < len(found):
        raise UserError(f"got runs {', '.join(runs)}, expected each once, try {' '.join(dict.fromkeys(runs))}")
    return found
