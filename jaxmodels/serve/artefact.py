"""Write an artefact: a run's weights and functions in a folder that jax and numpy alone can run.

What reads it is `artefact_run`, of which a copy lies in the folder as run.py.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from jaxmodels.errors import UserError
from jaxmodels.generate import asked
from jaxmodels.models.families import family_of
from jaxmodels.serve import artefact_functions, artefact_run
from jaxmodels.serve.artefact_functions import BATCH, LENGTH, Arrays, Function, Input, flatten, unflatten
from jaxmodels.train.saved import Run

PLATFORMS = ("cpu", "cuda", "tpu")
BELOW = "0.13"
"""The first version of jax that an artefact is not for: this package does not support it either. The oldest is the one
that writes, since older ones do not know all that it writes. jax itself promises less: to read for six months."""
SAME, OTHER = 1e-4, 3e-2
"""How far a probe's outputs may lie from those that were kept, as a part of the largest of them: on the platform that
they were computed on, and on another, which may multiply in fewer bits. In bfloat16 it is always the latter."""
_CODES = {jnp.dtype(name): code for code, name in artefact_run.DTYPES.items()}


def write(run: Run, folder: Path) -> dict[str, Any]:
    """Write a run's artefact into an empty folder; return its manifest.

    Raises:
        UserError: the run has no functions to export, or they do not give what the run gives.
    """
    run = run.numbers()
    most = run.model.longest if "model" in run.networks else None
    plain = artefact_functions.portable(run)
    found = artefact_functions.functions(plain)
    weights = {"params": run.params, "stats": run.stats}
    exported = {name: exported_of(plain, name, each, weights, most) for name, each in found.items()}
    used = sorted({path for names, _ in exported.values() for path in names})
    flat = flatten(weights)
    (folder / "functions").mkdir()
    save_tensors(folder / "weights.safetensors", {path: flat[path] for path in used})
    for name, (_, each) in exported.items():
        (folder / "functions" / f"{name}.mlirbc").write_bytes(each.mlir_module_serialized)
    save_tensors(folder / "probe.safetensors", probe(run, found, exported, flat, most))
    shutil.copyfile(artefact_run.__file__, folder / "run.py")
    told = {
        "format": "jaxmodels-artefact",
        "version": 1,
        "model": family_of(run.config.model).name,
        "task": run.config.task.kind,
        "answers": run.config.task.answers,
        "step": run.step,
        "parameters": sum(math.prod(flat[path].shape) for path in used if path.startswith("params/")),
        "trained_on": run.kept.train,
        "jax": {"from": ".".join(map(str, jax.__version_info__)), "below": BELOW},
        "platforms": list(PLATFORMS),
        "platform": jax.default_backend(),
        "tolerance": {"same": tolerance(run), "other": OTHER},
        "most": {} if most is None else {LENGTH: most},
        "weights": {path: {"shape": list(flat[path].shape), "dtype": flat[path].dtype.name} for path in used},
        "functions": {name: entry(name, each, exported[name]) for name, each in found.items()},
        **about(run, folder),
    }
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    told["files"] = {path.relative_to(folder).as_posix(): facts(path) for path in files}
    whole = signed(told)
    (folder / "manifest.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    return whole


def signed(told: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest with the hash of everything else in it."""
    rest = {name: value for name, value in told.items() if name != "sha256"}
    return {**rest, "sha256": hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()}


def exported_of(
    run: Run, name: str, function: Function, weights: Any, most: int | None
) -> tuple[list[str], export.Exported]:
    """Export a function for all platforms; also return the paths of the weights that it reads."""
    flat = flatten(weights)
    shapes = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in flat.items()}
    limited = most is not None and any(LENGTH in want.shape for want in function.inputs.values())
    scope = export.SymbolicScope([f"{LENGTH} <= {most}"] if limited else [])
    names = [BATCH, LENGTH, "gaps"]
    dims = dict(zip(names, export.symbolic_shape(", ".join(names), scope=scope), strict=True))
    inputs = {key: struct(want, dims) for key, want in function.inputs.items()}
    call = jax.jit(called(run, function))
    try:
        shapes = {path: shapes[path] for path in read(call, shapes, inputs)}
        found = export.export(call, platforms=PLATFORMS)(shapes, inputs)
    except UserError:
        raise
    except (TypeError, ValueError, NotImplementedError) as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(
            f"got a {family_of(run.config.model).name}, whose {name} jax.export does not take for any number of rows "
            f"and tokens ({type(error).__name__}: {said}), expected a model that it does, try --format huggingface"
        ) from error
    return list(shapes), found


def read(call: Any, weights: Arrays, inputs: Arrays) -> list[str]:
    """The paths of those weights that a function reads: a network that only trains another is not among them."""
    jaxpr = call.trace(weights, inputs).jaxpr.jaxpr
    used = {id(x) for equation in jaxpr.eqns for x in equation.invars} | {id(x) for x in jaxpr.outvars}
    return [path for path, x in zip(sorted(weights), jaxpr.invars, strict=False) if id(x) in used]


def called(run: Run, function: Function) -> Any:
    """The function of weights by path and inputs by name."""

    def call(weights: Arrays, inputs: Arrays) -> Arrays:
        held = unflatten(weights)
        own = dataclasses.replace(run, params=held.get("params", {}), stats=held.get("stats", {}))
        return dict(function.compute(own, inputs))

    return call


def struct(want: Input, dims: Mapping[str, Any]) -> jax.ShapeDtypeStruct:
    shape = tuple(dims[n] if isinstance(n, str) else n for n in want.shape)
    return jax.ShapeDtypeStruct(shape, jnp.dtype(want.dtype))


