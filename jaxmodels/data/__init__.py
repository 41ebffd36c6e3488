"""Data: sources of examples, tokenizers, the order of examples, and the loader of batches."""

from __future__ import annotations

from jaxmodels.data.contract import BatchField
from jaxmodels.data.examples import open_pairs, open_records
from jaxmodels.data.loader import Loader
from jaxmodels.data.opening import Opening, open_for, open_source
from jaxmodels.data.order import Order
from jaxmodels.data.section import SOURCES, DataConfig, RecordsConfig
from jaxmodels.data.source import Source, Split, Windows, spec, unigram_loss
from jaxmodels.data.tokenizer import Tokenizer, load_tokenizer, train_bpe

__all__ = [
    "SOURCES", "BatchField", "DataConfig", "Loader", "Opening", "Order", "RecordsConfig", "Source", "Split",
    "Tokenizer", "Windows", "load_tokenizer", "open_for", "open_pairs", "open_records", "open_source", "spec",
    "train_bpe", "unigram_loss",
]  # fmt: skip
