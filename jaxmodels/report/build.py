"""Builds the report page of runs, with its pictures."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxmodels.errors import UserError
from jaxmodels.report import (
    answers,
    attention,
    boxes,
    confusion,
    curves,
    latents,
    masks,
    recommendations,
    replies,
    saliency,
    samples,
    sounds,
    summaries,
    summary,
    timeline,
    transcripts,
    translations,
)
from jaxmodels.report.page import Part, Section, render
from jaxmodels.report.pieces import Picture, Piece
from jaxmodels.train.saved import Evaluation, imported, load_run, read_kept

log = logging.getLogger("jaxmodels")

PARTS: dict[str, Callable[[Evaluation], list[Piece]]] = {
    "Confusion": confusion.pieces,
    "Masks": masks.pieces,
    "Boxes": boxes.pieces,
    "Translations and summaries": translations.pieces,
    "Recommendations": recommendations.pieces,
    "Answers": answers.pieces,
    "Replies": replies.pieces,
    "Transcripts": transcripts.pieces,
    "Summaries": summaries.pieces,
    "Latents": latents.pieces,
    "Samples": samples.pieces,
    "Sounds": sounds.pieces,
    "Attention": attention.pieces,
    "Saliency": saliency.pieces,
}
"""Heading -> function that draws it for one run; without pieces there is no heading."""


def write(runs: Mapping[str, Path], out: Path | None, split: str | None, best: bool) -> Path:
    """Write the page and return its path. What cannot be drawn is named in the log and on the page; the rest is
    shown.

    Raises:
        UserError: a run has no such split, or no best checkpoint, and that was asked for.
    """
    several, given = len(runs) > 1, {} if split is None else {"eval_split": split}
    opened: dict[str, Evaluation] = {}
    columns, closed = [], []
    for name, run in runs.items():
        if given or best:
            evaluation, why = open_run(run, best, given), ""
        else:
            evaluation, why = attempt(f"the checkpoint of {name}", lambda run=run: open_run(run, best, given))
        if why:
            closed.append(Part((), name if several else "", f"Without the checkpoint: {why}"))
        values = None
        if evaluation is not None:
            opened[name] = evaluation
            values, _ = attempt(f"the metrics of {name}", lambda evaluation=evaluation: evaluated(evaluation, split))
        columns.append(summary.column(name, run, evaluation, curves.last(run) if values is None else values))
    sections = [
        Section("Runs" if several else "Run", [part("what was run", lambda: summary.facts(columns)), *closed]),
        Section("Metrics", [part("the metrics", lambda: summary.results(columns))]),
    ]
    if any(each.rows for each in columns):
        sections.append(Section("Curves", [part("the curves", lambda: [Picture("curves", curves.overlay(runs))])]))
    happened = part("the timeline", lambda: timeline.show(runs))
    if happened.pieces or happened.note:
        sections.append(Section("Timeline", [happened]))
    for title, pieces in PARTS.items():
        parts = [
            part(
                f"{title.lower()} of {name}",
                lambda evaluation=evaluation, pieces=pieces: pieces(evaluation),
                name if several else "",
            )
            for name, evaluation in opened.items()
        ]
        if parts := [each for each in parts if each.pieces or each.note]:
            sections.append(Section(title, parts))
    shown = [each for each in sections if any(part.pieces or part.note for part in each.parts)]
    return save(out or next(iter(runs.values())) / "report", "Report: " + ", ".join(runs), shown)


def open_run(run: Path, best: bool, given: Mapping[str, Any]) -> Evaluation:
    """The run with the data that it is evaluated on."""
    if not given and imported(run, read_kept(run)):
        raise UserError("the run was imported and has no data of its own, try jaxmodels eval with other data")
    return load_run(run, best=best).evaluation(given)


def evaluated(evaluation: Evaluation, split: str | None) -> Mapping[str, float]:
    """Return the metrics of the checkpoint: as training recorded them, or measured now if it did not."""
    rows = evaluation.run.metrics if split is None else []
    row = next((row for row in rows if row["step"] == evaluation.run.step), {})
    found = {name: value for name, value in row.items() if name.startswith("eval/")}
    return found or {f"eval/{name}": value for name, value in evaluation.measure().items()}


def attempt(what: str, make: Callable[[], Any]) -> tuple[Any, str]:
    """Return the result of `make`, or None and the reason why it failed, which is logged."""
    try:
        return make(), ""
    except Exception as error:
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        reason = " ".join(f"{kind}{error}".split())[:300]
        log.warning("the report lacks %s: %s", what, reason)
        return None, reason


def part(what: str, make: Callable[[], list[Piece]], run: str = "") -> Part:
    """Make a part of the page, or a note about what is missing."""
    made, reason = attempt(what, make)
    return Part(made or (), run, f"Missing {what}: {reason}" if reason else "")


def save(folder: Path, title: str, sections: Sequence[Section]) -> Path:
    """Write the page and its pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    images, names = {}, set()
    for section in sections:
        for each in section.parts:
            for piece in each.pieces:
                if isinstance(piece, Picture):
                    images[piece] = piece.png()
                    own = "".join(c if c.isalnum() or c in "-_." else "-" for c in each.run)
                    name = stem = f"{own}{'-' if own else ''}{piece.name}"
                    count = 1
                    while name in names:  # runs whose names differ only in characters that are replaced
                        count += 1
                        name = f"{stem}-{count}"
                    names.add(name)
                    (folder / f"{name}.png").write_bytes(images[piece])
    page = folder / "report.html"
    # half of a surrogate pair, which a folder's name may have, cannot be part of a page
    page.write_text(render(title, sections, images), encoding="utf-8", errors="backslashreplace")
    return page
