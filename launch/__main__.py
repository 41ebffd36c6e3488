"""`python -m launch PLACE [--option value …] -- CONFIG.py [--section.field value …]`."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import re
import sys
from collections.abc import Sequence

import tyro

from launch.local import Local, Mistake, run

_PLACES = {"local": Local}
_DESCRIPTION = """Start `jaxmodels train` as several processes: python -m launch PLACE [--option value] -- CONFIG.py
[--section.field value]

What follows -- is passed to every process unchanged. When one process fails, all are ended, and the first failure is
reported.

Exit codes: 0 done, 75 saved and stopped (run it again), 2 a mistake in what was asked, 1 anything else.

Example: python -m launch local --processes 2 --devices-per-process 4 -- configs/gpt_stdlib.py --mesh.fsdp 4"""


def main(arguments: Sequence[str]) -> int:
    """Run the launcher that the arguments name, and return its exit code."""
    own, passed = list(arguments), []
    if "--" in own:
        split = own.index("--")
        own, passed = own[:split], own[split + 1 :]
    try:
        options = _parse(own)
        if not passed:
            raise Mistake(
                f"got nothing to train, expected a config after --, try python -m launch {' '.join(own)} -- "
                "configs/gpt_stdlib.py"
            )
        return run([sys.executable, "-m", "jaxmodels", "train", *passed], options)
    except Mistake as mistake:
        print(f"launch: error: {mistake}", file=sys.stderr)
        return 2


def _parse(arguments: Sequence[str]) -> Local:
    app = tyro.extras.SubcommandApp()
    for name, place in _PLACES.items():
        app.command(name=name)(place)
    screen = io.StringIO()
    try:
        with contextlib.redirect_stderr(screen):
            return app.cli(args=list(arguments), prog="python -m launch", description=_DESCRIPTION)
    except SystemExit as end:
        if not end.code:
            raise
    raise Mistake(_explain(arguments, screen.getvalue()))


def _explain(arguments: Sequence[str], screen: str) -> str:
    """Turn tyro's boxed message into one line."""
    place = arguments[0] if arguments else None
    if place not in _PLACES:
        got = "no place to launch to" if place is None else repr(place)
        return f"got {got}, expected one of {', '.join(_PLACES)}, try python -m launch local -- configs/gpt_stdlib.py"
    options = ["--" + field.name.replace("_", "-") for field in dataclasses.fields(_PLACES[place])]
    for word in arguments[1:]:
        name = word.partition("=")[0]
        if name.startswith("--") and name.replace("_", "-") not in options:
            near = difflib.get_close_matches(name, options, n=1, cutoff=0.0)[0]
            return f"got {name}, expected one of {', '.join(options)}, try {near}"
    # tyro prints a title, then paragraphs between rules; the first paragraph says what is wrong.
    rows = [row.strip("│╭╮╰╯─ ") for row in screen.splitlines()[1:]]
    paragraphs = re.split(r"(?m)^-*\n", "\n".join(rows) + "\n")
    reason = " ".join(next(paragraph for paragraph in paragraphs if paragraph).split())
    return f"{reason.rstrip('.')}, try python -m launch {place} --help"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
