"""An experiment as data: frozen dataclasses, and how they are loaded, overridden, explained and saved.

A config file defines `get_config() -> Config`; every field can be overridden as `--section.field value`.
"""

from __future__ import annotations

from jaxmodels.config.explain import differences, docs, documentation, flatten, provenance
from jaxmodels.config.files import from_json, load, read, save, to_json
from jaxmodels.config.sections import (
    AugmentConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    InitConfig,
    MeshConfig,
    MetricsConfig,
    OptimConfig,
    ProfileConfig,
    TaskConfig,
    TrainConfig,
)

__all__ = [
    "AugmentConfig", "CheckpointConfig", "Config", "DataConfig", "EvalConfig", "InitConfig", "MeshConfig",
    "MetricsConfig", "OptimConfig", "ProfileConfig", "TaskConfig", "TrainConfig", "differences", "docs",
    "documentation", "flatten", "from_json", "load", "provenance", "read", "save", "to_json",
]  # fmt: skip
