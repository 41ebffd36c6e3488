"""ROUGE equals that of the package rouge-score, stemmed, of several references."""

import numpy as np
import pytest

from jaxmodels.tasks.overlap import judge_summary

pytestmark = pytest.mark.parity
scorers = pytest.importorskip("rouge_score.rouge_scorer", reason="needs the parity extra: rouge-score")

WORDS = """the training of neural networks is improved, generalization! learned learning flies dying news relational
conditionally state-of-the-art C++ 3.5% naïve Über un-trained skies happiness""".split()
NAMES = ("rouge1", "rouge2", "rougeL")


def test_rouge_is_that_of_rouge_score_with_its_stemmer():
    scorer, rng = scorers.RougeScorer(NAMES, use_stemmer=True), np.random.default_rng(0)
    draw = lambda: " ".join(rng.choice(WORDS, rng.integers(0, 25)))  # noqa: E731
    cases = [("", ["words"]), ("words", [""]), ("...", ["—"]), ("one", ["one"])]
    for summary, references in [*cases, *((draw(), [draw() for _ in range(rng.integers(1, 4))]) for _ in range(300))]:
        scores = [scorer.score(reference, summary) for reference in references]
        expected = [max(each[name].fmeasure for each in scores) for name in NAMES]
        assert judge_summary(summary, references) == pytest.approx(expected, abs=1e-12)
