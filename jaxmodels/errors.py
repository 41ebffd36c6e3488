"""Errors that say what was got, what was expected, and what to try."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what the user asked for; the command line prints it as one line and exits with 2."""


def nearest(name: str, known: Iterable[str]) -> str:
    """', did you mean …?' if a known name is near, else nothing."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f", did you mean {found[0]!r}?" if found else ""
