"""`python -m benchmarks device --budget SECONDS`: all that needs an accelerator, in the order of worth.

Each part runs in a process of its own, which alone holds the device's memory, and its result is written as it comes. A
part that fails is recorded by name; the same command goes on with what is not done.
"""

from __future__ import annotations

import json
import multiprocessing
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from benchmarks import record
from benchmarks.parts import PARTS
from jaxmodels.errors import UserError, check_place
from jaxmodels.fields import Range, Section
from jaxmodels.plan import cache as caches

NAMES = tuple(PARTS)
LEAST = 5.0
"""Seconds without which no part is begun."""
GRACE = 5.0
"""Seconds that a part has to end in when its time is up."""
COLUMNS = {"part": "part", "figure": "figure", "value": "value", "goal": "goal", "seconds": "seconds it took"}
GOALS = {
    ("NVIDIA H200", "gpt2", "tokens/s"): 500e3,
    ("NVIDIA H200", "llama", "tokens/s"): 60e3,
    ("NVIDIA H200", "vit", "examples/s"): 3000.0,
}
"""What is aimed at: hardware, part, figure."""


@dataclass(frozen=True)
class Options(Section):
    """How long it may take, and where its results go. On a CPU all sizes are small, and seconds mean nothing."""

    budget: Annotated[float, Range(1.0, 1e6)] = 480.0
    """Seconds for all parts together, the start of their processes included."""
    parts: tuple[str, ...] = NAMES
    """Parts, done in the order of worth: parity, attention, gpt2, llama, vit, resnet, mixture, bert, engine, data,
    checkpoint, sampling."""
    out: Path | None = None
    """Folder for the results; by default, benchmarks/results."""


def run(options: Options) -> int:
    """Run the parts that the record does not have yet, and print it; return 1 if one failed, 130 if interrupted.

    Raises:
        UserError: an option is wrong, or no device can be used.
    """
    record.check("part", options.parts, NAMES)
    begun = time.monotonic()
    folder = (options.out or record.RESULTS).absolute()
    check_place(folder, "--out", folder=True)
    folder.mkdir(parents=True, exist_ok=True)
    about = finished("about", folder, options.budget)
    if about["failure"]:
        raise UserError(f"got no device that can be used ({about['failure']}), try JAX_PLATFORMS=cpu for a trial")
    about = about["figures"]
    base = {"hardware": about["hardware"], "versions": about["versions"], "code": caches.source()}
    stem = f"device_{record.slug(about['hardware'])}"
    kept = rows = record.kept(folder / f"{stem}.json", base, "a device")
    wanted = [name for name in NAMES if name in options.parts]
    try:
        for rows in done(wanted, kept, base, folder, begun + options.budget):
            write(folder, stem, about, rows, wanted)
    except KeyboardInterrupt:
        print("interrupted: what is done is kept, and the same command goes on from there", flush=True)
        return 130
    path = write(folder, stem, about, rows, wanted)
    print(path.read_text())
    return 1 if any(row["failure"] and not row["late"] for row in rows) else 0


def done(
    wanted: Sequence[str], rows: list[dict[str, Any]], base: Mapping[str, Any], folder: Path, end: float
) -> Iterator[list[dict[str, Any]]]:
    """Do the parts that are not among the rows; yield all rows whenever there is another one.

    The attention table takes a share of the time, and goes on at the end with what is left.
    """
    rest = [name for name in wanted if name not in {row["part"] for row in rows}]
    queue = [(name, PARTS[name].share) for name in rest]
    while queue:
        name, share = queue.pop(0)
        left = end - time.monotonic()
        if left < LEAST:
            return
        print(f"{name}: {PARTS[name].about}, at most {left * share:.0f} s ...", flush=True)
        found = finished(name, folder, left * share)
        if found["late"] and share < 1.0:
            queue.append((name, 1.0))
        rows = [*(row for row in rows if row["part"] != name), {"part": name, "base": dict(base), **found}]
        print(f"{name}: {found['failure'] or in_words(found['figures'])} ({found['seconds']:.0f} s)", flush=True)
        yield rows


def in_words(figures: Mapping[str, Any]) -> str:
    """Return figures as one line."""
    return ", ".join(f"{name} {record.show(value)}" for name, value in figures.items())


def finished(name: str, folder: Path, seconds: float) -> dict[str, Any]:
    """Run a part in a process of its own; return its figures, or how it failed, and the seconds that it took."""
    answer = folder / f".device_{name}.json"
    answer.unlink(missing_ok=True)
    child = multiprocessing.get_context("spawn").Process(target=work, args=(name, folder, answer), name=name)
    return waited(child, answer, seconds)


def waited(child: Any, answer: Path, seconds: float) -> dict[str, Any]:
    """Start a process, end it when its time is up, and return its answer, or what became of it."""
    begun, late = time.monotonic(), False
    try:
        child.start()
        child.join(seconds)
        if late := child.is_alive():
            child.terminate()
            child.join(GRACE)
    finally:
        if child.is_alive():
            child.kill()
            child.join()
    found: dict[str, Any] = {"figures": {}, "failure": ""}
    if answer.exists():
        found |= json.loads(answer.read_text())
        answer.unlink()
    elif late:
        found["failure"] = f"its time was up after {seconds:.0f} s"
    else:
        found["failure"] = f"its process ended with {child.exitcode}"
    return {**found, "late": late, "seconds": time.monotonic() - begun}


def work(name: str, folder: Path, answer: Path) -> None:
    """Do a part, and leave its answer; the body of its process."""
    found: dict[str, Any] = {"figures": {}, "failure": ""}
    try:
        import jax

        if name == "about":
            found["figures"] = {**record.environment(), "kind": jax.devices()[0].device_kind}
        else:
            from jaxmodels.train import run as runs

            runs.compilation_cache()
            found["figures"] = PARTS[name].run(jax.default_backend() == "cpu", folder)
    except Exception as error:
        if not isinstance(error, UserError):
            traceback.print_exc()
        found["failure"] = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
    part = answer.with_suffix(".part")
    part.write_text(json.dumps(found))
    part.replace(answer)


def write(
    folder: Path, stem: str, about: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], wanted: Sequence[str]
) -> Path:
    """Write the record: a line for each figure, with the goal where there is one."""
    rows = sorted(rows, key=lambda row: NAMES.index(row["part"]))
    listed = []
    for row in rows:
        figures = row["figures"]
        if row["failure"]:
            figures = {"not done" if row["late"] else "failed": row["failure"]}
        for name, value in figures.items():
            goal = GOALS.get((about["kind"], row["part"], name))
            line = {"part": row["part"], "figure": name, "value": value, "goal": goal, "seconds": row["seconds"]}
            listed.append(line)
    done = {row["part"] for row in rows if not row["late"]}
    left = [name for name in wanted if name not in done]
    notes = ["each part ran in a process of its own, in the order of this table"]
    if about["platform"] == "cpu":
        notes.append("on a CPU all sizes are small: IT SHOWS THAT THE PARTS RUN, AND NO SECONDS MEAN ANYTHING")
    if "attention" in wanted:
        notes.append(f"the attention table is in attention_{record.slug(about['hardware'])}.md")
    notes += [f"no time was left for {', '.join(left)}: the same command does them"] if left else []
    title, about = f"What {about['hardware']} does", {**about, "command": record.command()}
    return record.write(stem, title, rows, out=folder, notes=notes, columns=COLUMNS, listed=listed, about=about)
