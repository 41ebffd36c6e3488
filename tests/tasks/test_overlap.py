"""Answers are judged as by SQuAD's scripts."""

import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxmodels.tasks.overlap import judge_answer, plain_words

PARTS = ["The", "a", "an", "theory", "U.S.", "u s", "don't", "dont", "1,000", "—", "...", "  ", "Café", "über", "\n"]


def script(answer, right):
    """Both measures of SQuAD 2.0's script, by its rules and not by its code."""

    def plain(text):
        kept = "".join(c for c in text.lower() if c not in string.punctuation)
        return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())

    def f1(said, expected):
        a, b = said.split(), expected.split()
        if not a or not b:
            return float(a == b)
        left, common = list(b), 0
        for word in a:
            if word in left:
                left.remove(word)
                common += 1
        precision, recall = common / len(a), common / len(b)
        return 2 * precision * recall / (precision + recall) if common else 0.0

    said, expected = plain(answer), [each for each in map(plain, right) if each] or [""]
    return max(float(said == each) for each in expected), max(f1(said, each) for each in expected)


texts = st.lists(st.sampled_from(PARTS), max_size=5).map(" ".join)


@given(texts, st.lists(texts, max_size=3))
def test_exact_match_and_f1_are_those_of_squads_script(answer, right):
    assert judge_answer(answer, right) == pytest.approx(script(answer, right))


@pytest.mark.parametrize(
    ("answer", "right", "expected"),
    [
        ("The U.S.", ["us"], (1, 1)),  # articles and signs do not count
        ("two delegates", ["ten delegates", "two"], (0, 2 / 3)),  # the best of the right answers
        ("to be to be", ["to be"], (0, 2 / 3)),  # words count as often as they occur
        ("", [], (1, 1)),
        ("something", [], (0, 0)),
        ("", ["something"], (0, 0)),
    ],
)
def test_answers_are_compared_as_bags_of_words_without_articles_and_signs(answer, right, expected):
    assert judge_answer(answer, right) == pytest.approx(expected)


def test_an_article_within_a_word_stays():
    assert plain_words("A theatre, and an anthem") == ["theatre", "and", "anthem"]
