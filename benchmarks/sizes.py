"""A small fixed size of every family, for the benchmark `families`."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from jaxmodels.models.families import preset


class Size(NamedTuple):
    """The model and batch to run."""

    task: str
    model: str
    """A preset or a family."""
    fields: dict[str, Any]
    """Fields that are changed."""
    batch: int
    length: int = 8
    """Tokens per example."""

    @property
    def config(self) -> Any:
        """The model's config, without dropout: its random numbers are not what is compared."""
        config = preset(self.model)
        known = {f.name for f in dataclasses.fields(config)}
        return dataclasses.replace(config, **self.fields, **({"dropout": 0.0} if "dropout" in known else {}))


BODY = {"layers": 4, "width": 256, "heads": 4, "mlp_width": 1024}
WORDS = {**BODY, "vocab_size": 1024}
TOWERS = {f"{tower}_{name}": size for tower in ("image", "text") for name, size in {**BODY, "layers": 2}.items()}
CLIP = {"input_shape": (32, 32, 3), "patch": 4, "vocab_size": 1024, "context": 32, "embedding": 128, **TOWERS}
IMAGE = {"input_shape": (32, 32, 3), "classes": 10}
SIZES = {
    "gpt2": Size("causal_lm", "gpt2", {**WORDS, "context": 128}, 8, 128),
    "llama": Size("causal_lm", "llama", {**WORDS, "kv_heads": 2}, 8, 128),
    "mixtral": Size("causal_lm", "mixtral", {**WORDS, "kv_heads": 2, "mlp_width": 512, "experts": 4}, 8, 128),
    "bert": Size("masked_lm", "bert", {**WORDS, "context": 128}, 8, 128),
    "transformer": Size("seq2seq", "transformer", {**WORDS, "layers": 2}, 8, 64),
    "t5": Size("seq2seq", "t5-small", {**WORDS, "layers": 2, "head_dim": 64}, 8, 64),
    "vit": Size("classification", "vit", {**BODY, **IMAGE, "patch": 4}, 16),
    "clip": Size("contrastive", "clip", CLIP, 16, 32),
    "resnet": Size("classification", "resnet-18", {"input_shape": (64, 64, 3), "classes": 10}, 8),
    "vgg": Size("classification", "vgg-11-bn", {**IMAGE, "hidden": (512,)}, 16),
    "cnn": Size("classification", "cnn-mnist", {}, 128),
    "mlp": Size("classification", "mlp-mnist", {}, 128),
    "lstm": Size("causal_lm", "lstm", {"vocab_size": 1024, "width": 256, "hidden": 256}, 16, 64),
    "vae": Size("vae", "vae-mnist", {}, 128),
    "gan": Size("gan", "dcgan-mnist", {}, 64),
}
"""The size of each family; T5 is separate from the original Transformer."""
