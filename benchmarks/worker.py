"""One contestant of the step benchmark in a process of its own: `python -m benchmarks.worker NAME CONFIG [overrides]`.

Prints a JSON line when its first step is done, then one for each number of steps read from standard input, and at the
end its peak memory. A process each keeps memory, compiled programs and thread pools apart.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxmodels.commands.options import NoOptions, configured
from jaxmodels.config import Config

Run = Callable[[int], Any]


def engine(cfg: Config, devices: Sequence[Any] | None = None) -> Run:
    """Run the project's loop with data, metrics and display, but without saving; by default on all devices."""
    import dataclasses

    from jaxmodels.train import beginning, loop
    from jaxmodels.train.display import Display
    from jaxmodels.train.job import assemble
    from jaxmodels.train.loggers import Report, TensorBoard
    from jaxmodels.train.metrics import Clock, Record

    job = assemble(cfg, devices)
    loader, folder = job.loader("train"), Path(tempfile.mkdtemp())
    schedule: Any = cfg.optim.rate(cfg.train.steps)

    class Watch(Display):
        def progress(self, step: int, loss: float, rate: float | None) -> None:
            steps.first = steps.first or time.time()  # type: ignore[attr-defined]

    report = Report(Record(folder, 0), Watch("none", 0, job.task.unit), {"tensorboard": TensorBoard()})
    report.start(folder, cfg, 0)
    hooks = loop.Hooks(
        step=job.step(),
        batches=loader.iterate,
        evaluate=lambda state: {},
        save=lambda *_: None,
        stop=lambda now: False,
        examples=loader.order.indices,
        last_good=lambda now: None,
        learning_rate=lambda now: float(schedule(now)),
        report=report,
        clock=Clock(job.units, job.task.unit, None, None),
        traces=folder,
    )
    held = [loop.Start(beginning.initial(job))]

    def steps(count: int) -> None:
        start = held.pop()
        here = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, steps=start.step + count))
        clock = Clock(job.units, job.task.unit, None, None)
        result = loop.run(here, start, dataclasses.replace(hooks, clock=clock))
        held.append(loop.Start(result.state, result.step))

    steps.first = None  # type: ignore[attr-defined]
    return steps


def bare(cfg: Config, devices: Sequence[Any] | None = None) -> Run:
    """Run the same model's step under a bare `jax.jit`, on one batch that is already on the device."""
    import jax

    from jaxmodels.train import step
    from jaxmodels.train.job import assemble

    job = assemble(cfg, devices)
    batch = job.loader("train").batch(0)
    take = jax.jit(
        lambda now, batch: step.advance(
            job.task, job.optimizers, now, batch, accumulate=cfg.train.accumulate, ema=cfg.train.ema
        ),
        donate_argnums=0,
    )
    held = [jax.jit(job.init)(jax.random.key(0))]

    def steps(count: int) -> None:
        metrics: Any = None
        for _ in range(count):
            held[0], metrics = take(held[0], batch)
        jax.block_until_ready(metrics)

    return steps


def peer(name: str) -> Callable[[Config], Run]:
    """Run a GPT of the config's shape in another framework."""

    def build(cfg: Config) -> Run:
        import importlib

        m = cfg.model
        step = importlib.import_module(f"benchmarks.peers.{name}").make(
            m.vocab_size, cfg.data.batch_size, cfg.data.seq_len, m.layers, m.heads, m.width
        )

        def steps(count: int) -> None:
            value = None
            for _ in range(count):
                value = step()
            float(value)  # type: ignore[arg-type]  # waits for the last one

        return steps

    return build


CONTESTANTS = {
    "engine": engine,
    "bare": bare,
    "linen": peer("linen"),
    "torch": peer("eager"),
    "torch-avx512": peer("eager"),
}


def main(name: str, argv: list[str]) -> None:
    born = float(os.environ.get("BENCHMARK_BORN", time.time()))
    cfg, _ = configured(argv, "python -m benchmarks step", NoOptions)
    run = CONTESTANTS[name](cfg)
    run(1)
    first = getattr(run, "first", None) or time.time()
    print(json.dumps({"first_step": first - born}), flush=True)
    for line in sys.stdin:
        before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        run(int(line))
        spent, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        print(json.dumps({"seconds": spent, "cpu": cpu, "peak_mib": after.ru_maxrss / 1024}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
