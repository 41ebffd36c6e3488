"""`jaxmodels train CONFIG.py`: train a model, or continue a run that was stopped."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jaxmodels import commands
from jaxmodels.commands.options import Configured
from jaxmodels.errors import ExitCode, printable
from jaxmodels.fields import Section


@dataclass(frozen=True)
class RunOptions(Section):
    """The run directory, and the fields of the experiment."""

    run_dir: str | None = None
    """Run directory. Default: runs/<name of the config file>."""
    resume: Literal["auto", "must", "never"] = "auto"
    """auto: continue from the newest checkpoint of the same config. must: also with a changed config, but never from
    nothing. never: start anew, moving an earlier run aside."""


def train(given: Configured, options: RunOptions) -> int:
    """Train; return the exit code."""
    from jaxmodels.parallel import distributed, progress
    from jaxmodels.train.phases import Phases

    with Phases(commands.began, progress.phase).watched() as phases:
        distributed.initialize()
        from jaxmodels.train import run as runs

        runs.compilation_cache()
        run = Path(options.run_dir or f"runs/{Path(given.file).stem}")
        origin = {"file": given.file, "overrides": given.overrides}
        job, result = runs.train(given.config, run, options.resume, origin, phases=phases)
        if distributed.is_main():
            if result.ended == "preempted":
                saved = f"stopped and saved at step {result.step} in {run}"
                print(printable(f"{saved}; the same command continues from there"))
            else:
                farewell(job, result, run, [given.file, *given.overrides])
    return ExitCode.SAVED if result.ended == "preempted" else ExitCode.DONE


def farewell(job: Any, result: Any, run: Path, argv: Sequence[str]) -> None:
    """Print the results, where they are, and what to do next."""
    import jax

    from jaxmodels import data
    from jaxmodels.generate.texts import continued, opening
    from jaxmodels.report import curves
    from jaxmodels.train.directory import LOCK
    from jaxmodels.train.metrics import main_metrics
    from jaxmodels.train.tune import train_command

    train_data, eval_data = job.sources["train"], job.sources["eval"]
    tokenizer = train_data.tokenizer
    found = result.metrics or curves.last(run)
    print(
        f"\n{'stopped early' if result.ended == 'early' else 'done'} at step {result.step}: "
        + ", ".join(f"{name} {value:.4f}" for name, value in main_metrics(found).items())
    )
    baseline = {}
    if isinstance(train_data, data.Windows) and isinstance(eval_data, data.Windows):
        baseline["unigram model"] = data.unigram_loss(train_data, eval_data)
        print(f"a unigram model of the same text has a loss of {baseline['unigram model']:.4f} nats per token")
    curves.draw(run, run / "curves.png", baseline)
    name = f"./{run}" if str(run).startswith("-") else str(run)
    more = ["jaxmodels", "eval", name]
    if job.config.task.answers == "continuation" and tokenizer is not None and jax.process_count() == 1:
        params, model = result.state.averaged["model"], job.task.networks["model"]
        prompt = opening(tokenizer, job.config.data.prompt)
        taken = len(tokenizer.before) + len(tokenizer.encode(prompt))
        room = 400 if model.longest is None else min(400, model.longest - taken)
        if room > 0:
            text = continued(model, params, tokenizer, prompt, room, temperature=0.6, seed=1)
            print("\na sample:\n" + "\n".join("  | " + printable(line) for line in text.splitlines()))
            more = ["jaxmodels", "sample", name, "--temperature", "0.5"]
    chosen = {"run_dir": f"{name}-2", "optim.peak_lr": f"{job.config.optim.peak_lr / 2:g}"}
    commands = [
        shlex.join(more),
        shlex.join(["jaxmodels", "report", name]),
        train_command(argv[0], argv, chosen),
        shlex.join(["jaxmodels", "config", "explain", name, "optim.peak_lr"]),
    ]
    files = ", ".join(sorted(path.name for path in run.iterdir() if path.name != LOCK))
    print(printable("\n".join([f"\neverything is in {run}/: {files}", "try next:", *(f"  {c}" for c in commands)])))
