"""Where batches come from: sources, tokenizers, the order, the loader."""

from __future__ import annotations

import numpy as np

from jaxmodels.config import Config, DataConfig
from jaxmodels.data.loader import Loader
from jaxmodels.data.order import Order
from jaxmodels.data.source import Source, Split, Windows, spec, unigram_loss
from jaxmodels.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from jaxmodels.errors import UserError

__all__ = [
    "Loader", "Order", "Source", "Split", "Tokenizer", "Windows", "load_tokenizer", "open_for", "open_source", "spec",
    "train_bpe", "unigram_loss",
]  # fmt: skip


def open_source(
    cfg: DataConfig,
    split: Split,
    task: str,
    *,
    vocab_size: int | None = None,
    inputs_shape: tuple[int, ...] | None = None,
    num_classes: int | None = None,
) -> Source:
    """The examples of one split.

    `vocab_size`, `inputs_shape` and `num_classes` are the model's: the data is checked against them, and synthetic
    data is made from them.

    Raises: UserError.
    """
    from jaxmodels.data import corpus, synthetic, tfds, tokens

    if task in ("classification", "vae", "gan"):
        if cfg.source == "tfds":
            source = tfds.examples(cfg, split, vocab_size)
        elif cfg.source == "synthetic":
            return synthetic.Synthetic(
                cfg, split, task, vocab_size=vocab_size, inputs_shape=inputs_shape, num_classes=num_classes
            )
        else:
            raise UserError(
                f"got data.source {cfg.source} for {task}, expected tfds or synthetic, try --data.source tfds"
            )
        check_classes(source, num_classes)
        return source

    if task in ("seq2seq", "contrastive") and cfg.source != "synthetic":
        raise UserError(f"got data.source {cfg.source} for {task}, expected synthetic, try --data.source synthetic")
    if cfg.source == "synthetic":
        return synthetic.Synthetic(cfg, split, task, vocab_size=vocab_size, inputs_shape=inputs_shape, num_classes=None)
    if cfg.source == "tokens":
        return tokens.open_tokens(cfg, split, vocab_size)
    texts = {"stdlib": corpus.stdlib, "text": corpus.text, "tfds": tfds.corpus}[cfg.source](cfg)
    tokenizer = corpus.build_tokenizer(texts, cfg, vocab_size)
    encoded = [*corpus.encode(texts, split, tokenizer), np.array([], corpus.smallest_dtype(tokenizer.vocab_size))]
    return Windows(
        [np.concatenate(encoded)],
        cfg.seq_len,
        split=split,
        label=texts.label,
        tokenizer=tokenizer,
        vocab_size=tokenizer.vocab_size,
    )


def open_for(cfg: Config, split: Split) -> Source:
    """The source of a whole experiment, checked against its model."""
    return open_source(
        cfg.data,
        split,
        cfg.task.name,
        vocab_size=getattr(cfg.model, "vocab_size", None),
        inputs_shape=getattr(cfg.model, "input_shape", None),
        num_classes=getattr(cfg.model, "classes", None),
    )


def check_classes(source: Source, num_classes: int | None) -> None:
    """Raises UserError where the data has more classes than the model."""
    if num_classes is not None and source.num_classes is not None and source.num_classes > num_classes:
        raise UserError(
            f"got a model of {num_classes} classes, expected at least the data's {source.num_classes}, "
            f"try --model.classes {source.num_classes}"
        )
