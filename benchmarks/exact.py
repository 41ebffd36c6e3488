"""`python -m benchmarks exact`: what training steps compute, move, send and hold, exactly, without their hardware.

Each case is a config on one kind of hardware, and has a record in `benchmarks/exact`: the hash of its lowered program,
and the counts of the compiled one. A check lowers each step, which takes seconds, and compiles only those whose program
is another one than the record's, to say what changed.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from benchmarks import counts, record
from jaxmodels.config import Config
from jaxmodels.errors import UserError
from jaxmodels.fields import Workers

RECORDS = Path(__file__).parent / "exact"
ON = {"cpu": counts.CPU, "h100": "h100:2x8"}
"""The hardware of the cases: a CPU with eight devices, and two nodes of GPUs."""
GPT2 = ("gpt2_openwebtext", "--data.batch-size", "128")
LLAMA = "llama3_8b_c4 --model.layers 4 --data.batch-size 64 --data.seq-len 512 --model.remat full".split()
# `blockwise`, which CPUs take by themselves, has loops whose length only the data say
XLA = ("--model.attention", "xla")


@dataclass(frozen=True)
class Case:
    """A config with its options, on some hardware."""

    config: tuple[str, ...]
    on: tuple[str, ...] = ("cpu",)


CASES = {
    "mlp": Case(("mlp_mnist",)),
    "cnn": Case(("cnn_mnist",)),
    "vgg": Case(("vgg_mnist",)),
    "resnet": Case(("resnet50_imagenet",), ("cpu", "h100")),
    "vit": Case(("vit_b16_imagenet",)),
    "lstm": Case(("lstm_imdb",)),
    "vae": Case(("vae_mnist",)),
    "gan": Case(("gan_mnist",)),
    "wgan": Case(("wgan_mnist",)),
    "bart": Case(("bart_cnn_dailymail", *XLA)),
    "bert": Case(("bert_base_wikipedia",)),
    "bert-classes": Case(("bert_sst2",)),
    "bert-sentences": Case(("bert_scitldr",)),
    "bert-spans": Case(("bert_squad",)),
    "clip": Case(("clip_digits",)),
    "wav2vec2": Case(("wav2vec2_librispeech",)),
    "whisper": Case(("whisper_librispeech",)),
    "sasrec": Case(("sasrec_movielens",)),
    "dit": Case(("dit_imagenet",)),
    "yolox": Case(("yolox_s_coco",)),
    "detr": Case(("detr_resnet50_coco",)),
    "transformer": Case(("transformer_wmt14",)),
    "gpt2": Case(GPT2, ("h100",)),
    "gpt2-tensor": Case((*GPT2, *XLA, "--mesh.tensor", "2", "--mesh.sequence", "True")),
    "gpt2-accumulate": Case((*GPT2, *XLA, "--train.accumulate", "2")),
    "gpt2-int8": Case((*GPT2, *XLA, "--train.quantize", "int8")),
    "llama": Case((*LLAMA, *XLA)),
}
NAMES = [f"{name}-{hardware}" for name, case in CASES.items() for hardware in case.on]
WITHOUT = ("--eval.batch-size", "None")
"""An evaluation's batch is no part of a training step, and need not divide by the devices."""
SHOWN = 12
"""Differences of a case that are printed."""


@dataclass(frozen=True)
class Options:
    """Which cases; with neither --check nor --accept, the records are shown."""

    cases: Positional[tuple[str, ...]] = ()
    """Names such as gpt2 (on all hardware) or gpt2-h100; none: all."""
    check: bool = False
    """Fail if a step is not what its record says, and name what changed."""
    accept: bool = False
    """Replace the records of steps that changed."""
    workers: Workers | None = None
    """How many are lowered or compiled at a time; by default, one for each core."""
    records: Path | None = None
    """Folder of the records; by default, benchmarks/exact."""


def run(options: Options) -> int:
    """Check the cases, accept them, or show their records; returns 1 if one has changed.

    Raises:
        UserError: there is no such case, or its records are of other versions of the compilers.
    """
    record.check("case", options.cases, [*CASES, *NAMES])
    chosen = [name for name in NAMES if not options.cases or {name, name.rpartition("-")[0]} & set(options.cases)]
    folder = options.records or RECORDS
    if options.check and options.accept:
        raise UserError("got --check and --accept, expected one of them, try --check first")
    if not options.check and not options.accept:
        print(table(folder, chosen))
        return 0
    before = {name: read(folder, name) for name in chosen}
    if options.check:
        check_versions(before)
    changed = []
    for name, found in measured(before, options.workers or os.cpu_count() or 1):
        lines = [found] if isinstance(found, str) else differences(before[name], found)
        changed += [name] * bool(lines)
        print(f"{name:<24}{'CHANGED' if lines else 'as recorded'}", flush=True)
        for line in lines[:SHOWN]:
            print(f"  {line}", flush=True)
        if len(lines) > SHOWN:
            print(f"  and {len(lines) - SHOWN} more", flush=True)
        if options.accept and not isinstance(found, str) and found != before[name]:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    if not changed:
        print(f"{len(chosen)} of {len(chosen)} steps are as recorded")
        return 0
    if options.accept:
        print(f"{len(changed)} of {len(chosen)} records changed; the difference that git shows is what to commit")
        return 0
    print(
        f"{len(changed)} of {len(chosen)} steps changed: if that is meant, commit the records that "
        f"{shlex.join(['python', '-m', 'benchmarks', 'exact', '--accept', *changed[:4]])}"
        f"{' ...' if len(changed) > 4 else ''} writes"
    )
    return 1


