"""What `python -m benchmarks device` does on an accelerator: each part is a function that runs in a process of its own.

A part takes whether the sizes are small, as on a CPU, and a folder; it returns figures by their names with units.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import cells, record
from jaxmodels import tasks
from jaxmodels.config import AdamW, Config, Mesh, Synthetic, Train
from jaxmodels.errors import UserError
from jaxmodels.models.families import preset
from jaxmodels.parallel import hardware
from jaxmodels.train import beginning
from jaxmodels.train.checkpoint import Checkpointer
from jaxmodels.train.job import assemble

Figures = dict[str, Any]


class Step(NamedTuple):
    """A model whose training step is timed: its task, preset, fields, and batch."""

    task: str
    model: str
    fields: Mapping[str, Any]
    batch: int
    length: int | None = None
    """Tokens of an example, where it has any."""
    small: Mapping[str, Any] = {}
    """Fields of a small one, whose batch is 2 and whose length is 16."""


BODY = {"layers": 1, "width": 16, "heads": 2}
WORDS = {**BODY, "vocab_size": 64}
IMAGES = {"input_shape": (16, 16, 3), "classes": 3}
STEPS = {
    "gpt2": Step("causal_lm", "gpt2-small", {"vocab_size": 50304}, 32, 1024, WORDS),
    "llama": Step("causal_lm", "llama3.2-1b", {"remat": "dots"}, 8, 2048, {**WORDS, "kv_heads": 1, "mlp_width": 32}),
    "vit": Step("classification", "vit-b16", {}, 256, small={**BODY, **IMAGES, "patch": 8, "mlp_width": 32}),
    "resnet": Step(
        "classification", "resnet-50", {}, 256, small={**IMAGES, "depths": (1, 1), "widths": (16, 32), "stem_width": 8}
    ),
    "mixture": Step(
        "causal_lm",
        "mixtral-8x7b",
        {"layers": 8, "width": 768, "heads": 12, "kv_heads": 4, "mlp_width": 2048, "vocab_size": 32000},
        16,
        1024,
        {**WORDS, "kv_heads": 1, "mlp_width": 32, "experts": 4},
    ),
    "bert": Step("masked_lm", "bert-base", {"dropout": 0.0}, 64, 512, {**WORDS, "mlp_width": 32}),
}
"""The named models; all compute in bfloat16 on an accelerator, with float32 parameters and AdamW."""


def config(name: str, small: bool) -> Config:
    """Return the config of a named model's step on one device."""
    step = STEPS[name]
    fields = {**step.fields, **(step.small if small else {"dtype": "bfloat16"})}
    batch: dict[str, Any] = {"batch_size": 2 if small else step.batch}
    if step.length is not None:
        batch["seq_len"] = 16 if small else step.length
    return Config(
        model=dataclasses.replace(preset(step.model), **fields),
        task=tasks.TASKS.find(step.task)(),  # pyright: ignore
        data=Synthetic(**batch),
        optim=AdamW(),
        train=Train(steps=1000),
        mesh=Mesh(data=1),
    )


def step(name: str, small: bool, folder: Path) -> Figures:
    """Time a named model's step, and lay the plan beside it where the hardware is described."""
    from benchmarks import point

    cfg = config(name, small)
    found = point.measure(name, cfg, jax.devices()[:1], ["here"] * jax.process_count(), 3 if small else 30)
    if "failure" in found:
        raise UserError(found["failure"])
    seconds, plan = found["seconds"]["median"], found["plan"]
    peak = hardware.peak(jax.devices()[0], getattr(cfg.model, "dtype", "float32"))
    figures: Figures = {
        f"{found['unit']}/s": found["per_second"],
        "ms a step": seconds * 1e3,
        "GiB at the peak": found["memory"]["peak"] / 2**30,
    }
    if peak:
        figures["MFU"] = assemble(cfg, jax.devices()[:1], opened=False).flops().model / seconds / peak
    if "step_seconds" in plan:
        figures["planned ms ÷ measured"] = plan["step_seconds"] * 1e3 / figures["ms a step"]
    if "memory" in plan:
        figures["planned GiB ÷ measured"] = plan["memory"] / found["memory"]["peak"]
    return figures


