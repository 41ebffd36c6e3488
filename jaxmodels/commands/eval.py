"""`jaxmodels eval RUN`: metrics of a run on held-out data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_origin, get_type_hints

import tyro

from jaxmodels.config import TFDS, docs
from jaxmodels.data.section import FilesConfig, RecordsConfig, SplitsConfig
from jaxmodels.errors import UserError, check_place, printable
from jaxmodels.fields import Beams, Section


def _as_it_is(owner: type, *names: str) -> list[tuple[str, Any, Any]]:
    """Return the fields of a section that keep the run's values unless they are given."""
    hints, about = get_type_hints(owner, include_extras=True), docs(owner)
    several = {name for name in names if get_origin(hints[name]) is tuple}
    return [
        (
            name,
            Annotated[hints[name] if name in several else hints[name] | None, tyro.conf.arg(help=about[name])],
            dataclasses.field(default=() if name in several else None),
        )
        for name in names
    ]


_FIELDS = (
    *_as_it_is(FilesConfig, "path"),
    *_as_it_is(TFDS, "dir"),
    *_as_it_is(SplitsConfig, "name", "eval_split"),
    *_as_it_is(RecordsConfig, "input_field", "label_field", "target_field", "group_field", "captions", "class_names"),
    *_as_it_is(RecordsConfig, "bad_records"),
)


@dataclass(frozen=True)
class _Kind(Section, section="data"):
    source: Annotated[str | None, tyro.conf.arg(name="data", prefix_name=False)] = None
    """Kind of data, if it differs from the run's: table, images, text, tokens, tfds, huggingface."""

    def given(self) -> dict[str, Any]:
        """Return the fields that are set."""
        return {name: value for name, value in vars(self).items() if value not in (None, ())}


if TYPE_CHECKING:
    EvalData = _Kind
else:
    EvalData = dataclasses.make_dataclass("EvalData", _FIELDS, bases=(_Kind,), frozen=True)
    EvalData.__doc__ = "Data to evaluate on instead of the run's own. Classes and tokenizer stay the run's."

OWN_DATA = EvalData()
"""What the run was evaluated on."""


def evaluate(
    run: str,
    /,
    split: str | None = None,
    best: bool = False,
    json: Path | None = None,
    data_dir: str | None = None,
    classifier: Path | None = None,
    beams: Beams | None = None,
    data: EvalData = OWN_DATA,
) -> None:
    """Compute metrics of a run on held-out data, its own or other data; for a translation run, also BLEU.

    Args:
        run: run directory.
        split: split to evaluate on instead of the run's own (tfds, huggingface).
        best: use the best checkpoint instead of the newest.
        json: also write the metrics to this file.
        data_dir: TFDS data directory to use instead of the run's own.
        classifier: a classifier's run, which judges 1,000 images that a generative model generates.
        beams: width of the beam search for translations; default 4; 1: greedy.
        data: data to evaluate on instead of the run's own.
    """
    from jaxmodels.generate import judge
    from jaxmodels.parallel import progress
    from jaxmodels.train import load_run
    from jaxmodels.train import run as runs

    progress.begin()
    runs.compilation_cache()
    if json is not None:
        check_place(json, "--json")
    given = data.given() | {
        name: value for name, value in (("eval_split", split), ("dir", data_dir)) if value is not None
    }
    opened = load_run(run, best=best).evaluation(given)
    translates = opened.config.task.answers == "translation" and opened.config.data.real
    if beams is not None and not translates:
        raise UserError(f"got --beams {beams} for a run of task {opened.config.task.kind}, try it without")
    judged = judge.judge_images(opened, classifier) if classifier is not None else {}
    found = opened.measure()
    if translates:
        found |= judge.judge_translations(opened, 4 if beams is None else beams)
    found |= judged
    print(printable(f"{run}, step {opened.step}, on {opened.source.describe()}\n{table(found)}"))
    if json is not None:
        facts = {"run": run, "step": opened.step, "data": opened.source.describe()}
        json.write_text(dumps({**facts, **found}, indent=2) + "\n")


def table(found: dict[str, float]) -> str:
    """Format metrics: single ones in a column, those of classes and groups as rows of a table."""
    lines = [f"  {name:18s} {value:.6g}" for name, value in found.items() if "/" not in name]
    nested = [name for name in found if "/" in name]
    for kind in dict.fromkeys("group" if name.startswith("group/") else "class" for name in nested):
        cells: dict[str, dict[str, float]] = {}
        for name in nested:
            if name.startswith("group/") != (kind == "group"):
                continue
            first, second = name.split("/", 1)
            if kind == "group":
                first, second = second.split("/", 1)
                if "/" in second:  # classes within a group are only in the file
                    continue
            row, column = (first, second) if kind == "group" else (second, first)
            if column == "gap" or first == "gap":
                row, column = (f"gap in {second}", "difference")
                if "/" in second:
                    continue
            cells.setdefault(row, {})[column] = found[name]
        columns = list(dict.fromkeys(column for row in cells.values() for column in row))
        width = max(map(len, [kind, *cells]))
        lines.append("\n  " + "  ".join([f"{kind:{width}s}", *(f"{column:>12s}" for column in columns)]))
        for row, values in cells.items():
            shown = (f"{values[column]:12.4f}" if column in values else " " * 12 for column in columns)
            lines.append("  " + "  ".join([f"{row:{width}s}", *shown]))
    return "\n".join(lines)
