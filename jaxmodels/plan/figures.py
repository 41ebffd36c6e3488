"""The figures of a plan: memory, FLOPs and time of a compiled step, checked against each other, and as a table."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

from jaxmodels.config import Config
from jaxmodels.errors import UserError
from jaxmodels.models.kernels.visibility import Mask
from jaxmodels.plan import products, program, roofline
from jaxmodels.plan.candidates import remats
from jaxmodels.plan.compile import Compiled
from jaxmodels.plan.program import Program
from jaxmodels.plan.roofline import Estimate

ENOUGH = 0.98
"""The least FLOPs of a program relative to its model's; compilers remove products that have no effect."""
MUCH = 2.5
"""FLOPs of a program relative to its model's that need no explanation: rematerialization and whole blocks of masks."""


def figures(cfg: Config, made: Compiled) -> dict[str, Any]:
    """All figures of a compiled step, as JSON values. Bytes are per device.

    There is no time if it does not fit on a device, or if it is not known what a part of the program takes
    ("uncounted"): a kernel, a loop of unknown length, or copies over a link whose rate nobody has published.

    Raises:
        UserError: the figures contradict each other.
    """
    row, on = made.topology.hardware, made.topology
    found: dict[str, Any] = {
        "on": on.name,
        "platform": row.platform,
        "devices": on.devices,
        "mesh": made.mesh,
        "parameters": made.parameters["all"],
        "trained": made.parameters["trained"],
        "fits": made.fits and made.fits_host,
        "fits_host": made.fits_host,
        "memory": {
            "device": int(row.memory),
            "peak": made.peak,
            **made.held,
            "host": made.hosted,
            "host_saved": made.saved,
            "host_size": int(row.host_memory),
            "gradients": made.gradients,
            "activations": max(0, made.temporaries - made.gradients),
            "arguments": made.arguments,
        },
        "shortage": made.shortage or shortage_of_host(made),
        "largest": made.largest,
        "model_flops": made.flops["model"],
        "compile_seconds": made.seconds,
        "compile_memory": made.memory,
        "source": row.source,
    }
    if not made.text:
        return found
    dtype, compiled = getattr(cfg.model, "dtype", "float32"), program.parse(made.text)
    found |= {"attention": compiled.kernels(), "uncounted": compiled.uncounted()}
    if not row.host and compiled.uses_host():
        found["uncounted"].append(f"copies between {row.name} and its host, whose link has no published rate")
    if found["uncounted"]:
        return found  # a time that leaves them out would be wrong
    dtype = dtype if dtype in row.flops else "bfloat16"
    found |= speed(cfg, made, roofline.estimate(compiled, made.places, dtype), dtype)
    return found | {"excess": excess(compiled, found["hardware_flops"] / max(found["model_flops_causal"], 1))}


def shortage_of_host(made: Compiled) -> str:
    """What a step needs of its hosts if they do not have it; else empty."""
    if made.fits_host:
        return ""
    needed, has = made.hosted + made.saved, made.topology.hardware.host_memory
    return f"needs {needed / 2**30:.2f} GiB of host memory a device, of which there are {has / 2**30:.2f}"


def check_counts(on: str, computed: float, needed: float, mfu: float) -> None:
    """Check that a program has the FLOPs that its model needs, and that the step stays below the peak.

    Raises:
        UserError: one of them does not hold.
    """
    report = "try another topology, and report this config"
    if computed < ENOUGH * needed:
        raise UserError(
            f"got a program for {on} of {computed:.4g} FLOPs a step where the model needs {needed:.4g}, expected as "
            f"many at least: some of its products are not counted, {report}"
        )
    if not 0 < mfu <= 1:
        raise UserError(f"got a plan for {on} at {mfu:.1%} of the peak, expected at most 100 %, {report}")


