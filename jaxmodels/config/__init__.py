"""An experiment as data: its sections, and how they are loaded, overridden, explained and saved.

A config file defines `get_config() -> Config`. Every field can be overridden by `--section.field value`, and a section
that comes in several kinds by `--section kind`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jaxmodels.compress.adapters import ADAPTERS, AdapterConfig, DoRA, LoRA
from jaxmodels.compress.coding import COMPRESSIONS, CompressConfig, Quantized
from jaxmodels.compress.distillation import Distill
from jaxmodels.config.explain import differences, docs, documentation, flatten, provenance
from jaxmodels.config.files import from_json, load, read, save, to_json
from jaxmodels.config.kinds import kind_name, kinds_of, meant_kind, of_kind, replaced, section_of, with_kinds
from jaxmodels.config.sections import AnyModel, Config
from jaxmodels.data.corpus import Stdlib, Text
from jaxmodels.data.section import SOURCES, Augment, DataConfig
from jaxmodels.parallel.mesh import Mesh
from jaxmodels.tasks.causal_lm import CausalLM
from jaxmodels.tasks.task import TASKS, TaskConfig
from jaxmodels.train.optim import SGD, Adafactor, Adam, AdamW, Lion, Momentum, Muon, OptimConfig, RMSprop
from jaxmodels.train.schedules import WSD, Constant, Cosine, Linear, ScheduleConfig
from jaxmodels.train.sections import Checkpoint, Eval, Init, Metrics, Profile, Train

if TYPE_CHECKING:
    from jaxmodels.compress.rounded import Rounded
    from jaxmodels.compress.sparse import Sparse
    from jaxmodels.data.coco import COCO
    from jaxmodels.data.folders import Images
    from jaxmodels.data.huggingface import HuggingFace
    from jaxmodels.data.interactions import Interactions
    from jaxmodels.data.squad import SQuAD
    from jaxmodels.data.synthetic import Synthetic
    from jaxmodels.data.tables import Table
    from jaxmodels.data.tfds import TFDS
    from jaxmodels.data.tokens import Tokens
    from jaxmodels.tasks.classification import Classification
    from jaxmodels.tasks.contrastive import Contrastive
    from jaxmodels.tasks.detection import Detection
    from jaxmodels.tasks.diffusion import Diffusion
    from jaxmodels.tasks.extraction import Extraction
    from jaxmodels.tasks.gan import GAN
    from jaxmodels.tasks.masked_lm import MaskedLM
    from jaxmodels.tasks.multimodal_lm import MultimodalLM
    from jaxmodels.tasks.next_item import NextItem
    from jaxmodels.tasks.question_answering import QuestionAnswering
    from jaxmodels.tasks.segmentation import Segmentation
    from jaxmodels.tasks.seq2seq import Seq2Seq
    from jaxmodels.tasks.set_detection import SetDetection
    from jaxmodels.tasks.transcription import Transcription
    from jaxmodels.tasks.vae import VAE
    from jaxmodels.tasks.verification import Verification
    from jaxmodels.tasks.waveform import Waveform

__all__ = [
    "COCO",
    "GAN",
    "SGD",
    "TFDS",
    "VAE",
    "WSD",
    "Adafactor",
    "Adam",
    "AdamW",
    "AdapterConfig",
    "AnyModel",
    "Augment",
    "CausalLM",
    "Checkpoint",
    "Classification",
    "CompressConfig",
    "Config",
    "Constant",
    "Contrastive",
    "Cosine",
    "DataConfig",
    "Detection",
    "Diffusion",
    "Distill",
    "DoRA",
    "Eval",
    "Extraction",
    "HuggingFace",
    "Images",
    "Init",
    "Interactions",
    "Linear",
    "Lion",
    "LoRA",
    "MaskedLM",
    "Mesh",
    "Metrics",
    "Momentum",
    "MultimodalLM",
    "Muon",
    "NextItem",
    "OptimConfig",
    "Profile",
    "Quantized",
    "QuestionAnswering",
    "RMSprop",
    "Rounded",
    "SQuAD",
    "ScheduleConfig",
    "Segmentation",
    "Seq2Seq",
    "SetDetection",
    "Sparse",
    "Stdlib",
    "Synthetic",
    "Table",
    "TaskConfig",
    "Text",
    "Tokens",
    "Train",
    "Transcription",
    "Verification",
    "Waveform",
    "differences",
    "docs",
    "documentation",
    "flatten",
    "from_json",
    "kind_name",
    "kinds_of",
    "load",
    "meant_kind",
    "of_kind",
    "provenance",
    "read",
    "replaced",
    "save",
    "section_of",
    "to_json",
    "with_kinds",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a kind of a section when it is asked for: a command needs those of its config, not all there are."""
    for kinds in (ADAPTERS, COMPRESSIONS, SOURCES, TASKS):
        for kind, address in kinds.builtin.items():
            if address.endswith(f":{name}"):
                return kinds.find(kind)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