def parity(small: bool, folder: Path) -> Figures:
    """Compare every kernel, forward and backward, with the reference in float32.

    Raises:
        UserError: one differs by more than its type's rounding explains, or fails.
    """
    found: dict[str, float] = {}
    wrong = []
    dtype, most = ("float32", 1e-4) if small else ("bfloat16", 0.03)
    kinds = ("causal",) if small else tuple(cells.KINDS)
    for kind in kinds:
        for K in (16,) if small else (64, 128, 256):
            cell = cells.Cell(kind, K, 64 if small else 512, 128 if small else 1024, 8 * K, dtype)
            for row in cells.parity(cell, cells.KERNELS):
                if "error" in row:
                    found[row["kernel"]] = max(found.get(row["kernel"], 0.0), row["error"])
                if row.get("error", 0.0) > most or row.get("why", "").startswith("failed"):
                    wrong.append(f"{row['kernel']} on {row['key']}, {row['pass']}: {row.get('error', row.get('why'))}")
    found["grouped products of experts"] = error = _grouped(16 if small else 512, jnp.dtype(dtype))
    wrong += [f"grouped products: {error}"] if error > most else []
    if wrong:
        raise UserError(f"got {len(wrong)} kernels that differ from the reference: {'; '.join(wrong[:5])}")
    return {f"error of {name}": value for name, value in found.items()}


def _grouped(width: int, dtype: Any) -> float:
    """Return the error of the grouped product and its gradients against a product of each expert in float32."""
    from jaxmodels.models.kernels.grouped import grouped

    sizes = [0, 3 * width // 8, width, width // 2 + 1]
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(sum(sizes), width)), dtype)
    w = jnp.asarray(rng.normal(size=(len(sizes), width, width)) / width**0.5, dtype)

    def apart(x: jax.Array, w: jax.Array, _: jax.Array) -> jax.Array:
        ends = np.cumsum(sizes)
        return jnp.concatenate([x[end - size : end] @ each for size, end, each in zip(sizes, ends, w, strict=True)])

    def both(fn: Callable[..., jax.Array]) -> Callable[..., Any]:
        def whole(x: jax.Array, w: jax.Array) -> Any:
            out, back = jax.vjp(lambda *given: fn(*given, jnp.asarray(sizes, jnp.int32)), x, w)
            return out, back(out)

        return jax.jit(whole)

    got = both(grouped)(x, w)
    with jax.default_matmul_precision("highest"):
        expected = both(apart)(x.astype(jnp.float32), w.astype(jnp.float32))
    return cells.error(got, expected)


def attention(small: bool, folder: Path) -> Figures:
    """Fill the attention table; a later call goes on where this one was stopped."""
    from benchmarks import attention as table

    options = table.Options(out=folder)
    if small:
        options = table.Options(calls=("causal", "decode"), head_dims=(16,), lengths=(32,), tokens=64, width=32,
                                rounds=2, out=folder)  # fmt: skip
    rows = table.run(options)
    measured = [row for row in rows if row.get("ms", 0) > 0 and not row.get("why")]
    taken = [row for row in measured if row["auto"]]
    return {
        "rows": len(measured),
        "best TFLOP/s of auto": max((row["tflops"] for row in taken if "tflops" in row), default=None),
        "best GB/s of auto": max((row["gb_s"] for row in taken if "gb_s" in row), default=None),
        "calls in which another is > 5 % faster": len(cells.overtaken(rows)),
    }


def engine(small: bool, folder: Path) -> Figures:
    """Train GPT-2 by the engine and by a bare jitted step, in turns."""
    from benchmarks import worker

    cfg, one = config("gpt2", small), jax.devices()[:1]
    return {"engine ÷ bare jitted step": _ratio(worker.engine(cfg, one), worker.bare(cfg, one), small)}


