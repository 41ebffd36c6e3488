"""Patterns of parameters: which of them they match, and what they should have matched."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from jaxmodels.errors import UserError


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern is of a parameter, or of the layer whose weights it is."""
    return fnmatchcase(name, pattern) or fnmatchcase(name.removesuffix("/w"), pattern)


def matched(
    field: str, patterns: Sequence[str], every: Sequence[str], able: Sequence[str], what: str, example: str = ""
) -> list[str]:
    """Return the names among `able` that patterns match; names begin with their network, and patterns do not.

    `what` says what those are, and `example` is what a pattern in this field ends with.

    Raises:
        UserError: a pattern matches none.
    """
    found: list[str] = []
    for pattern in patterns:
        own = [name for name in able if matches(pattern, name.partition("/")[2])]
        if not own:
            others = any(matches(pattern, name.partition("/")[2]) for name in every)
            layers = list(dict.fromkeys(name.partition("/")[2].removesuffix("/w") for name in able))
            shown = ", ".join(layers[:12]) + (f" and {len(layers) - 12} more" if len(layers) > 12 else "")
            tried = f", try --{field} '{layers[0]}{example}'" if layers else ""
            raise UserError(
                f"got {field} {pattern!r}, which matches no {what if others else 'parameter'}, expected some of "
                f"{shown or 'none: there is no ' + what}{tried}"
            )
        found += own
    return list(dict.fromkeys(found))