def excess(compiled: Program, times: float) -> str:
    """Why a program computes `times` its model's products; empty if that is within the usual range.

    It is not an error: the reference attention kernel, for example, computes all pairs that a short window hides.
    """
    if times <= MUCH:
        return ""
    parts = compiled.parts()
    total, hiding = sum(parts.values()), collections.defaultdict[str, float](float)
    for label, flops in parts.items():
        mask, kernel = Mask.of(label), products.attention(label)
        if mask is not None and kernel is not None and mask.share < 1:
            hiding[kernel] += flops / total
    message = f"computes {times:.1f} x the model's products: "
    hidden = sum(hiding.values())
    if hidden > 2 / 3:  # more than the model needs even with full rematerialization
        kernels = ", ".join(sorted(hiding))
        return f"{message}{hidden:.0%} are attention's (kernel {kernels}), which computes much that its masks hide"
    label = max(parts, key=lambda name: parts[name])
    return f"{message}{parts[label] / total:.0%} are of {label or 'instructions without a name'}"


def speed(cfg: Config, made: Compiled, estimate: Estimate, dtype: str) -> dict[str, Any]:
    """The predicted time and throughput; MFU is relative to the peak of `dtype`.

    Raises:
        UserError: the counts contradict each other.
    """
    step, devices = estimate.seconds, made.topology.devices
    peak = made.topology.hardware.flops[dtype]
    full, shown = (made.flops[name] / step / devices / peak for name in ("model", "visible"))
    check_counts(made.topology.name, estimate.flops * devices, made.flops["visible"], shown)
    return {
        "step_seconds": step,
        "binds": estimate.binds,
        "seconds": {
            "compute": estimate.products,
            "memory": estimate.memory,
            "waiting for links": estimate.waiting,
            "launches": estimate.launching,
        },
        "hardware_flops": estimate.flops * devices,
        "model_flops_causal": made.flops["visible"],
        "moved": estimate.moved,
        "unit": made.unit,
        "per_second": made.units / step,
        "per_second_device": made.units / step / devices,
        # half the pairs of a causal mask are never computed, so in full they may exceed the peak
        "mfu": full if full <= 1 else shown,
        "mfu_causal": shown,
        "peak_flops": peak,
        "peak_of": dtype,
        "device_hours": cfg.train.steps * step * devices / 3600,
        "transfers": [dataclasses.asdict(each) for each in estimate.transfers],
        "assumed": roofline.shares(made.topology.hardware),
    }


