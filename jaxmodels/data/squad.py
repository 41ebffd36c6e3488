"""Questions about passages of text, in the JSON of SQuAD, versions 1.1 and 2.0."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxmodels.data import corpus
from jaxmodels.data.files import shown
from jaxmodels.data.records import (
    Bad,
    Field,
    Records,
    check_fraction,
    check_some,
    digest,
    hash_fraction,
)
from jaxmodels.data.section import FilesConfig, RecordsConfig
from jaxmodels.data.source import Split
from jaxmodels.data.special import objects
from jaxmodels.data.values import Span
from jaxmodels.errors import UserError

FIELDS = {
    "question": Field("text"),
    "context": Field("text"),
    "answers": Field("spans"),
    "title": Field("text"),
    "id": Field("text"),
}
"""The fields of a question: `answers` are parts of `context`, none where it has no answer there."""


@dataclass(frozen=True)
class SQuAD(RecordsConfig, FilesConfig):
    """Questions about passages, in files of SQuAD's JSON. A fraction that is held out is of whole articles."""

    def records(self, split: Split) -> Records:
        return records(self, split)


def records(cfg: SQuAD, split: Split) -> Records:
    """Open the questions of a split.

    Raises:
        UserError: a file is not SQuAD's, or nothing is left for the split.
    """
    check_fraction(cfg.eval_fraction)
    paths = cfg.eval_path if split == "eval" and cfg.eval_path else cfg.path
    files = corpus.expand(paths, "squad")
    found = [one for path in files for one in _questions(path, path.stat().st_size, path.stat().st_mtime_ns)]
    if not cfg.eval_path:
        # all questions of an article are on the same side, since one passage answers many of them
        held = {title: hash_fraction(title.encode()) < cfg.eval_fraction for title in {title for _, title, _ in found}}
        found = [one for one in found if held[one[1]] == (split == "eval")]
    names = [path.name for path in files]
    made = Questions(found, f"questions of {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}")
    check_some(made, split)
    return made


class Questions(Records):
    """Questions held in memory, each with its place and its article's title."""

    fields = FIELDS

    def __init__(self, found: Sequence[tuple[str, str, Any]], label: str) -> None:
        self._found, self.label = found, label
        self.fingerprint = digest(repr([values for *_, values in found]).encode())

    def __len__(self) -> int:
        return len(self._found)

    def where(self, index: int) -> str:
        return self._found[index][0]

    def read(self, indices: Sequence[int], fields: Sequence[str]) -> list[dict[str, Any] | Bad]:
        return [self._one(index, fields) for index in indices]

    def _one(self, index: int, fields: Sequence[str]) -> dict[str, Any] | Bad:
        where, title, (context, values) = self._found[index]
        try:
            known = {**values, "context": context, "title": title}
            if "answers" in fields:  # each once, as annotators often agree
                if "is_impossible" in values and bool(values["is_impossible"]) == bool(values["answers"]):
                    count = f"{len(values['answers'])} answers"
                    return Bad(where, f"has {count} and is_impossible {shown(values['is_impossible'])}, which differ")
                known["answers"] = tuple(dict.fromkeys(Span(x["text"], x["answer_start"]) for x in values["answers"]))
            return {name: known[name] for name in fields}
        except KeyError as missing:
            return Bad(where, f"has no {missing.args[0]}")
        except TypeError:
            return Bad(where, f"has answers {shown(values['answers'])}, expected a list of texts and their places")


@functools.lru_cache(4)
def _questions(path: Path, size: int, time: int) -> list[tuple[str, str, Any]]:
    """Read the questions of a file: the place of each, the title of its article, and (context, its own values)."""
    try:
        return list(_read(path))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"got {path}, which is not SQuAD's JSON ({type(error).__name__}: {error}), expected "
            '{"data": [{"title": …, "paragraphs": [{"context": …, "qas": [{"question": …, "answers": […]}]}]}]}, '
            "try another file"
        ) from error


def _read(path: Path) -> Iterator[tuple[str, str, Any]]:
    for number, article in enumerate(objects(path, "SQuAD's JSON")["data"]):
        title = str(article.get("title", f"article {number}"))
        for at, passage in enumerate(article["paragraphs"]):
            context = passage["context"]
            for values in passage["qas"]:
                values = {**values, "id": str(values.get("id", ""))}
                yield f"{path}: {title}, passage {at}, question {values['id']}", title, (context, values)
