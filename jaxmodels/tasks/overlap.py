"""How much of a text another one says: the measures by which answers are judged."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def plain_words(text: str) -> list[str]:
    """Return the words of an answer in lower case, without punctuation and articles, as SQuAD's scripts compare them.

    Source: Rajpurkar et al. 2016, and `normalize_answer` of the scripts of versions 1.1 and 2.0.
    """
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def judge_answer(answer: str, right: Sequence[str]) -> tuple[float, float]:
    """Return exact match and F1 of an answer, each with the right answer with which it is highest.

    Without right answers there is none, and an empty answer is right. F1 is that of two bags of words; where one of
    them is empty, it says whether both are.
    Source: the script of SQuAD 2.0, which differs from that of 1.1 only where nothing is left of both answers.
    """
    said = plain_words(answer)
    # as the script does: a right answer of which nothing is left is none
    expected = [words for each in right if (words := plain_words(each))] or [[]]
    return float(said in expected), max(_f1(said, words) for words in expected)


def _f1(said: list[str], right: list[str]) -> float:
    if not said or not right:
        return float(said == right)
    common = sum((Counter(said) & Counter(right)).values())
    return 2 * common / (len(said) + len(right))