def figures_table(cfg: Config, plan: dict[str, Any]) -> str:
    """The figures as text."""
    memory = plan["memory"]
    mesh = " ".join(f"{axis}={size}" for axis, size in plan["mesh"].items() if size > 1) or "one device"
    adapted = memory["base"] > 0
    lines = [
        "",
        f"{plan['on']}: {plan['devices']:,} device(s), mesh {mesh}, {plan['parameters']:,} parameters, "
        + (f"{plan['trained']:,} of them trained ({plan['trained'] / plan['parameters']:.2%}), " if adapted else "")
        + f"batch {cfg.data.batch_size}",
        "",
        "memory of a device" + f"{'GiB':>22}",
    ]
    shown = ("base", "teacher", "parameters", "optimizer", "average", "statistics", "batch", "gradients", "activations")
    lines += [
        f"  {name:<24}{memory[name] / 2**30:>12.2f}" + (f"   {memory[name]:,} bytes" if adapted else "")
        for name in shown
        if memory[name]
    ]
    lines.append(f"  {'peak':<24}{memory['peak'] / 2**30:>12.2f}   of {memory['device'] / 2**30:.2f}, by the compiler")
    lines += hosted(memory)
    if plan["fits"]:
        # JAX allocates .75 of a GPU by default
        share = memory["peak"] / memory["device"] if plan["platform"] == "cuda" else 0.0
        more = ", with XLA_PYTHON_CLIENT_MEM_FRACTION=.98 in the environment (JAX takes .75 of a GPU otherwise)"
        lines.append("  it fits" + (more if share > 0.75 else ""))
    else:
        lines += ["  IT DOES NOT FIT" + (f": {plan['shortage']}" if plan["shortage"] else ""), *remedies(cfg, plan)]
        lines += [f"    {size / 2**30:8.2f}  {name}" for size, name in plan["largest"]]
    lines.append("")
    if plan.get("attention"):
        lines += [f"attention: kernel {', '.join(plan['attention'])}"]
    if "step_seconds" not in plan:
        if plan.get("uncounted"):
            lines.append(f"no time is given, for what these take is not known: {', '.join(plan['uncounted'])}")
        lines.append(f"compiling took {plan['compile_seconds']:.0f} s")
        return "\n".join(lines)
    lines += [
        f"step: {plan['step_seconds']:.4g} s predicted, bound by {plan['binds']} ("
        + ", ".join(f"{name} {seconds:.3g} s" for name, seconds in plan["seconds"].items())
        + ")",
        f"  {plan['per_second']:,.0f} {plan['unit']}/s, {plan['per_second_device']:,.0f} a device",
        f"  MFU {plan['mfu']:.1%} (attention in full), {plan['mfu_causal']:.1%} (what masks show), of "
        f"{plan['peak_flops'] / 1e12:.4g} TFLOP/s {plan['peak_of']}",
        f"  FLOPs a step: model {plan['model_flops']:.4g} (attention in full), {plan['model_flops_causal']:.4g} (what "
        f"masks show); hardware {plan['hardware_flops']:.4g}",
        *[f"  {plan['excess']}"] * bool(plan["excess"]),
        f"  {cfg.train.steps:,} steps: {plan['device_hours']:,.4g} device-hours",
        "",
    ]
    if plan["transfers"]:
        lines.append(
            f"{'collectives a step':<22}{'along':<18}{'over':<12}{'devices':>8}{'count':>8}{'GiB':>10}{'s':>10}"
        )
        lines += [
            f"  {t['kind']:<20}{'*'.join(t['axes']) or '-':<18}{t['link']:<12}{t['devices']:>8}{t['count']:>8}"
            f"{t['bytes'] / 2**30:>10.3f}{t['seconds']:>10.3g}"
            for t in plan["transfers"]
        ]
        lines.append("")
    assumed = ", ".join(f"{name} {value:g}" for name, value in plan["assumed"].items())
    lines += [
        f"assumed: {assumed}",
        f"hardware: {plan['source']}",
        f"compiling took {plan['compile_seconds']:.0f} s and {plan['compile_memory'] / 2**30:.1f} GiB",
    ]
    return "\n".join(lines)


def hosted(memory: dict[str, Any]) -> list[str]:
    """Lines on what lies in host memory, for each device."""
    parts = {"optimizer": memory["host"], "inputs of blocks": memory["host_saved"]}
    if not (total := sum(parts.values())):
        return []
    capacity = f"of {memory['host_size'] / 2**30:.2f}" if memory["host_size"] else "of an unknown size"
    parts = {name: size for name, size in parts.items() if size}
    each = ", ".join(f"{name} {size / 2**30:.2f}" if len(parts) > 1 else name for name, size in parts.items())
    return [f"  {'on its host':<24}{total / 2**30:>12.2f}   {capacity} a device ({each})"]


def remedies(cfg: Config, plan: dict[str, Any]) -> list[str]:
    """Options that may make a step fit."""
    memory = plan["memory"]
    if not plan["fits_host"] and memory["peak"] <= memory["device"]:
        tried = ["--model.remat full"] * bool(memory["host_saved"]) + ["--optim.offload False"] * bool(memory["host"])
        return [f"  the host is full: try {' or '.join(tried)}, or more devices"]
    kept = sum(memory[name] for name in ("base", "teacher", "parameters", "optimizer", "average", "gradients"))
    if kept > 0.8 * memory["device"]:
        return [
            "  parameters, optimizer and gradients alone fill the device: try a larger --mesh.fsdp, or more devices"
        ]
    tried, kinds, remat = [], remats(cfg.model), getattr(cfg.model, "remat", "none")
    if "full" in kinds and remat in ("none", "dots"):
        tried.append("--model.remat full")
    elif "offload" in kinds and remat == "full":
        tried.append("--model.remat offload")
    return [
        f"  activations fill the device: try {' or '.join([*tried, f'--train.accumulate {2 * cfg.train.accumulate}'])}"
    ]
