"""Overlap of two texts: exact match and F1 of answers, ROUGE of summaries."""

from __future__ import annotations

import functools
import re
import string
from collections import Counter
from collections.abc import Callable, Hashable, Sequence

from jaxmodels.errors import UserError

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WORD = re.compile("[a-z0-9]+")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def plain_words(text: str) -> list[str]:
    """Return the words of an answer in lower case, without punctuation and articles, as SQuAD's scripts compare them.

    Source: Rajpurkar et al. 2016, and `normalize_answer` of the scripts of versions 1.1 and 2.0.
    """
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def judge_answer(answer: str, right: Sequence[str]) -> tuple[float, float]:
    """Return exact match and F1 of an answer, each the highest over the reference answers.

    Without right answers there is none, and an empty answer is right. F1 is that of two bags of words; where one of
    them is empty, it says whether both are.
    Source: the script of SQuAD 2.0, which differs from that of 1.1 only where nothing is left of both answers.
    """
    found = plain_words(answer)
    # as the script does: a right answer of which nothing is left is none
    expected = [words for each in right if (words := plain_words(each))] or [[]]
    return float(found in expected), max(
        _f1(found, words) if found and words else float(found == words) for words in expected
    )


def _f1(found: Sequence[Hashable], right: Sequence[Hashable]) -> float:
    """Return the F1 of two bags of words, or of other parts of texts."""
    return _ratio(sum((Counter(found) & Counter(right)).values()), len(found), len(right))


def judge_summary(summary: str, references: Sequence[str]) -> tuple[float, float, float]:
    """Return ROUGE-1, ROUGE-2 and ROUGE-L of a summary, each the highest over the references.

    Each is the F1 of words, of pairs of words, and of the longest common subsequence of words, which are stemmed.
    Source: Lin 2004; equal to the package rouge-score with `use_stemmer=True`.
    """
    found = stems(summary)
    expected = [stems(each) for each in references]
    ones, twos = (max(_f1(_grams(found, n), _grams(each, n)) for each in expected) for n in (1, 2))
    return ones, twos, max(_ratio(_common(found, each), len(found), len(each)) for each in expected)


def stems(text: str) -> list[str]:
    """Return the words of a text, those of more than three letters cut by Porter's stemmer.

    Raises: UserError if the stemmer, of the library nltk, is not installed.
    """
    stem = _stemmer()
    return [stem(word) if len(word) > 3 else word for word in _WORD.findall(text.lower())]


@functools.cache
def _stemmer() -> Callable[[str], str]:
    try:
        from nltk.stem.porter import PorterStemmer  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            "got ROUGE without the library nltk, which has Porter's stemmer, expected it, "
            "try pip install 'jaxmodels[text]'"
        ) from error
    return functools.cache(PorterStemmer().stem)


def _grams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[i:] for i in range(n)), strict=False))


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    """Return the length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for word in a:
        before = 0
        for at, other in enumerate(b, 1):
            before, row[at] = row[at], before + 1 if word == other else max(row[at], row[at - 1])
    return row[-1]


def _ratio(common: int, a: int, b: int) -> float:
    return 2 * common / (a + b) if common else 0.0
