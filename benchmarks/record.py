"""Interleaved timing, and records that name hardware, versions, commit and command."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax

from jaxmodels.errors import UserError, nearest

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "libtpu", "tokamax", "jax-cuda12-plugin", "jax-cuda13-plugin")


def interleave(fns: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each function, each called once a round in turn, so that a busy machine slows all alike.

    One call of each comes before the first round, to compile; results are waited for.
    """
    for fn in fns.values():
        jax.block_until_ready(fn())
    times: dict[str, list[float]] = {name: [] for name in fns}
    for _ in range(rounds):
        for name, fn in fns.items():
            start = time.perf_counter()
            jax.block_until_ready(fn())
            times[name].append(time.perf_counter() - start)
    return times


def check(what: str, names: Sequence[str], known: Collection[str]) -> None:
    """Refuse a name that is not known.

    Raises:
        UserError: suggests the nearest name.
    """
    for name in names:
        if name not in known:
            raise UserError(f"got {what} {name!r}, expected one of {', '.join(known)}{nearest(name, known)}")


def environment() -> dict[str, Any]:
    """Return the hardware, versions, commit and command of this process."""
    device = jax.devices()[0]
    return {
        "hardware": processor() if device.platform == "cpu" else device.device_kind,
        "devices": jax.device_count(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "platform": device.platform,
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version(), **versions()},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "commit": git("rev-parse", "HEAD") or "unknown",
        "changed": bool(git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")),
        "command": command(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def processor() -> str:
    """Return the name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Return the versions of the installed packages that affect speed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git(*arguments: str) -> str:
    """Return what git prints, or an empty text outside of a repository."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def command() -> str:
    """Return the command line as one would type it."""
    main = sys.modules["__main__"]
    package = getattr(main, "__package__", None)
    program = ["python", "-m", package] if package else ["python", Path(sys.argv[0]).name]
    # of a place on this machine the last part is enough
    return shlex.join([*program, *(Path(a).name if Path(a).is_absolute() else a for a in sys.argv[1:])])


def digest(value: Any) -> str:
    """Return the hash of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def slug(text: str) -> str:
    """Return the name of hardware as it stands in the name of a file."""
    return re.sub(r"[^a-z0-9]+", "_", text.lower().removeprefix("nvidia ")).strip("_") or "cpu"


def kept(path: Path, base: Mapping[str, Any], what: str) -> list[dict[str, Any]]:
    """Return the rows of an earlier record that are still true: with the same `base`, and without a `failure`.

    Raises:
        UserError: the file is no such record, or one of other hardware.
    """
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_text())["rows"]
        found = [row for row in rows if row["base"] == base and not row["failure"]]
        hardware = {row["base"]["hardware"] for row in rows}
        changed = sorted({name for row in rows for name in base if row["base"][name] != base[name]})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"got {path}, expected a record of {what} ({error!r}), try another --name") from None
    if other := hardware - {base["hardware"]}:
        raise UserError(f"got {path} of {other.pop()}, expected {base['hardware']}, which is here, try another --name")
    if changed:
        print(f"{path.name}: measured anew what had another {', '.join(changed)}", flush=True)
    return found


def write(
    name: str,
    title: str,
    rows: Sequence[Mapping[str, Any]],
    *,
    out: Path | None = None,
    notes: Sequence[str] = (),
    columns: Mapping[str, str] | None = None,
    plot: Callable[[Any, Sequence[Mapping[str, Any]]], None] | None = None,
    listed: Sequence[Mapping[str, Any]] | None = None,
    about: Mapping[str, Any] | None = None,
) -> Path:
    """Write NAME.json, NAME.md and, with `plot(figure, rows)`, NAME.png; returns the path of the Markdown.

    `columns` chooses and orders the table's columns: key -> heading with its unit; `listed` are the rows of the table,
    where it has not all of them. `about` is the `environment` of the process that measured, if it was not this one.
    """
    folder = RESULTS if out is None else out
    folder.mkdir(parents=True, exist_ok=True)
    about = about or environment()
    record = {"title": title, **about, "notes": list(notes), "rows": [dict(row) for row in rows]}
    part = folder / f"{name}.json.part"
    part.write_text(json.dumps(record, indent=1) + "\n")
    part.replace(folder / f"{name}.json")  # whole at any moment, since some benchmarks go on from it
    state = " (with changes that are not committed)" if about["changed"] else ""
    lines = [
        f"# {title}",
        "",
        f"- hardware: {about['hardware']}, {about['cores']} cores, {about['devices']} JAX device(s), load average "
        f"{about['load']} at the end",
        "- versions: " + ", ".join(f"{name} {number}" for name, number in about["versions"].items()),
        f"- commit: {about['commit'][:12]}{state}, {about['time']}",
        f"- command: `{about['command']}`",
        *(f"- {note}" for note in notes),
        "",
        markdown(rows if listed is None else listed, columns),
    ]
    if plot is not None:
        draw(folder / f"{name}.png", f"{title}: {about['hardware']}, {about['cores']} cores", plot, rows)
        lines += ["", f"![{title}]({name}.png)"]
    path = folder / f"{name}.md"
    path.write_text("\n".join(lines) + "\n")
    return path


def markdown(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str] | None = None) -> str:
    """Return rows as a Markdown table, with numbers to three figures."""
    columns = columns or {key: key for row in rows for key in row}
    lines = ["| " + " | ".join(columns.values()) + " |", "| --- " * len(columns) + "|"]
    lines += ["| " + " | ".join(show(row.get(key)) for key in columns) + " |" for row in rows]
    return "\n".join(lines)


def show(value: Any) -> str:
    """Return a cell of a table."""
    if value is None:
        return "–"
    if isinstance(value, float):
        small, large = value and abs(value) < 1e-3, abs(value) >= 100
        return f"{value:.1e}" if small else f"{value:,.0f}" if large else f"{value:.3g}"
    return str(value)


def draw(
    path: Path, title: str, plot: Callable[[Any, Sequence[Mapping[str, Any]]], None], rows: Sequence[Mapping[str, Any]]
) -> None:
    """Save the figure that `plot(figure, rows)` draws."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update(
        {
            "font.size": 11,
            "axes.grid": True,
            "grid.alpha": 0.3,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "savefig.dpi": 130,
        }
    )
    figure = pyplot.figure(figsize=(10, 4.2), layout="constrained")
    figure.suptitle(title)
    plot(figure, rows)
    figure.savefig(path)
    pyplot.close(figure)
