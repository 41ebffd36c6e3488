"""The sections of an experiment that say how a run goes: its length, evaluations, checkpoints and reports."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from jaxmodels.errors import UserError
from jaxmodels.fields import Count, Dim, Dropped, Named, Natural, Range, Section, Seed
from jaxmodels.tasks.task import METRICS


@dataclass(frozen=True)
class Train(Section, section="train"):
    """Length, precision and strategy of training."""

    steps: Count = 1000
    """Optimizer steps."""
    seed: Seed = 0
    """Decides initial parameters, data order and dropout."""
    accumulate: Annotated[int, Range(1, 2**16)] = 1
    """Microbatches a step; gradients are summed over them, so the result is that of the whole batch."""
    strategy: Literal["jit", "pmap"] = "jit"
    """jit: sharded by the mesh; pmap: replicated data parallelism, equal in result."""
    ema: Dropped | None = None
    """Decay of the moving average of the parameters, which evaluation then uses; None: none."""
    quantize: Literal["none", "int8", "float8"] = "none"
    """Type of the products with the weights of blocks, forward and backward; parameters and optimizer stay float32."""
    quantize_axes: tuple[Literal["embed", "heads", "kv_heads", "head_dim", "mlp"], ...] = (
        "embed", "heads", "kv_heads", "head_dim", "mlp",
    )  # fmt: skip
    """Which of them: weights that have none but these logical axes; embed mlp: the MLPs alone."""
    xla: tuple[str, ...] = ()
    """Options of XLA for the step, as NAME=VALUE: xla_tpu_scoped_vmem_limit_kib=65536; plans are made with them too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in self.xla:
            if not re.fullmatch(r"xla_\w+=.+", option):
                raise UserError(
                    f"got train.xla {option!r}, expected NAME=VALUE, try xla_tpu_scoped_vmem_limit_kib=65536"
                )


@dataclass(frozen=True)
class Eval(Section, section="eval"):
    """Evaluation while training."""

    every: Natural = 0
    """Steps between evaluations; 0: only after the last step."""
    batches: Count | None = None
    """Batches of an evaluation; None: the whole set once."""
    batch_size: Dim | None = None
    """Examples a batch; None: as in training."""
    early_stop: Count | None = None
    """Stop after so many evaluations without a better `metric`; None: never."""
    metric: str = "eval/loss"
    """What 'better' is judged by, for early stopping and for the best checkpoint."""
    mode: Literal["min", "max"] = "min"
    """Whether a lower or a higher `metric` is better."""
    metrics: tuple[Annotated[str, Named(METRICS)], ...] = ()
    """Metrics of your own beside the task's, package.module:name: functions of the model's outputs and a batch that
    give a value for each example."""


@dataclass(frozen=True)
class Checkpoint(Section, section="checkpoint"):
    """What is saved, and when."""

    every: Natural = 500
    """Steps between checkpoints; the last step is always saved; 0: only that one."""
    keep: Count = 2
    """Newest checkpoints kept, beside the best one."""
    best: bool = False
    """Keep the checkpoint that is best by `eval.metric` (saved after each evaluation that improves on it)."""


@dataclass(frozen=True)
class Metrics(Section, section="metrics"):
    """What is reported."""

    every: Count = 10
    """Steps between lines in metrics.jsonl."""
    loggers: tuple[str, ...] = ("tensorboard",)
    """Where metrics go beside metrics.jsonl, which is always written: tensorboard, or package.module:Class of your own
    `Logger`."""
    progress: Literal["auto", "live", "plain", "none"] = "auto"
    """live: a display that redraws; plain: a line each `every` steps; auto: live on a terminal."""


@dataclass(frozen=True)
class Profile(Section, section="profile"):
    """A trace of chosen steps, for TensorBoard or Perfetto."""

    steps: str = ""
    """FIRST:LAST (last one not included), as in 10:15; empty: no trace."""


@dataclass(frozen=True)
class Init(Section, section="init"):
    """Where the parameters start."""

    source: str | None = None
    """A run directory, or one in Hugging Face's format, whose parameters to start from; None: random."""
    fresh: tuple[str, ...] = ()
    """Patterns of parameters that start at random all the same, such as head/*: the rest must be in the source."""
