"""What one training step is, exactly: the hash of its lowered program, and what the compiled program does.

`python -m benchmarks exact` calls these in processes of their own, whose JAX has eight CPU devices (see `prepare`).
"""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jaxmodels
from jaxmodels.config import Config
from jaxmodels.errors import UserError

READERS = ("plan/hlo.py", "plan/products.py", "plan/program.py", "plan/groups.py", "plan/roofline.py",
           "plan/figures.py", "plan/compile.py", "parallel/hardware.py")  # fmt: skip
"""Files of the package by which a compiled program is read; with another reading, the same program has other counts."""
CPU = "cpu:8"
"""Eight devices of the CPU that is here."""
SMALL = 0.002
"""The share of a step's bytes or FLOPs below which an instruction is counted with the others of its layer."""


def prepare() -> None:
    """Set, before JAX is imported, what processes that lower and compile need."""
    os.environ.update(
        JAX_PLATFORMS="cpu",
        XLA_FLAGS="--xla_force_host_platform_device_count=8",
        TPU_SKIP_MDS_QUERY="1",
        TF_CPP_MIN_LOG_LEVEL="3",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",  # no process uses a TPU here, so several may compile at once
    )


def program(cfg: Config, on: str) -> str:
    """Return the hash of the step's lowered program and of the options that it is compiled with."""
    lowered, _ = _lowered(cfg, on)
    given = json.dumps(cfg.train.xla)
    return hashlib.sha256((_without_origins(lowered.as_text()) + given).encode()).hexdigest()[:24]


def _without_origins(text: str) -> str:
    """Return a lowered program without what depends on where its code lies and on this process.

    A Pallas kernel for TPUs is bytecode that names the files and lines that it comes from; a custom partitioning is the
    address of a Python function.
    """
    from jax._src.interpreters import mlir
    from jax._src.lib import tpu
    from jax._src.lib.mlir import ir

    context = mlir.make_ir_context()
    context.allow_unregistered_dialects = True
    tpu.register_dialect(context)

    def kernel(found: re.Match[str]) -> str:
        with context:
            parsed = ir.Module.parse(base64.b64decode(found.group(1)))
            return hashlib.sha256(str(parsed.operation.get_asm(enable_debug_info=False)).encode()).hexdigest()

    text = re.sub(r"(?<=body\\22: \\22)([A-Za-z0-9+/=]+)(?=\\22)", kernel, text)
    return re.sub(r'(@CustomSPMDPartitioning.*?backend_config = )"[^"]*"', r"\1", text)


def counts(cfg: Config, on: str, key: str) -> dict[str, Any]:
    """Compile the step and count; `key` is its `program`, by which compiled programs are kept.

    Returns:
        FLOPs, bytes, seconds (not of a CPU), memory, collectives and layers. All are of one device and one step,
        except that `flops` has those of all devices beside them.

    Raises:
        UserError: the step does not compile, or the figures contradict each other.
    """
    if on == CPU:
        return _counts_here(cfg)
    from jaxmodels.plan import compile as compiling
    from jaxmodels.plan import program as programs
    from jaxmodels.plan import topology
    from jaxmodels.plan.figures import figures

    made = compiling.compiled(cfg, topology.parse(on), program=key)
    plan = figures(cfg, made)
    if not plan["fits"]:
        raise UserError(f"got a step that does not fit on {on} ({plan['shortage'] or plan['memory']['peak']})")
    if plan["uncounted"]:
        raise UserError(f"got a step for {on} whose FLOPs are not known, of {', '.join(plan['uncounted'])}")
    memory = {name: plan["memory"][name] for name in ("peak", *made.held, "host", "gradients", "arguments")}
    return {
        "flops": {
            "model": plan["model_flops"],
            "model, what masks show": plan["model_flops_causal"],
            "program": plan["hardware_flops"],
        },
        "bytes moved": plan["moved"],
        "bytes of memory": memory,
        "step, seconds": {"all": plan["step_seconds"], **plan["seconds"]},
        "attention": ", ".join(plan["attention"]),
        "collectives": {
            f"{each['kind']} {'*'.join(each['axes']) or '-'} over {each['link']}": {
                "count": each["count"],
                "bytes": each["bytes"],
            }
            for each in sorted(plan["transfers"], key=lambda each: (each["kind"], each["axes"], each["link"]))
        },
        **_instructions(programs.parse(made.text)),
    }


def reading() -> str:
    """Return the hash of the code that reads compiled programs, whatever its comments and docstrings."""
    root, found = Path(jaxmodels.__file__).parent, hashlib.sha256()
    for name in READERS:
        tree = ast.parse((root / name).read_text())
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list):
                node.body = [each for each in body if not _said(each)]  # pyright: ignore[reportAttributeAccessIssue]
        found.update(ast.dump(tree).encode())
    return found.hexdigest()[:24]


