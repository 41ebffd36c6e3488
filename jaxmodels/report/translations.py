"""A run's translations or summaries beside the references."""

from __future__ import annotations

from jaxmodels import data
from jaxmodels.report.pieces import Piece, Table
from jaxmodels.train.saved import Evaluation

COUNT = 12


def pieces(evaluation: Evaluation) -> list[Piece]:
    """Tabulate source, reference and hypothesis of the first held-out pairs."""
    run = evaluation.run
    if run.config.task.answers != "translation" or evaluation.source.tokenizer is None:
        return []
    from jaxmodels.generate.translation import translated

    pairs = data.open_pairs(run.config.data, "eval")
    sources, references = pairs[0][:COUNT], pairs[1][:COUNT]
    hypotheses = translated(run, sources)
    rows = list(zip(sources, map(" / ".join, references), hypotheses, strict=True))
    return [Table(("source", "reference", "hypothesis"), rows, "The first held-out pairs, by beam search.")]
