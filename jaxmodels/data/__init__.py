"""Where batches come from: sources, tokenizers, the order, the loader."""

from __future__ import annotations

from jaxmodels.data.build import open_corpus, open_for, open_pairs, open_records, open_source
from jaxmodels.data.loader import Loader
from jaxmodels.data.order import Order
from jaxmodels.data.source import Source, Split, Windows, spec, unigram_loss
from jaxmodels.data.tokenizer import Tokenizer, load_tokenizer, train_bpe

__all__ = [
    "Loader", "Order", "Source", "Split", "Tokenizer", "Windows", "load_tokenizer", "open_corpus", "open_for",
    "open_pairs", "open_records", "open_source", "spec", "train_bpe", "unigram_loss",
]  # fmt: skip
