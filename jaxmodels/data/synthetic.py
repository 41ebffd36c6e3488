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
        texts = {"causal_lm": cfg.seq_len + 1, "masked_lm": cfg.seq_len + 1, "seq2seq": 2 * cfg.seq_len + 1}
        if task in (*texts, "contrastive") and not vocab_size:
            raise UserError(
                "got data.source synthetic and no vocabulary, expected its size, try --model.vocab-size 256"
            )
        if task == "classification" and not ((inputs_shape or vocab_size) and num_classes):
            raise UserError(
                "got data.source synthetic for a model that states no shape of its inputs or no number of classes, "
                "expected both, try --data.source tfds"
            )
        if task in ("vae", "gan", "contrastive") and not inputs_shape:
            raise UserError(f"got a model for {task} that states no shape of its inputs, expected a model of images")
        self._task, self._length = task, cfg.seq_len
        self._shape = () if task in texts else tuple(inputs_shape or ())
        self._tokens = texts.get(task, cfg.seq_len if task == "contrastive" or not self._shape else 0)
        self.vocab_size = vocab_size if self._tokens else None
        self.num_classes = None if task in texts else num_classes
        self._n = _TRAIN_EXAMPLES if split == "train" else _EVAL_BATCHES * cfg.batch_size
        self._key = np.uint64(0 if split == "train" else 1 << 62)
        self._split = split
        self.fingerprint = fingerprint(
            [], "synthetic", split, self._shape + (self._tokens,) * bool(self._tokens), vocab_size, num_classes
        )

    def __len__(self) -> int:
        return self._n

    def batch(self, indices: np.ndarray, epochs: np.ndarray) -> dict[str, np.ndarray]:
        size = math.prod(self._shape) if self._shape else 0
        keys = mix(indices.astype(np.uint64) + self._key)
        noise = mix(keys[:, None] + np.arange(size + self._tokens, dtype=np.uint64))
        rows = (noise[:, size:] % np.uint64(self.vocab_size or 1)).astype(np.int32)
        if self._task == "seq2seq":
            sources, rows = np.split(rows, [self._length], axis=1)
            return {"inputs": sources.copy(), "tokens": rows[:, :-1].copy(), "targets": rows[:, 1:].copy()}
        if self._task in ("causal_lm", "masked_lm"):
            return {"tokens": rows[:, :-1].copy(), "targets": rows[:, 1:].copy()}
        labels = (keys % np.uint64(self.num_classes or 1)).astype(np.int32)
        if not self._shape:
            return {"inputs": rows, "labels": labels}
        values = (noise[:, :size] >> np.uint64(56)).astype(np.uint8).reshape(len(indices), *self._shape)
        inputs = values if len(self._shape) == 3 else values.astype(np.float32) / 255
        if self._task == "contrastive":
            return {"images": inputs, "tokens": rows, "labels": labels}
        return {"inputs": inputs, "labels": labels}

    def describe(self) -> str:
        tokens = f"{self._length} tokens" + (" to as many" if self._task == "seq2seq" else "")
        parts = ["x".join(map(str, self._shape))] * bool(self._shape) + [tokens] * bool(self._tokens)
        return f"synthetic: {self._n:,} random examples of {' with '.join(parts)} ({self._split})"
