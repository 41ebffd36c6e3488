"""`jaxmodels data train-tokenizer FILE...`: train a tokenizer on text files."""

from __future__ import annotations

from pathlib import Path

from jaxmodels.errors import check_place
from jaxmodels.fields import Dim


def train_tokenizer(paths: tuple[str, ...], /, vocab_size: Dim = 8192, out: Path = Path("tokenizer.json")) -> None:
    """Train a byte-level BPE on text files.

    Args:
        paths: files or globs.
        vocab_size: tokens to learn.
        out: where the tokenizer.json goes.
    """
    from jaxmodels.data import corpus
    from jaxmodels.data import tokenizer as tokenizers

    out.parent.mkdir(parents=True, exist_ok=True)
    check_place(out, "--out")
    files = corpus.expand(paths, "text", "")
    tokenizer = tokenizers.train_bpe(corpus.read(files, strict=True), vocab_size, out)
    sample = next(iter(corpus.read(files[:1], strict=True)))[:100_000]
    ratio = len(sample.encode()) / max(len(tokenizer.encode(sample)), 1)
    print(f"{out}: {tokenizer.vocab_size:,} tokens, {ratio:.2f} bytes per token at the beginning of {files[0].name}")
    print(f"Use it with --data.tokenizer {out} --model.vocab-size {tokenizer.vocab_size}")
