"""Vocabularies trained on texts with the `tokenizers` library."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from jaxmodels.errors import UserError

END_OF_TEXT = "<|endoftext|>"
_MOST = 4_000_000


def bpe(texts: Iterable[str], vocab_size: int) -> Any:
    """Train a byte-level BPE with one special token, `<|endoftext|>`, which begins a whole text.

    Source: Sennrich et al. 2016; over bytes as in GPT-2 (Radford et al. 2019).
    """
    check_size(vocab_size)
    from tokenizers import Tokenizer as Rust
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise UserError(f"got vocab_size {vocab_size}, expected at least 257 (256 bytes and {END_OF_TEXT}), try 4096")
    rust = Rust(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    rust.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rust.train_from_iterator(texts, trainer)
    return _begun(rust)


def words(texts: Iterable[str], vocab_size: int) -> Any:
    """Collect the most frequent lower-case words and signs; all others are `[UNK]`. Texts begin as in `bpe`."""
    check_size(vocab_size)
    from tokenizers import Tokenizer as Rust
    from tokenizers import models, normalizers, pre_tokenizers, trainers

    rust = Rust(models.WordLevel(unk_token="[UNK]"))
    rust.normalizer = normalizers.Lowercase()  # type: ignore[assignment]
    rust.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    trainer = trainers.WordLevelTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT, "[UNK]"], show_progress=False
    )
    rust.train_from_iterator(texts, trainer)
    return _begun(rust)


def check_size(vocab_size: int) -> None:
    """Raise UserError if the library, which allocates room for all tokens at once, would kill the process."""
    if vocab_size > _MOST:
        raise UserError(f"got a vocabulary of {vocab_size:,} tokens, expected at most {_MOST:,}, try 32000")


def _begun(rust: Any) -> Any:
    """Make a whole text begin with the end token, whose features a classifier summarizes; it ends both of a pair."""
    from tokenizers import processors

    end = (END_OF_TEXT, rust.token_to_id(END_OF_TEXT))
    pair = f"{END_OF_TEXT} $A {END_OF_TEXT} $B:1 {END_OF_TEXT}:1"
    rust.post_processor = processors.TemplateProcessing(f"{END_OF_TEXT} $A", pair, special_tokens=[end])
    return rust
