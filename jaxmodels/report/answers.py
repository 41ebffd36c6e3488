"""A run's answers in the texts that they are of, with the right ones."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from jaxmodels.data.questions import Questions
from jaxmodels.generate.answer import Question, answerer
from jaxmodels.report.pieces import Marked, Piece
from jaxmodels.tasks.overlap import judge_answer
from jaxmodels.train.saved import Evaluation

LOOKED_AT = 64
SHOWN = 6
"""Of the questions that are looked at, so many that are answered well, and so many that are not."""


def pieces(evaluation: Evaluation) -> list[Piece]:
    """Mark the answers to some questions in their contexts: the surest that are right, and the surest that are not."""
    run, source = evaluation.run, evaluation.source
    if run.config.task.answers != "answer" or not isinstance(source, Questions):
        return []
    step = max(1, len(source.questions) // LOOKED_AT)  # over all of the set, whose neighbors are of one text
    asking = [
        (question, Question("", question.question, question.context, [source.windows[i] for i in windows]))
        for number in range(0, step * min(LOOKED_AT, len(source.questions)), step)
        for question, windows in [(source.questions[number], (source.of == number).nonzero()[0].tolist())]
    ]
    found = answerer(run)([each for _, each in asking])
    shown: dict[bool, list[tuple[float, str, list[tuple[str, str]]]]] = {True: [], False: []}
    for (question, _), answer in zip(asking, found, strict=True):
        if "error" in answer:
            continue
        exact, overlap = judge_answer(answer["answer"], [each.text for each in question.answers])
        given = None if answer["start"] is None else (answer["start"], answer["end"])
        right = [(each.start, each.start + len(each.text)) for each in question.answers]
        heading = f"{question.question} (F1 {overlap:.2f}, probability {answer['probability']:.0%})"
        shown[bool(exact)].append((answer["probability"], heading, marked(question.context, given, right)))
    made: list[Piece] = []
    for right, what in ((True, "answered as expected"), (False, "answered otherwise")):
        best = sorted(shown[right], key=lambda each: -each[0])[:SHOWN]
        if best:
            caption = (
                f"The surest of {len(shown[right])} questions of {len(asking)} that are {what}. Blue: said, and right; "
                "red: said, and in no right answer; underlined: right, and not said."
            )
            made.append(Marked([(heading, parts) for _, heading, parts in best], caption))
    return made


def marked(text: str, given: tuple[int, int] | None, right: Sequence[tuple[int, int]]) -> list[tuple[str, str]]:
    """Cut a text at the ends of what is said and of what is right, each from one character to another."""
    ends = sorted({0, len(text), *(given or ()), *(end for span in right for end in span)})
    names = {(True, True): "hit", (True, False): "said", (False, True): "missed", (False, False): ""}
    parts = []
    for start, end in itertools.pairwise(ends):
        inside = given is not None and given[0] <= start < given[1]
        parts.append((text[start:end], names[inside, any(a <= start < b for a, b in right)]))
    return parts