def probe(
    run: Run,
    found: Mapping[str, Function],
    exported: Mapping[str, tuple[list[str], export.Exported]],
    flat: Arrays,
    most: int | None,
) -> Arrays:
    """Inputs of each function, and what the run gives for them with its own kernels.

    Raises:
        UserError: what was exported gives something else, or what is given is no finite number.
    """
    own = artefact_functions.portable(run, "auto")
    kept: Arrays = {}
    cache: Arrays = {}
    for name, function in found.items():
        paths, each = exported[name]
        inputs = artefact_functions.example(function.inputs, most, cache)
        weights = {path: jnp.asarray(flat[path]) for path in paths}
        outputs = jax.device_get(jax.jit(called(own, function))(weights, inputs))
        again = jax.device_get(jax.jit(each.call)(weights, inputs))
        for key, old in outputs.items():
            apart = distance(old, again[key])
            if not np.isfinite(np.asarray(old, np.float64)).all():
                raise UserError(f"got {key} of {name} that are no finite numbers, expected a run that gives some")
            if not apart <= tolerance(run):
                raise UserError(
                    f"got {key} of {name} that differ by {apart:.1e} once exported, expected at most "
                    f"{tolerance(run):.0e} of the largest, try --format huggingface"
                )
        cache |= {key: x for key, x in outputs.items() if key.startswith(artefact_functions.CACHE)}
        kept |= {f"{name}/inputs/{key}": np.asarray(x) for key, x in inputs.items()}
        kept |= {f"{name}/outputs/{key}": np.asarray(x) for key, x in outputs.items()}
    return kept


def distance(old: Any, new: Any) -> float:
    """The largest difference, as a part of the largest number."""
    old, new = np.asarray(old, np.float64), np.asarray(new, np.float64)
    return float(np.abs(new - old).max(initial=0) / max(np.abs(old).max(initial=0), 1e-6))


def tolerance(run: Run) -> float:
    low = any(getattr(run.config.model, "dtype", "float32") == kind for kind in ("bfloat16", "float16"))
    return OTHER if low or run.config.train.quantize != "none" else SAME


def entry(name: str, function: Function, exported: tuple[list[str], export.Exported]) -> dict[str, Any]:
    """A function's lines of the manifest."""
    paths, each = exported
    outs = jax.tree.unflatten(each.out_tree, each.out_avals)
    return {
        "file": f"functions/{name}.mlirbc",
        "convention": {
            "version": each.calling_convention_version,
            "kept": list(each.module_kept_var_idx),
            "constants": each.uses_global_constants,
        },
        "weights": paths,
        "inputs": {key: described(want) for key, want in function.inputs.items()},
        "outputs": {key: {"shape": [dim(n) for n in x.shape], "dtype": x.dtype.name} for key, x in outs.items()},
    }


def described(want: Input) -> dict[str, Any]:
    bounds = {name: value for name, value in (("least", want.least), ("below", want.below)) if value is not None}
    return {"shape": list(want.shape), "dtype": want.dtype, **bounds}


def dim(size: Any) -> int | str:
    return size if isinstance(size, int) else str(size)


def about(run: Run, folder: Path) -> dict[str, Any]:
    """What a caller must know beside the functions: classes, how images are made, how texts begin and end."""
    told: dict[str, Any] = {}
    section, answers = run.config.data, run.config.task.answers
    if answers in ("class", "classes"):
        told["classes"] = [run.class_name(i) for i in range(run.model.config.classes)]
    if answers == "caption":
        told["classes"] = list(section.class_names or run.kept.classes)
        told["captions"] = list(section.captions)
    if artefact_functions.kind_of(run) == "image":
        height, width, channels = run.networks[next(iter(run.networks))].inputs(1)[0].shape[1:]
        told["images"] = {
            "height": height,
            "width": width,
            "channels": channels,
            "crop": "the central 7/8" if run.config.augment.crop is not None else None,
            "resize": section.pixels,
            "mean and std, applied by the functions": [list(section.mean), list(section.std)],
        }
    if artefact_functions.kind_of(run) == "audio":
        told["sounds"] = {"rate": run.task.fields["inputs"].rate, "samples": "mono, in [-1, 1], zeros behind the last"}
    tokenizer = run.tokenizer
    if tokenizer is not None:
        tokenizer.save(folder)
        translates, longest = answers == "translation", run.model.longest if "model" in run.networks else None
        context = None if longest is None else longest + 1 - len(tokenizer.special.opening)
        room = [n for n in (getattr(run.config.task, "target_len", None), context) if n is not None]
        told["text"] = {
            "before": list(tokenizer.special.before if translates else tokenizer.before),
            "after": list(tokenizer.after),
            "end": tokenizer.end,
            "ends": list(tokenizer.special.ends or ((tokenizer.end,) if translates else ())),
            "length": section.seq_len,
            **({"most": min(room, default=10**9)} if translates else {}),
            "repetition_penalty": asked.repetition_penalty(run.directory) if answers == "continuation" else 1.0,
        }
    return told


def facts(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": path.stat().st_size}


def save_tensors(path: Path, arrays: Arrays) -> None:
    """Write arrays as safetensors, one after the other."""
    header, at = {}, 0
    for name, x in arrays.items():
        size = x.dtype.itemsize * math.prod(x.shape)
        header[name] = {"dtype": _CODES[x.dtype], "shape": list(x.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for x in arrays.values():
            file.write(np.ascontiguousarray(np.asarray(x)).tobytes())
