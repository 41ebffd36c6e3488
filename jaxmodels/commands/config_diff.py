"""`jaxmodels config diff RUN RUN`: the fields in which two runs differ."""

from __future__ import annotations

from jaxmodels import config as configs
from jaxmodels.errors import printable


def diff(a: str, b: str, /) -> None:
    """Show the fields in which two runs differ.

    Args:
        a: a run directory.
        b: another run directory.
    """
    found = configs.differences(configs.read(a)[0], configs.read(b)[0])
    for name, (left, right) in found.items():
        print(printable(f"{name}: {left!r} in {a}, {right!r} in {b}"))
    if not found:
        print("the configs are equal")
