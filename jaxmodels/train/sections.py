"""The config sections that say how a run proceeds: length, evaluation, checkpoints, metrics, profile and start."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from jaxmodels.errors import UserError
from jaxmodels.fields import Count, Dim, Dropped, Named, Natural, Port, Range, Section, Seed
from jaxmodels.tasks.task import METRICS


@dataclass(frozen=True)
class Train(Section, section="train"):
    """Length, precision and strategy of training."""

    steps: Count = 1000
    """Optimizer steps."""
    seed: Seed = 0
    """Seed of the initial parameters, the order of the data and dropout."""
    accumulate: Annotated[int, Range(1, 2**16)] = 1
    """Microbatches per step. Gradients are summed over them, so the result is that of the whole batch."""
    strategy: Literal["jit", "pmap"] = "jit"
    """jit: sharded over the mesh. pmap: replicated data parallelism, with equal results."""
    ema: Dropped | None = None
    """Decay of the moving average of the parameters, which evaluation then uses. None: no average."""
    quantize: Literal["none", "int8", "float8"] = "none"
    """Type of the products with block weights, forward and backward. Parameters and optimizer state stay float32."""
    quantize_axes: tuple[Literal["embed", "heads", "kv_heads", "head_dim", "mlp"], ...] = (
        "embed", "heads", "kv_heads", "head_dim", "mlp",
    )  # fmt: skip
    """Which products to quantize: those of weights that have only these logical axes. embed mlp: the MLPs alone."""
    xla: tuple[str, ...] = ()
    """XLA options for the step, as NAME=VALUE: xla_tpu_scoped_vmem_limit_kib=65536. Plans use them too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in self.xla:
            if not re.fullmatch(r"xla_\w+=.+", option):
                raise UserError(
                    f"got train.xla {option!r}, expected NAME=VALUE, try xla_tpu_scoped_vmem_limit_kib=65536"
                )


@dataclass(frozen=True)
class Eval(Section, section="eval"):
    """Evaluation during training."""

    every: Natural = 0
    """Steps between evaluations. 0: only after the last step."""
    batches: Count | None = None
    """Batches in an evaluation. None: the whole set once."""
    batch_size: Dim | None = None
    """Examples per batch. None: as in training."""
    early_stop: Count | None = None
    """Stop after this many evaluations without a better `metric`. None: never."""
    metric: str = "eval/loss"
    """The metric that decides what is better, for early stopping and for the best checkpoint."""
    mode: Literal["min", "max"] | None = None
    """Whether a lower or a higher `metric` is better. None: lower, of a metric that says so, as every loss does."""
    metrics: tuple[Annotated[str, Named(METRICS)], ...] = ()
    """Metrics of your own besides the task's, as package.module:name: functions of the model's outputs and a batch that
    return a value for each example."""

    @property
    def lowest(self) -> bool:
        """Whether the lowest `metric` is the best."""
        return self.mode != "max"


@dataclass(frozen=True)
class Checkpoint(Section, section="checkpoint"):
    """Which checkpoints are saved and kept."""

    every: Natural = 500
    """Steps between checkpoints. The last step is always saved. 0: only the last step."""
    keep: Count = 2
    """How many of the newest checkpoints are kept, besides the best one."""
    best: bool = False
    """Keep the checkpoint that is best by `eval.metric`, saved after each evaluation that improves it."""


@dataclass(frozen=True)
class Metrics(Section, section="metrics"):
    """Where and how often metrics are reported."""

    every: Count = 10
    """Steps between lines in metrics.jsonl."""
    loggers: tuple[str, ...] = ("tensorboard",)
    """Where metrics go besides metrics.jsonl, which is always written: tensorboard, wandb, mlflow, or
    package.module:Class of your own `Logger`."""
    prometheus: Port | None = None
    """Port at which Prometheus can read the newest metrics, on all addresses of this machine. None: it cannot."""
    progress: Literal["auto", "live", "plain", "none"] = "auto"
    """live: a display that redraws itself. plain: a line each `every` steps. auto: live on a terminal, else plain."""


@dataclass(frozen=True)
class Profile(Section, section="profile"):
    """A profile of chosen steps, for TensorBoard or Perfetto."""

    steps: str = ""
    """FIRST:LAST (LAST excluded), as in 10:15. Empty: no profile."""


@dataclass(frozen=True)
class Init(Section, section="init"):
    """Where the parameters come from."""

    source: str | None = None
    """Directory of a run, or of a model in Hugging Face's format, to take parameters from. None: random."""
    fresh: tuple[str, ...] = ()
    """Patterns of parameters that start at random all the same, such as head/*. All others must be in the source."""
    blocks: tuple[Natural, ...] = ()
    """Which of the source's layers the model's are, counted from 0, such as 1 3 5 of six. Empty: all of them."""
