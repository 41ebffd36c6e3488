"""Translations that a run makes, beside the given ones."""

from __future__ import annotations

import numpy as np

from jaxmodels.report.pieces import Piece, Table
from jaxmodels.report.saved import Saved, length

COUNT = 12
BEAMS = 4


def pieces(saved: Saved) -> list[Piece]:
    """Source, reference and hypothesis of the first pairs that are held out."""
    tokenizer = saved.source.tokenizer
    if saved.cfg.task.name != "seq2seq" or tokenizer is None:
        return []
    from jaxmodels.generate.translation import translate_texts

    batch = saved.examples(0, COUNT)

    def texts(ids: np.ndarray, segments: np.ndarray | None) -> list[str]:
        found = []
        for row, each in enumerate(ids):
            each = each[: length(None if segments is None else segments[row], each, len(each))]
            found.append(tokenizer.decode(each[(each != tokenizer.end) & (each >= 0)]).strip())
        return found

    sources = texts(batch["inputs"], batch.get("segment_ids"))
    references = texts(np.maximum(batch["targets"], 0), batch.get("target_segment_ids"))
    hypotheses = translate_texts(saved.model, saved.params["model"], tokenizer, sources, beams=BEAMS)
    rows = list(zip(sources, references, hypotheses, strict=True))
    return [Table(("source", "reference", "hypothesis"), rows, f"The first held-out pairs; {BEAMS} beams.")]
