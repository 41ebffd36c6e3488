"""An experiment as data: its sections, and how they are loaded, overridden, explained and saved.

A config file defines `get_config() -> Config`; every field can be overridden as `--section.field value`, and a section
that comes in several kinds by `--section kind`.
"""

from __future__ import annotations

from jaxmodels.config.explain import differences, docs, documentation, flatten, provenance
from jaxmodels.config.files import from_json, load, read, save, to_json
from jaxmodels.config.kinds import kind_name, kinds_of, of_kind, replaced, with_kinds
from jaxmodels.config.sections import AnyModel, Augment, Config, DataConfig, TaskConfig
from jaxmodels.parallel.mesh import Mesh
from jaxmodels.train.optim import SGD, Adafactor, Adam, AdamW, Lion, Momentum, Muon, OptimConfig, RMSprop
from jaxmodels.train.schedules import WSD, Constant, Cosine, Linear, ScheduleConfig
from jaxmodels.train.sections import Checkpoint, Eval, Init, Metrics, Profile, Train

__all__ = [
    "SGD", "WSD", "Adafactor", "Adam", "AdamW", "AnyModel", "Augment", "Checkpoint", "Config", "Constant", "Cosine",
    "DataConfig", "Eval", "Init", "Linear", "Lion", "Mesh", "Metrics", "Momentum", "Muon", "OptimConfig", "Profile",
    "RMSprop", "ScheduleConfig", "TaskConfig", "Train", "differences", "docs", "documentation", "flatten", "from_json",
    "kind_name", "kinds_of", "load", "of_kind", "provenance", "read", "replaced", "save", "to_json", "with_kinds",
]  # fmt: skip
