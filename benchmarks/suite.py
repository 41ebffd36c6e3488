"""`python -m benchmarks suite [--quick]`: what this hardware can be measured by, on one page, and the gates.

Each benchmark runs in a process of its own and leaves its record in one folder; the page joins their tables and curves.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import cells, record
from benchmarks.device import finished
from jaxmodels.errors import UserError, check_place

SECONDS = 120.0
"""How long a device may take to answer what it is."""


class Entry(NamedTuple):
    """A benchmark of the suite: its arguments in full and in short (None: it is left out), and whether it is a gate."""

    title: str
    arguments: tuple[str, ...]
    quick: tuple[str, ...] | None
    gate: bool = False
    """Exit code 1 of it is the suite's."""
    on: str = ""
    """cpu or accelerator, where it is for one of them alone."""
    records: bool = True
    """It takes --out."""


TINY = ("--lengths", "64", "128", "--tokens", "256", "--width", "64", "--rounds", "2")
MESHES = ("configs/mlp_mnist.py", "--devices", "1", "2", "--steps", "3", "--modes", "weak",
          "--override=--data synthetic --data.batch-size 32")  # fmt: skip
ENTRIES = {
    "exact": Entry("What steps compute, move, send and hold", ("--check",), ("--check", "mlp"), True, records=False),
    "attention": Entry("Attention", (), TINY),
    "device": Entry("On the accelerator", (), (), True, "accelerator"),
    "scaling": Entry("Scaling", ("--axes", "data", "fsdp"), MESHES, True),
    "step": Entry("A training step", (), None, on="cpu"),
    "data": Entry("Real data against synthetic", (), None, on="cpu"),
    "families": Entry("Families against PyTorch", (), None, on="cpu"),
    "startup": Entry("Time to start", (), ("--rounds", "1"), on="cpu"),
    "planning": Entry("Plans for thousands of devices", (), None, on="cpu"),
    "published": Entry("Plans against published figures", (), None, on="cpu"),
}
"""In the order in which they run and stand on the page."""
COLUMNS = {"name": "benchmark", "said": "result", "gate": "gate", "seconds": "seconds", "command": "command"}
PASSED, FELL, NOT_RUN = "done", "FELL", "not run"


@dataclass(frozen=True)
class Options:
    """How much, and where the page goes."""

    quick: bool = False
    """Small sizes, in about two minutes: the gates that need no timing, and what a page looks like."""
    base: str = ""
    """A commit against which the tree as it is is timed, which is a gate too (`benchmarks compare`)."""
    out: Path = record.ROOT / "build" / "suite"
    """Folder for the page and its records."""


def run(options: Options) -> int:
    """Run the benchmarks, write suite.md, and return 1 if a gate fell, 130 if interrupted.

    Raises:
        UserError: the folder cannot be written to, or no device can be used.
    """
    folder = options.out.absolute()
    check_place(folder, "--out", folder=True)
    folder.mkdir(parents=True, exist_ok=True)
    found = finished("about", folder, SECONDS)
    if found["failure"]:
        raise UserError(f"got no device that can be used ({found['failure']}), try JAX_PLATFORMS=cpu for a trial")
    about, rows = found["figures"], []
    try:
        for name, title, arguments, gate in chosen(options, about["platform"]):
            print(f"{name}: {title} ...", flush=True)
            rows.append(one(name, title, arguments, gate, folder, options.quick))
            print(f"{name}: {rows[-1]['said']} ({rows[-1]['seconds']:.0f} s)", flush=True)
            page(folder, about, rows, options)
    except KeyboardInterrupt:
        print("interrupted: the page has what is done", flush=True)
        return 130
    print(f"wrote {page(folder, about, rows, options)}")
    fell = [row["name"] for row in rows if row["state"] == FELL]
    print(f"gates that fell: {', '.join(fell)}" if fell else "no gate fell")
    return 1 if fell else 0


def chosen(options: Options, platform: str) -> list[tuple[str, str, tuple[str, ...], bool]]:
    """Return name, title, arguments and whether it is a gate, of each benchmark that is for this platform."""
    found = []
    for name, each in ENTRIES.items():
        arguments = each.quick if options.quick else each.arguments
        if arguments is not None and each.on in ("", "cpu" if platform == "cpu" else "accelerator"):
            found.append((name, each.title, arguments, each.gate))
    if options.base:
        found.append(("compare", f"Against {options.base}", (options.base,), True))
    return found


def one(name: str, title: str, arguments: Sequence[str], gate: bool, folder: Path, quick: bool) -> dict[str, Any]:
    """Run one benchmark; return its row of the page, with the names of the records that it left."""
    out = () if name in ENTRIES and not ENTRIES[name].records else ("--out", str(folder))
    begun, before = time.monotonic(), _records(folder)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", name, *arguments, *out],
        cwd=record.ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    after = _records(folder)
    left = [stem for stem, changed in after.items() if changed != before.get(stem)]
    row = {
        "name": name,
        "title": title,
        "gate": "yes" if gate else "",
        "seconds": time.monotonic() - begun,
        "command": f"`python -m benchmarks {shlex.join([name, *arguments])}`",
        "records": left or [stem for stem in after if stem.partition("_")[0] == name],
        "state": PASSED,
        "said": PASSED,
        "told": done.stdout if not out else "",
    }
    if done.returncode:
        message = ((done.stderr if done.returncode == 2 else done.stdout).strip().splitlines() or ["no message"])[-1]
        fell = gate and done.returncode == 1
        row |= {"state": FELL if fell else NOT_RUN, "said": f"{FELL if fell else NOT_RUN}: {message[:300]}"}
    elif name == "attention" and not quick:  # by times of small calls on a busy machine it would fall at random
        slower = [line for stem in row["records"] for line in cells.overtaken(_rows(folder, stem))]
        if slower:
            row |= {"gate": "yes", "state": FELL, "said": f"{FELL}: {'; '.join(slower[:3])}"}
    return row


def _records(folder: Path) -> dict[str, float]:
    """Return the names of the records in a folder, and when they were written."""
    return {path.stem: path.stat().st_mtime_ns for path in folder.glob("*.md") if path.stem != "suite"}


def _rows(folder: Path, stem: str) -> list[dict[str, Any]]:
    return json.loads((folder / f"{stem}.json").read_text())["rows"]


def page(folder: Path, about: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], options: Options) -> Path:
    """Write the page: what ran and what fell, then the table and curves of each."""
    short = {key: value for key, value in about.items() if key != "kind"} | {"command": record.command()}
    notes = ["each benchmark ran in a process of its own; a gate that falls makes the exit code 1"]
    notes += ["--quick: small sizes, WHOSE SECONDS MEAN NOTHING"] if options.quick else []
    path = record.write("suite", f"Benchmarks on {about['hardware']}", rows, out=folder, notes=notes, columns=COLUMNS,
                        about=short)  # fmt: skip
    parts = [path.read_text().rstrip()]
    for row in rows:
        parts.append(f"## {row['title']}")
        if row["said"] != PASSED:
            parts.append(str(row["said"]))
        if row["told"]:
            parts.append(f"```\n{row['told'].strip()}\n```")
        for stem in row["records"]:
            text = (folder / f"{stem}.md").read_text().strip()
            parts.append(re.sub(r"^# ", "### ", text, flags=re.MULTILINE))
    path.write_text("\n\n".join(parts) + "\n")
    return path
