"""Token files: flat arrays of uint8, uint16 or uint32 on disk, read through a memory map."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodels.config import DataConfig
from jaxmodels.data import corpus as corpora
from jaxmodels.data.source import Split, Windows, check_tokens
from jaxmodels.data.tokenizer import FILE, Tokenizer, load_tokenizer
from jaxmodels.errors import UserError

_DTYPES = ("uint8", "uint16", "uint32")


def open_tokens(cfg: DataConfig, split: Split, vocab_size: int | None) -> Windows:
    """The windows of token files.

    Files named val* or eval* are the evaluation split; without one, each file's last `eval_fraction` is. `FILE.json`
    beside a file holds its dtype, vocab_size and tokenizer; without it the file is of uint16, as nanoGPT's.
    """
    files = corpora.expand(cfg.path, "tokens")
    if sidecars := [f for f in files if f.suffix == ".json"]:
        files = [f for f in files if f not in sidecars]
    held_out = [f for f in files if f.name.startswith(("val", "eval"))]
    by_file = 0 < len(held_out) < len(files)
    if by_file:
        files = held_out if split == "eval" else [f for f in files if f not in held_out]
    facts = [_facts(f) for f in files]
    arrays = [_map(f, fact["dtype"]) for f, fact in zip(files, facts, strict=True)]
    if not by_file:
        arrays = [_part(a, split, cfg.eval_fraction) for a in arrays]
    label = f"tokens, {', '.join(f.name for f in files[:3])}{', ...' if len(files) > 3 else ''}"

    sizes = [fact["vocab_size"] for fact in facts]
    known = max(sizes) if sizes and None not in sizes else None
    tokenizer = _tokenizer(files[0], facts[0], cfg)
    if known is not None:
        corpora.check_vocab(known, vocab_size)
    elif vocab_size is not None:
        check_tokens(arrays, vocab_size, label)
    return Windows(
        arrays,
        cfg.seq_len,
        split=split,
        label=label,
        tokenizer=tokenizer,
        vocab_size=known,
        check=vocab_size if known is None else None,
    )


def _facts(file: Path) -> dict[str, Any]:
    beside = _sidecar(file)
    facts = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    dtype = facts.get("dtype", "uint16")
    if dtype not in _DTYPES:
        raise UserError(f"got dtype {dtype!r} in {beside}, expected one of {', '.join(_DTYPES)}, try uint16")
    return {"dtype": dtype, "vocab_size": facts.get("vocab_size"), "tokenizer": facts.get("tokenizer")}


def _sidecar(file: Path) -> Path:
    return file.with_name(file.name + ".json")


def _map(file: Path, dtype: str) -> np.ndarray:
    size, item = file.stat().st_size, np.dtype(dtype).itemsize
    if size == 0 or size % item:
        raise UserError(
            f"got {file} of {size} bytes, expected a multiple of {item} ({dtype}), "
            f'try naming its dtype in {_sidecar(file).name}: {{"dtype": "uint32"}}'
        )
    # A plain view: indexing np.memmap itself is several times slower.
    return np.asarray(np.memmap(file, dtype, mode="r"))


def _part(array: np.ndarray, split: Split, eval_fraction: float) -> np.ndarray:
    corpora.check_fraction(eval_fraction)
    cut = int(len(array) * (1 - eval_fraction))
    return array[:cut] if split == "train" else array[cut:]


def _tokenizer(file: Path, facts: dict[str, Any], cfg: DataConfig) -> Tokenizer | None:
    if facts["tokenizer"]:
        return load_tokenizer(file.parent / facts["tokenizer"])
    # The field's default says nothing about a file that was tokenised elsewhere.
    return load_tokenizer(Path(cfg.tokenizer).expanduser()) if cfg.tokenizer not in ("bytes", "chars") else None


def write(file: Path, chunks: Iterable[np.ndarray], tokenizer: Tokenizer, source: str) -> int:
    """Writes tokens and the description beside them; the file appears only when it is whole. The number of tokens."""
    part = file.with_name(file.name + ".part")
    count = 0
    with part.open("wb") as out:
        for chunk in chunks:
            chunk.tofile(out)
            count += len(chunk)
    facts = {
        "dtype": corpora.smallest_dtype(tokenizer.vocab_size).name,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": FILE,
        "tokens": count,
        "source": source,
    }
    _sidecar(file).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    os.replace(part, file)
    return count
