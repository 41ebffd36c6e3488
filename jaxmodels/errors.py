"""Errors that say what was given, what was expected, and what to try."""

from __future__ import annotations

import enum
import os
import re
from collections.abc import Iterable
from pathlib import Path


class ExitCode(enum.IntEnum):
    """How a command, a rank, a supervisor or a whole job ended; schedulers act on it."""

    DONE = 0
    FAILED = 1
    MISTAKE = 2
    """A mistake of the user's: the same command would fail again."""
    SAVED = 75
    """Told to stop, and everything is saved: the same command continues from there."""


class UserError(ValueError):
    """A mistake in what the user asked for; the command line prints it as one line and exits with 2."""


def check_place(path: Path, option: str, folder: bool = False) -> None:
    """Refuse, before any work, a place that cannot be written to: for a file, or a folder that may be there already.

    Raises:
        UserError: it cannot.
    """
    place, what = os.path.abspath(path), "a folder" if folder else "a file"
    if os.path.isdir(place) != folder and os.path.exists(place):
        wrong = f"which is {'a file' if folder else 'a folder'}"
    else:
        above = place if os.path.exists(place) else os.path.dirname(place)
        while folder and not os.path.lexists(above):
            above = os.path.dirname(above)
        if not os.path.lexists(above):
            wrong = "whose folder does not exist"
        elif above != place and not os.path.isdir(above):
            wrong = f"where {above} is no folder"
        else:
            wrong = "" if os.access(above, os.W_OK) else "which cannot be written"
    if wrong:
        raise UserError(f"got {option} {path}, {wrong}, expected a place for {what}, try {option} {Path(path).name}")


HIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What a terminal would obey rather than show: control characters, marks that change the direction of writing, and lone
surrogates, which cannot be written at all. Newlines and tabs are allowed."""


def printable(text: object) -> str:
    r"""Make text safe for a terminal or a log: control characters become visible (\x1b), so that no file name does
    harm."""
    return HIDDEN.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ', did you mean …?' if the name is a misspelling or the beginning of a known one, and otherwise nothing.

    Names of other things that exist (bart, gpt3) are not misspellings of bert or gpt2: the first letter must agree, no
    digit may differ or be missing, and in a short word no letter may be replaced.
    """
    small, known = name.lower(), list(known)
    begun = [other for other in known if len(name) > 1 and other.lower().startswith(small)]
    typos = [(edits, other) for other in known if (edits := _typos(small, other.lower())) is not None]
    found = min(begun, key=len) if begun else min(typos)[1] if typos else None
    return f", did you mean {found!r}?" if found is not None else ""


def _typos(name: str, other: str) -> int | None:
    """Count the letters that were left out, added, swapped or replaced; None if it is another word."""
    shared = name.rpartition("/")[0]
    if shared and other.startswith(shared + "/"):  # for two paths in one folder, compare the names
        name, other = name[len(shared) + 1 :], other[len(shared) + 1 :]
    most = max(1, len(name) // 4)
    digits, others = re.findall(r"\d", name), iter(re.findall(r"\d", other))
    if name[:1] != other[:1] or abs(len(name) - len(other)) > most or not all(digit in others for digit in digits):
        return None
    mistaken = 1 if len(name) > 5 else most + 1
    before, row = [], list(range(len(other) + 1))
    for i, a in enumerate(name, 1):
        older, before, row = before, row, [i]
        for j, b in enumerate(other, 1):
            least = min(before[j] + 1, row[-1] + 1, before[j - 1] + mistaken * (a != b))
            if i > 1 and j > 1 and a == other[j - 2] and b == name[i - 2]:
                least = min(least, older[j - 2] + 1)
            row.append(least)
    return row[-1] if row[-1] <= most else None
