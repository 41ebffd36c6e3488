"""One family on one side in a process of its own: `python -m benchmarks.family ours|torch NAME`.

Prints a JSON line when both programs have run once, then the seconds of each turn that is read from standard input as
`forward COUNT` or `train COUNT`.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.sizes import SIZES, Size

Run = Callable[[], Any]


def job(size: Size) -> Any:
    """Return the job that the family's training is, on one device, with AdamW as PyTorch has it."""
    import jax

    from jaxmodels import tasks
    from jaxmodels.config import AdamW, Config, Constant, Synthetic, Train
    from jaxmodels.train.job import assemble

    everything = ("matrix", "embedding", "bias", "norm")
    cfg = Config(
        model=size.config,
        task=tasks.TASKS.find(size.task)(),  # pyright: ignore
        data=Synthetic(seq_len=size.length, batch_size=size.batch),
        optim=AdamW(b2=0.999, decay_on=everything, clip_norm=None, schedule=Constant()),
        train=Train(steps=1000),
    )
    return assemble(cfg, jax.devices()[:1], opened=False)


def arrays(size: Size) -> dict[str, np.ndarray]:
    """Return a batch of token ids, classes, or numbers in [0, 1)."""
    config, rng = size.config, np.random.default_rng(0)
    spec = job(size).task.batch_spec(size.batch)
    found: dict[str, np.ndarray] = {}
    for name, leaf in spec.items():
        whole = np.issubdtype(leaf.dtype, np.integer)
        most = config.classes if name == "labels" else 1000
        found[name] = (rng.integers(5, most, leaf.shape) if whole else rng.random(leaf.shape)).astype(leaf.dtype)
        if name == "labels":
            found[name] = rng.integers(0, most, leaf.shape).astype(leaf.dtype)
    return found


def ours(size: Size, batch: dict[str, np.ndarray]) -> dict[str, Run]:
    """Return `forward`, the model alone, and `train`, the engine's step, each under a bare `jax.jit`."""
    import jax
    import jax.numpy as jnp

    from jaxmodels.models.families import create
    from jaxmodels.train import state, step

    assembled = job(size)
    task, optimizers = assembled.task, assembled.optimizers
    take = jax.jit(
        lambda now, batch: step.advance(task, optimizers, now, batch, accumulate=1, ema=None), donate_argnums=0
    )
    held = [jax.jit(lambda key: state.init(task, optimizers, key))(jax.random.key(0))]
    data = jax.tree.map(jnp.asarray, batch)
    model = create(size.config)
    stats: Any = model.stats() or None
    params = jax.jit(model.init)(jax.random.key(0))
    given = jax.tree.map(jnp.asarray, inputs(size, batch))
    extra: Any = {} if stats is None else {"stats": stats}
    out = lambda params, given: model.apply(params, *given, **extra)  # noqa: E731
    apply = jax.jit(out)

    def train() -> Any:
        held[0], metrics = take(held[0], data)
        return metrics

    return {
        "forward": lambda: jax.block_until_ready(apply(params, given)),
        "train": lambda: jax.block_until_ready(train()),
    }


def inputs(size: Size, batch: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    """Return the parts of a batch that the model alone takes."""
    if size.task == "gan":
        return (np.random.default_rng(0).normal(size=(size.batch, size.config.latents)).astype(np.float32),)
    if size.task == "contrastive":
        return batch["images"], batch["tokens"]
    if size.task == "seq2seq":
        return batch["inputs"], batch["tokens"]
    return (batch["tokens"] if "tokens" in batch else batch["inputs"],)


def theirs(size: Size, batch: dict[str, np.ndarray]) -> dict[str, Run]:
    """Return the same in eager PyTorch."""
    from benchmarks.peers import families

    return families.build(size, batch, inputs(size, batch))


def main(side: str, name: str) -> None:
    size = SIZES[name]
    batch = arrays(size)
    runs = {"ours": ours, "torch": theirs, "torch-avx512": theirs}[side](size, batch)
    for run in runs.values():
        run()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        kind, count = line.split()
        start = time.perf_counter()
        for _ in range(int(count)):
            runs[kind]()
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"seconds": seconds, "peak_mib": peak}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
