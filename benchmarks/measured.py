"""`python -m benchmarks measured`: plans compared with the same jobs on this machine's GPU."""

from __future__ import annotations

import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from benchmarks import record
from jaxmodels.errors import UserError
from jaxmodels.parallel import hardware

BILLION = "--model.layers 16 --model.width 2048 --model.heads 32 --model.mlp-width 8192 --model.tied True"
JOBS = {
    "gpt2": "configs/gpt2_openwebtext.py --data.batch-size 32",
    "llama": f"configs/llama3_8b_c4.py {BILLION} --data.seq-len 4096 --data.batch-size 4",
    "bert": "configs/bert_base_wikipedia.py --data.batch-size 64",
    "vit": "configs/vit_b16_imagenet.py --data.batch-size 256",
    "resnet": "configs/resnet50_imagenet.py --data.batch-size 256",
}
"""Config and options of each job, for one GPU."""
STEPS, EVERY = 60, 10


@dataclass(frozen=True)
class Options:
    """The jobs, and where the record goes."""

    jobs: Positional[tuple[str, ...]] = ()
    """Names of jobs; by default, all."""
    out: Path | None = None
    """Folder for the record; by default, benchmarks/results."""


def run(options: Options) -> None:
    """Plan and train each job by the commands that a user types; record all jobs, or print those that were named."""
    record.check("job", options.jobs, JOBS)
    # a process that asks for its devices holds their memory, so a child does
    listing = [sys.executable, "-c", "import jax; print(*(each.device_kind for each in jax.devices()), sep='\\n')"]
    kinds = subprocess.run(listing, capture_output=True, text=True, check=True).stdout.splitlines()
    row = hardware.of_device(kinds[-1])
    if row is None or row.platform != "cuda" or len(kinds) > 1:
        raise UserError(f"got {', '.join(kinds)}, expected one GPU that is described, try CUDA_VISIBLE_DEVICES=0")
    on = f"{row.name}:1x1"
    rows = [measure(name, on) for name in options.jobs or JOBS]
    errors = {what: [abs(row[f"{what}_error"]) for row in rows] for what in ("memory", "time")}
    notes = [f"largest error of {what}: {max(found):.1%}" for what, found in errors.items()]
    columns = {
        "name": "job", "memory_planned": "GiB planned", "memory": "GiB measured", "memory_percent": "error (aim 5 %)",
        "time_planned": "s a step planned", "time": "s measured", "time_percent": "error (aim 15 %)",
        "binds": "bound by", "command": "command",
    }  # fmt: skip
    if options.jobs and options.out is None:
        print(record.markdown(rows, columns))
        return
    stem, title = f"plan_vs_measured_{row.name}", f"The plan against runs on {on}"
    print(record.write(stem, title, rows, out=options.out, columns=columns, notes=notes).read_text())


def measure(name: str, on: str) -> dict[str, Any]:
    """Return a row of the record."""
    job = shlex.split(JOBS[name])
    print(f"{name}: planning for {on}, then running ...", flush=True)
    with tempfile.TemporaryDirectory() as place:
        answer, folder = Path(place) / "plan.json", Path(place) / "run"
        command("plan", *job, "--on", on, "--json", str(answer))
        command(
            "train", *job, "--data", "synthetic", "--run-dir", str(folder), "--train.steps", str(STEPS),
            "--metrics.every", str(EVERY), "--eval.every", str(STEPS), "--eval.batches", "1",
        )  # fmt: skip
        (plan,) = json.loads(answer.read_text())
        metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {"name": name, "command": shlex.join(["jaxmodels", "plan", *job, "--on", on]), **compare(plan, metrics)}


def compare(plan: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return planned and measured GiB (peak before any evaluation) and seconds per step (median after warm-up)."""
    seen = [row for row in metrics if "perf/step_seconds" in row and EVERY < row["step"] < STEPS]
    planned = {"memory": plan["memory"]["peak"] / 2**30, "time": plan["step_seconds"]}
    found = {
        "memory": max(row["perf/memory_gib"] for row in seen),
        "time": statistics.median(row["perf/step_seconds"] for row in seen),
    }
    row: dict[str, Any] = {"binds": plan["binds"], "plan": plan}
    for what, value in found.items():
        error = planned[what] / value - 1
        row |= {what: value, f"{what}_planned": planned[what], f"{what}_error": error}
        row[f"{what}_percent"] = f"{error:+.1%}"
    return row


def command(*arguments: str) -> None:
    """Run jaxmodels, and show its output if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "jaxmodels", *arguments], cwd=record.ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise UserError(f"got exit code {done.returncode} from jaxmodels {arguments[0]}: {done.stderr[-2000:]}")
