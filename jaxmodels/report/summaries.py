"""The sentences that a run chooses for summaries, in their texts."""

from __future__ import annotations

from jaxmodels.data.sentences import Documents
from jaxmodels.generate.extract import extractor
from jaxmodels.report.pieces import Marked, Piece
from jaxmodels.tasks.overlap import judge_summary
from jaxmodels.train.saved import Evaluation

SHOWN = 8


def pieces(evaluation: Evaluation) -> list[Piece]:
    """Mark the sentences that are chosen of the first texts, and those that were marked as a summary."""
    run, source = evaluation.run, evaluation.source
    if run.config.task.answers != "extract" or not isinstance(source, Documents):
        return []
    texts = []
    documents = source.documents[:SHOWN]
    found = extractor(run)([each.sentences for each in documents])
    for document, answer, marks in zip(documents, found, source.arrays["labels"], strict=False):
        if "error" in answer:
            continue
        names = {(True, True): "hit", (True, False): "said", (False, True): "missed", (False, False): ""}
        parts = []
        for number, sentence in enumerate(document.sentences):
            right = number < len(marks) and bool(marks[number] > 0)
            parts += [(sentence, names[number in answer["sentences"], right]), (" ", "")]
        one, two, longest = judge_summary(answer["summary"], document.summaries)
        texts.append((f"{document.summaries[0]} (ROUGE-1 {one:.2f}, -2 {two:.2f}, -L {longest:.2f})", parts))
    caption = (
        "The first texts, below a summary of each. Blue: chosen, and marked in the data; red: chosen, and not marked; "
        "underlined: marked, and not chosen."
    )
    return [Marked(texts, caption)] if texts else []