def read(folder: Path, name: str) -> dict[str, Any]:
    """Return the record of a case; empty: there is none.

    Raises:
        UserError: the file is no record.
    """
    path = folder / f"{name}.json"
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"got {path}, expected a record ({error}), try git checkout {path}") from None
    return found


def versions(name: str) -> dict[str, str]:
    """Return the versions that decide what a case is compiled to."""
    compilers = {"h100": ("jax-cuda12-plugin", "jax-cuda13-plugin")}
    wanted = ("jax", "jaxlib", *compilers.get(name.rpartition("-")[2], ()))
    return {package: number for package, number in record.versions().items() if package in wanted}


def check_versions(before: Mapping[str, dict[str, Any]]) -> None:
    """Refuse to compare with records of other versions: compilers may do anything between them.

    Raises:
        UserError: says the versions of both.
    """
    for name, old in before.items():
        if old and old["versions"] != (here := versions(name)):
            both = (", ".join(" ".join(pair) for pair in found.items()) for found in (old["versions"], here))
            raise UserError("got a record of {} of {}, expected {}, ".format(name, *both) + "try these, or --accept")


def measured(before: Mapping[str, dict[str, Any]], workers: int) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Yield what each case is now, or the error that it ended with; a step that has not changed keeps its counts."""
    counts.prepare()  # for the processes that are started below
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(before)), mp_context=context) as pool:
        futures = {name: pool.submit(measure, name, old) for name, old in before.items()}
        for name, future in futures.items():
            yield name, future.result()


def measure(name: str, old: dict[str, Any]) -> dict[str, Any] | str:
    """Return the record of a case as it is now, or what is wrong with it. It runs in a process of its own."""
    case, _, hardware = name.rpartition("-")
    words = arguments(case)
    about = {
        "command": shlex.join(["jaxmodels", "plan", *words, "--on", ON[hardware]]),
        "versions": versions(name),
        "reading": counts.reading(),
    }
    try:
        cfg = config(words)
        about["program"] = counts.program(cfg, ON[hardware])
        same = all(old.get(key) == value for key, value in about.items() if key != "command")
        found = (
            {key: old[key] for key in old if key not in about}
            if same
            else counts.counts(cfg, ON[hardware], about["program"])
        )
    except UserError as error:
        return str(error)
    return {**about, **found}


def arguments(case: str) -> list[str]:
    """Return the arguments of `jaxmodels plan` for a case, without its hardware."""
    name, *options = CASES[case].config
    return [f"configs/{name}.py", *options, *WITHOUT]


def config(words: Sequence[str]) -> Config:
    """Return the config that a command line describes."""
    from jaxmodels.commands.options import configured
    from jaxmodels.commands.parsing import NoOptions

    path, *options = words
    return configured([str(record.ROOT / path), *options], "benchmarks exact", NoOptions)[0]


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Say which counts differ: the totals, then layers and collectives from the largest on."""
    if not old:
        return ["it has no record"]
    was, now = _counts(old), _counts(new)
    changed = [path for path in {**was, **now} if not _same(was.get(path), now.get(path))]

    def order(path: tuple[str, ...]) -> float:
        return -max(_size(was.get(path)), _size(now.get(path))) if path[0] in ("layers", "collectives") else -math.inf

    return [f"{': '.join(path)} {_change(was.get(path), now.get(path))}" for path in sorted(changed, key=order)]


def _counts(tree: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], float | str]:
    """Return the leaves of a record by their paths, without what names the program."""
    if not isinstance(tree, dict):
        return {path: tree}
    named = () if path else ("command", "versions", "reading", "program")
    return {
        key: leaf
        for name, each in tree.items()
        if name not in named
        for key, leaf in _counts(each, (*path, name)).items()
    }


def _same(was: float | str | None, now: float | str | None) -> bool:
    if was in (None, 0) and now in (None, 0):
        return True  # a part that an older record does not name, and of which there is none
    if isinstance(was, int | float) and isinstance(now, int | float):
        return math.isclose(was, now, rel_tol=1e-9)  # a sum depends on the order of its terms
    return was == now


def _size(value: float | str | None) -> float:
    return abs(value) if isinstance(value, int | float) else 0.0


def _change(was: float | str | None, now: float | str | None) -> str:
    if was is None or now is None:
        return f"is new: {_shown(now)}" if was is None else f"is gone: {_shown(was)}"
    if isinstance(was, str) or isinstance(now, str) or not was:
        return f"{_shown(was)} -> {_shown(now)}"
    return f"{_shown(was)} -> {_shown(now)} ({now / was - 1:+.2%})"


def _shown(value: float | str | None) -> str:
    return f"{value:.6g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def table(folder: Path, names: Sequence[str]) -> str:
    """Return the records as a table."""
    rows = []
    for name in names:
        if found := read(folder, name):
            flops, sent = found["flops"], found["collectives"].values()
            rows.append(
                {
                    "case": name,
                    "TFLOPs a step": flops["program"] / 1e12,
                    "÷ model": flops["program"] / flops.get("model, what masks show", flops["model"]),
                    "GiB moved": found["bytes moved"] / 2**30,
                    "GiB held": found["bytes of memory"]["peak"] / 2**30,
                    "collectives": sum(each["count"] for each in sent),
                    "GiB in them": sum(each["bytes"] for each in sent) / 2**30,
                    "fusions": found["instructions"]["fusions"],
                    "step, s": found.get("step, seconds", {}).get("all"),
                }
            )
    return record.markdown(rows) if rows else f"there are no records in {folder}"