def _said(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _lowered(cfg: Config, on: str) -> tuple[Any, Any]:
    """Return the lowered step and its job."""
    import jax

    from jaxmodels.plan import topology
    from jaxmodels.train.job import assemble

    if on == CPU:
        job = assemble(cfg, jax.devices("cpu"), opened=False)
        return job.lower(("cpu",)), job
    where = topology.parse(on)
    topology.check_compiler(where)
    job = assemble(cfg, topology.describe(where).devices, opened=False)
    return job.lower((where.hardware.platform,)), job


def _counts_here(cfg: Config) -> dict[str, Any]:
    """Count the step as it is compiled for CPU devices; their time is not known."""
    from jaxmodels.plan import program as programs
    from jaxmodels.plan.groups import groups_of

    lowered, job = _lowered(cfg, CPU)
    compiled = lowered.compile()
    memory, read = compiled.memory_analysis(), programs.parse(compiled.as_text())
    if unknown := read.uncounted():
        raise UserError(f"got a step for {CPU} whose FLOPs are not known, of {', '.join(unknown)}")
    sizes = dict(job.mesh.shape)
    flops = moved = 0.0
    sent: dict[str, dict[str, float]] = {}
    for where, each, times in read.walk():
        flops += times * programs.flops(read, where, each)
        moved += times * programs.moved(read, where, each)
        if each.kind is not None:
            group = max(groups_of(each.attributes, job.mesh.size), key=len)
            row = sent.setdefault(f"{each.kind} {_axes(group, sizes)}", {"count": 0, "bytes": 0.0})
            row["count"] += int(times)
            row["bytes"] += times * programs.size(each.shape)
    return {
        "flops": {"model": job.flops().model, "program": flops * job.mesh.size},
        "bytes moved": moved,
        "bytes of memory": {
            "peak": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
            "arguments": memory.argument_size_in_bytes,
        },
        "collectives": dict(sorted(sent.items())),
        **_instructions(read),
    }


def _axes(group: list[int], sizes: dict[str, int]) -> str:
    """Return the mesh axes along which the devices of a group differ."""
    import numpy as np

    where = np.stack(np.unravel_index(np.array(group), tuple(sizes.values())))
    return "*".join(axis for axis, row in zip(sizes, where, strict=True) if len(set(row.tolist())) > 1) or "-"


def _instructions(read: Any) -> dict[str, Any]:
    """Return how many instructions a program has, and what those of each layer compute and move."""
    from jaxmodels.plan import program as programs

    layers: dict[str, dict[str, float]] = {}
    for where, each, times in read.walk():
        row = {
            "flops": times * programs.flops(read, where, each),
            "bytes": times * programs.moved(read, where, each),
        }
        if any(row.values()):
            found = layers.setdefault(layer(each.label), {"count": 0, "flops": 0.0, "bytes": 0.0})
            found["count"] += int(times)
            for name, value in row.items():
                found[name] += value
    issued = [each for computation in read.computations.values() for each in computation.instructions.values()]
    return {
        "instructions": {
            "all": len(issued),
            "fusions": sum(each.opcode == "fusion" for each in issued),
            "custom calls": sum(each.opcode == "custom-call" for each in issued),
        },
        "layers": dict(sorted(_large(layers))),
    }


def _large(layers: dict[str, dict[str, float]]) -> Iterator[tuple[str, dict[str, float]]]:
    """The rows that matter, and one for the others."""
    total = {name: sum(row[name] for row in layers.values()) or 1.0 for name in ("flops", "bytes")}
    rest = {"count": 0, "flops": 0.0, "bytes": 0.0}
    for name, row in layers.items():
        if any(row[key] >= SMALL * total[key] for key in total):
            yield name, row
        else:
            rest = {key: rest[key] + row[key] for key in rest}
    yield "others", rest


def layer(label: str) -> str:
    """Return the layer, direction and instruction of a label: jit(run)/transpose(jvp(GPT2))/h/q/dot_general.

    Without a label an instruction goes by its name, without its number.
    """
    if "/" not in label:
        return "unnamed " + re.sub(r"[.\d]+$", "", label)
    backward = " backward" if "transpose(" in label else ""
    parts, around = label, re.compile(r"\b(?:jit|jvp|transpose|vmap)\(([^()]*)\)")
    while around.search(parts):
        parts = around.sub(r"\1", parts)
    kept = [part for part in parts.split("/") if part not in ("", "run", "while", "body", "closed_call", "checkpoint")]
    return f"{'/'.join(kept[:-1]) or 'outside of layers'}{backward} {kept[-1] if kept else ''}".rstrip()