def data(small: bool, folder: Path) -> Figures:
    """Train a small GPT on the standard library's source and on synthetic batches, in turns."""
    from benchmarks import worker
    from configs import gpt_stdlib

    real = gpt_stdlib.get_config()
    real = dataclasses.replace(real, mesh=Mesh(data=1))
    if small:
        model = dataclasses.replace(real.model, **BODY, context=32)
        real = dataclasses.replace(real, model=model, data=dataclasses.replace(real.data, seq_len=32, batch_size=2))
    made = Synthetic(seq_len=real.data.seq_len, batch_size=real.data.batch_size)
    one = jax.devices()[:1]
    synthetic = worker.engine(dataclasses.replace(real, data=made), one)
    return {"real ÷ synthetic data": _ratio(worker.engine(real, one), synthetic, small)}


def _ratio(one: Callable[[int], Any], other: Callable[[int], Any], small: bool) -> float:
    """Return the throughput of one contestant ÷ the other's, the median over rounds in which they take turns."""
    steps, rounds = (1, 2) if small else (10, 7)
    for fn in (one, other):
        fn(1)  # a second program is compiled where a step leaves the state placed otherwise than its initialization
    times = record.interleave({"one": lambda: one(steps), "other": lambda: other(steps)}, rounds)
    return statistics.median(b / a for a, b in zip(times["one"], times["other"], strict=True))


def checkpoint(small: bool, folder: Path) -> Figures:
    """Save and restore GPT-2 with its optimizer: GB/s to the disk and back, and how long the step is held up."""
    cfg = config("gpt2", small)
    job = assemble(cfg, jax.devices()[:1])
    state = jax.block_until_ready(beginning.initial(job))
    leaves = [x for x in jax.tree.leaves(state) if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)]
    size = sum(leaf.nbytes for leaf in leaves)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        saver = Checkpointer(place)
        saver.warm()
        begun = time.perf_counter()
        saver.save(1, state, {})
        held = time.perf_counter() - begun
        saver.wait()
        saved = time.perf_counter() - begun
        begun = time.perf_counter()
        restored = saver.restore(job.layout)
        assert restored is not None
        jax.block_until_ready(restored[0])
        read = time.perf_counter() - begun
    return {"GB": size / 1e9, "GB/s saved": size / saved / 1e9, "GB/s restored": size / read / 1e9, "s held up": held}


def sampling(small: bool, folder: Path) -> Figures:
    """Sample from GPT-2 with random weights, with its cache, for one row and for many."""
    from jaxmodels.generate.sample import sample
    from jaxmodels.models.families import create

    model = create(config("gpt2", small).model)
    params = jax.jit(model.init)(jax.random.key(0))
    prompt, tokens = (8, 8) if small else (128, 256)
    found: Figures = {}
    for rows in (2,) if small else (1, 64):
        given = np.ones((rows, prompt), np.int32)
        times = record.interleave({"sample": lambda given=given: sample(model, params, given, tokens)}, 3)
        found[f"tokens/s, {rows} at a time"] = rows * tokens / statistics.median(times["sample"])
    return found


class Part(NamedTuple):
    """A part: what it says in one line, its function, and the most of the seconds left that it may take."""

    about: str
    run: Callable[[bool, Path], Figures]
    share: float = 1.0


def _named(name: str) -> Callable[[bool, Path], Figures]:
    return lambda small, folder: step(name, small, folder)


PARTS = {
    "parity": Part("every kernel against the reference in float32", parity),
    "attention": Part("the attention table", attention, 0.35),
    "gpt2": Part("GPT-2 124M, T=1024: a training step", _named("gpt2")),
    "llama": Part("Llama-3.2-1B, T=2048: a training step with its optimizer", _named("llama")),
    "vit": Part("ViT-B/16 at 224: a training step", _named("vit")),
    "resnet": Part("ResNet-50 at 224: a training step", _named("resnet")),
    "mixture": Part("a mixture of 8 experts, 8 layers, 768 wide, T=1024: a training step", _named("mixture")),
    "bert": Part("BERT-base, T=512: a training step", _named("bert")),
    "engine": Part("GPT-2 by the engine against a bare jitted step", engine),
    "data": Part("real data against synthetic batches", data),
    "checkpoint": Part("GPT-2 and its optimizer, saved and restored", checkpoint),
    "sampling": Part("GPT-2, sampled with its cache", sampling),
}
"""In the order of worth."""
