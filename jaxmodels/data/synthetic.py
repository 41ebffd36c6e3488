"""Random batches of the right shape, to measure what is not the data's doing."""

from __future__ import annotations

import math

import numpy as np

from jaxmodels.config import DataConfig
from jaxmodels.data.order import mix
from jaxmodels.data.source import Source, Split, fingerprint
from jaxmodels.errors import UserError

_TRAIN_EXAMPLES, _EVAL_BATCHES = 1 << 20, 4


class Synthetic(Source):
    """Examples that are a function of their index: tokens, images (three dimensions: uint8) or vectors (float32)."""

    def __init__(
        self,
        cfg: DataConfig,
        split: Split,
        task: str,
        *,
        vocab_size: int | None,
        inputs_shape: tuple[int, ...] | None,
        num_classes: int | None,
    ) -> None:
        if task == "causal_lm" and not vocab_size:
            raise UserError(
                "got data.source synthetic and no vocabulary, expected its size, try --model.vocab-size 256"
            )
        if task == "classification" and not (inputs_shape and num_classes):
            raise UserError(
                "got data.source synthetic for a model that states no shape of its inputs or no number of classes, "
                "expected both, try --data.source tfds"
            )
        self._lm = task == "causal_lm"
        self.vocab_size = vocab_size if self._lm else None
        self.num_classes = None if self._lm else num_classes
        self._shape = (cfg.seq_len + 1,) if self._lm else tuple(inputs_shape or ())
        self._n = _TRAIN_EXAMPLES if split == "train" else _EVAL_BATCHES * cfg.batch_size
        self._key = np.uint64(0 if split == "train" else 1 << 62)
        self._split = split
        self.fingerprint = fingerprint([], "synthetic", split, self._shape, vocab_size, num_classes)

    def __len__(self) -> int:
        return self._n

    def batch(self, indices: np.ndarray, epochs: np.ndarray) -> dict[str, np.ndarray]:
        size = math.prod(self._shape)
        keys = mix(indices.astype(np.uint64) + self._key)
        noise = mix(keys[:, None] + np.arange(size, dtype=np.uint64))
        if self._lm:
            rows = (noise % np.uint64(self.vocab_size or 1)).astype(np.int32)
            return {"tokens": rows[:, :-1].copy(), "targets": rows[:, 1:].copy()}
        noise = (noise >> np.uint64(56)).astype(np.uint8).reshape(len(indices), *self._shape)
        inputs = noise if len(self._shape) == 3 else noise.astype(np.float32) / 255
        return {"inputs": inputs, "labels": (keys % np.uint64(self.num_classes or 1)).astype(np.int32)}

    def describe(self) -> str:
        what = f"{self._shape[0] - 1} tokens" if self._lm else "x".join(map(str, self._shape))
        return f"synthetic: {self._n:,} random examples of {what} ({self._split})"
