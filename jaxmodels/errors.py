"""Errors that say what was got, what was expected, and what to try."""

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
    """Of the user: the same command would end so again."""
    SAVED = 75
    """Told to stop, and everything is saved: the same command goes on from there."""


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
"""What a terminal obeys instead of showing: control characters, marks that turn the direction of writing, and lone
surrogates, which cannot be written at all. Newlines and tabs are text."""


def printable(text: object) -> str:
    r"""A text for a terminal or a log: its control characters are shown (\x1b), so that no file's name can do harm."""
    return HIDDEN.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def nearest(name: str, known: Iterable[str]) -> str:
    """', did you mean …?' if the name is a known one mistyped, or the beginning of one; else nothing.

    Another thing that exists (bart, gpt3) is no mistyped bert or gpt2: the first letter stays, no digit is changed or
    left out, and in a short word no letter is another one.
    """
    small, known = name.lower(), list(known)
    begun = [other for other in known if len(name) > 1 and other.lower().startswith(small)]
    typos = [(edits, other) for other in known if (edits := _typos(small, other.lower())) is not None]
    found = min(begun, key=len) if begun else min(typos)[1] if typos else None
    return f", did you mean {found!r}?" if found is not None else ""


def _typos(name: str, other: str) -> int | None:
    """How many letters were left out, added, swapped or mistaken; None: it is another word."""
    shared = name.rpartition("/")[0]
    if shared and other.startswith(shared + "/"):  # of two paths in one folder the names are compared
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
