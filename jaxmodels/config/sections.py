"""The sections of an experiment, as frozen dataclasses."""

from __future__ import annotations

from dataclasses import dataclass

from jaxmodels.compress.adapters import AdapterConfig
from jaxmodels.compress.coding import CompressConfig
from jaxmodels.compress.distillation import Distill
from jaxmodels.data.corpus import Stdlib
from jaxmodels.data.section import Augment, DataConfig
from jaxmodels.fields import Section
from jaxmodels.models.config import ModelConfig
from jaxmodels.parallel.mesh import Mesh
from jaxmodels.tasks.causal_lm import CausalLM
from jaxmodels.tasks.task import TaskConfig
from jaxmodels.train.optim import AdamW, OptimConfig
from jaxmodels.train.sections import Checkpoint, Eval, Init, Metrics, Profile, Train


@dataclass(frozen=True)
class AnyModel(ModelConfig):
    """The model's fields, which depend on its family: name a config file first."""


@dataclass(frozen=True)
class Config(Section):
    """An experiment."""

    model: ModelConfig
    """The model: a family's config, such as GPT2Config(layers=6)."""
    task: TaskConfig = CausalLM()
    """What the model is trained to do."""
    data: DataConfig = Stdlib()
    """Where batches come from."""
    augment: Augment = Augment()
    """Random changes of training images."""
    optim: OptimConfig = AdamW()
    """How the loss is minimized."""
    train: Train = Train()
    """Length, precision and strategy of training."""
    eval: Eval = Eval()
    """Evaluation during training."""
    checkpoint: Checkpoint = Checkpoint()
    """Which checkpoints are saved and kept."""
    mesh: Mesh = Mesh()
    """How devices are divided among the kinds of parallelism."""
    metrics: Metrics = Metrics()
    """Where and how often metrics are reported."""
    profile: Profile = Profile()
    """A profile of chosen steps, for TensorBoard or Perfetto."""
    init: Init = Init()
    """Where the parameters come from."""
    adapter: AdapterConfig | None = None
    """What is trained beside frozen parameters. None: all parameters are trained."""
    compress: CompressConfig | None = None
    """How parameters are held, if not as float32: as codes of few bits. With an adapter, its frozen ones."""
    distill: Distill = Distill()
    """A teacher whose outputs the model learns."""
