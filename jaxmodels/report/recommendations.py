"""What a run recommends to users of the held-out data, beside what they took then."""

from __future__ import annotations

import numpy as np

from jaxmodels.generate.recommend import names_of, recommender
from jaxmodels.report.pieces import Piece, Table
from jaxmodels.tasks.ranking import AT
from jaxmodels.train.saved import Evaluation

COUNT = 8
"""Users that are shown, spread evenly over the data."""
LAST = 5
"""Items of a history that are shown, its last ones."""
HIT = "\N{CHECK MARK} "


def pieces(evaluation: Evaluation) -> list[Piece]:
    """Tabulate a few histories, the ranked list after each, with a mark on its hits, and what was taken."""
    run = evaluation.run
    if run.config.task.answers != "items":
        return []
    names = names_of(run)
    count = len(evaluation.source)
    at = np.unique(np.linspace(0, count - 1, min(COUNT, count)).astype(np.int64))
    batch = evaluation.source.batch(at, np.zeros_like(at))
    found = recommender(run)([{name: x[row] for name, x in batch.items()} for row in range(len(at))])
    rows = []
    for row, answer in enumerate(found):
        items = answer.get("items", ())
        past = batch["tokens"][row][batch["segment_ids"][row] > 0][-LAST:]
        taken = {names[i] for i in batch["held"][row].tolist() if i >= 0}
        listed = [f"{place}. {HIT if name in taken else ''}{name}" for place, name in enumerate(items, 1)]
        missed = sorted(taken - set(items))
        more = [f"and {len(missed) - AT} more"] * (len(missed) > AT)
        rows.append(("\n".join(names[i] for i in past), "\n".join(listed), "\n".join([*missed[:AT], *more])))
    head = ("last items of the history", f"the first {AT} of the ranking", "taken, and not among them")
    return [Table(head, rows, f"Users of the held-out data; {HIT.strip()} marks an item that was taken.")]
