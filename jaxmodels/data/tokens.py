"""Token files: flat arrays of uint8, uint16 or uint32 on disk, or .npy files, read through a memory map."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodels.data import corpus as corpora
from jaxmodels.data.files import shown
from jaxmodels.data.records import check_unused_fraction
from jaxmodels.data.section import FilesConfig, default
from jaxmodels.data.source import Split, Windows, blocks, check_tokens
from jaxmodels.data.tokenizer import FILE, Tokenizer, load_tokenizer
from jaxmodels.errors import UserError

_DTYPES = ("uint8", "uint16", "uint32")
_FACTS = 'facts of tokens such as {"dtype": "uint16", "vocab_size": 50257}'
_SEEN = 1 << 20
_PACKED = (".gz", ".zst", ".xz", ".bz2", ".zip", ".npz")
_OTHERS = (b"PK\3\4", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ\0", b"\x80\4\x95", b"\x80\5\x95")
"""How zip (torch.save, np.savez), zstd, xz and pickle begin."""
_LLM_C = (20240520, 20240801)
"""The magic numbers at the start of llm.c's token files."""


@dataclass(frozen=True)
class Tokens(FilesConfig):
    """Files of tokens, read through a memory map."""

    tokenizer: str = "bytes"
    """Path of the Hugging Face tokenizer.json that made the tokens, if no description beside a file names it."""

    def windows(self, split: Split, vocab_size: int | None) -> Windows:
        return open_tokens(self, split, vocab_size)


def open_tokens(cfg: Tokens, split: Split, vocab_size: int | None) -> Windows:
    """Open the windows of token files.

    Evaluation reads `data.eval_path`, or else the files named val* or eval*, or else the last `eval_fraction` of each
    file. `FILE.json` beside a file gives its dtype, vocab_size and tokenizer; a `.npy` file knows its dtype. Files
    without either are uint16, as nanoGPT's, and are refused if they cannot be.
    """
    files = _listed(cfg.path)
    held_out = [f for f in files if f.name.startswith(("val", "eval"))]
    by_file = 0 < len(held_out) < len(files)
    if cfg.eval_path:
        files = files if split == "train" else _listed(cfg.eval_path, "data.eval_path")
    elif by_file:
        check_unused_fraction(cfg, f"evaluation has {held_out[0].name}")
        files = held_out if split == "eval" else [f for f in files if f not in held_out]
    facts = [_facts(f) for f in files]
    arrays = [_map(f, fact) for f, fact in zip(files, facts, strict=True)]
    if not by_file and not cfg.eval_path:
        arrays = [_part(a, split, cfg.eval_fraction) for a in arrays]
    label = f"tokens, {', '.join(f.name for f in files[:3])}{', ...' if len(files) > 3 else ''}"

    sizes = [fact["vocab_size"] for fact in facts]
    known = max(sizes) if sizes and None not in sizes else None
    tokenizer = _tokenizer(files[0], facts[0], cfg)
    if known is not None:
        corpora.check_vocab(known, vocab_size)
    limit = vocab_size if known is None else known
    if limit is not None:
        check_tokens(arrays, limit, label)
    return Windows(
        arrays, cfg.seq_len, split=split, label=label, tokenizer=tokenizer, vocab_size=known, check=limit
    )  # fmt: skip


def _listed(patterns: Sequence[str], option: str = "data.path") -> list[Path]:
    """List token files, leaving out the descriptions that a glob finds beside them."""
    return [f for f in corpora.expand(patterns, "tokens", option) if f.suffix != ".json"]


def _facts(file: Path) -> dict[str, Any]:
    """What the description beside a file says.

    Raises: UserError where it is the description of something else.
    """
    beside = _sidecar(file)
    usual: dict[str, Any] = {"dtype": None, "vocab_size": None, "tokenizer": None, "tokens": None}
    if not beside.is_file():
        return usual
    try:
        facts = json.loads(beside.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"got {beside}, which is no JSON ({error}), expected {_FACTS}") from None
    found = {**usual, **facts} if isinstance(facts, dict) else {}
    for name in ("vocab_size", "tokens"):
        if not found or not (found[name] is None or (type(found[name]) is int and found[name] > 0)):
            raise UserError(f"got {beside} with {shown(found.get(name, facts))}, expected {_FACTS}")
    if found["dtype"] not in (None, *_DTYPES):
        raise UserError(
            f"got dtype {shown(found['dtype'])} in {beside}, expected one of {', '.join(_DTYPES)}, try uint16"
        )
    if not isinstance(found["tokenizer"], str | None):
        raise UserError(f"got tokenizer {shown(found['tokenizer'])} in {beside}, expected the name of a file")
    return found


def _sidecar(file: Path) -> Path:
    return file.with_name(file.name + ".json")


def _map(file: Path, facts: dict[str, Any]) -> np.ndarray:
    dtype = facts["dtype"] or "uint16"
    size, item = file.stat().st_size, np.dtype(dtype).itemsize
    with file.open("rb") as opened:
        beginning = opened.read(_SEEN)
    if file.suffix in _PACKED:
        raise UserError(f"got {file}, which is packed, expected tokens as they are, try unpacking it")
    if beginning.startswith(b"\x93NUMPY"):
        array = _numpy(file)
    elif size == 0:
        raise UserError(f"got {file}, which is empty, expected tokens of {dtype}, try writing it anew")
    elif facts["dtype"] is None and (other := _no_uint16(beginning)):
        raise UserError(
            f"got {file}, which {other}, expected tokens of uint16 where nothing says what they are, "
            f'try naming the dtype in {_sidecar(file).name}: {{"dtype": "uint32"}}'
        )
    elif size % item:
        raise UserError(
            f"got {file} of {size} bytes, expected a multiple of {item} ({dtype}), "
            f'try naming its dtype in {_sidecar(file).name}: {{"dtype": "uint32"}}'
        )
    elif not beginning.strip(b"\0") and size > 2 * item:
        raise UserError(f"got {file}, which is zeros, expected tokens of {dtype}, try writing it anew")
    else:
        # A plain view: indexing np.memmap itself is several times slower.
        array = np.asarray(np.memmap(file, dtype, mode="r"))
    if facts["tokens"] not in (None, len(array)):
        raise UserError(
            f"got {file} of {len(array):,} tokens, expected the {facts['tokens']:,} that {_sidecar(file).name} says, "
            "try preparing it again"
        )
    return array


def _numpy(file: Path) -> np.ndarray:
    """The whole numbers of a .npy file, flat."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of what NumPy tries with a damaged header
            array = np.asarray(np.load(file, mmap_mode="r", allow_pickle=False))
    except Exception as error:  # NumPy reads the header as a piece of Python, which fails in many ways
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"got {file}, which NumPy cannot read ({reason}), expected an array of tokens") from None
    if array.dtype.kind not in "ui" or not array.flags.c_contiguous:
        raise UserError(
            f"got {file} of {array.dtype} {array.shape}, expected whole numbers in C's order, "
            "try saving it by np.save(file, tokens.astype(np.uint32))"
        )
    array = array.reshape(-1)
    lowest = min((int(block.min()) for block in blocks(array) if block.size), default=0)
    if lowest < 0:
        raise UserError(
            f"got token {lowest} in {file}, expected tokens from 0 on, try a file without those that stand for no token"
        )
    # in a large array not all of them are seen; as an unsigned number it is too large for any vocabulary
    return array.view(array.dtype.str.replace("i", "u"))


def _no_uint16(beginning: bytes) -> str:
    """What the beginning of a file says that it is, if not tokens of uint16."""
    if int.from_bytes(beginning[:4], "little") in _LLM_C:
        return "begins with the header of llm.c (try tail -c +1025)"
    if len(beginning) >= 64 and beginning.isascii() and all(b >= 32 or b in b"\t\n\r" for b in beginning):
        return "is text (try --data text or table)"
    if beginning.startswith(_OTHERS):
        return "is an archive or a pickle (try np.save of its tokens)"
    even, odd = np.frombuffer(beginning[: len(beginning) // 4 * 4], "<u2").reshape(-1, 2).T
    # no text has tokens of two kinds in turn: these are the upper halves of larger numbers
    if len(odd) and int(odd.max()) < min(16, int(even.max())):
        return "looks like uint32 (every second number would be 0, or nearly)"
    return ""


def _part(array: np.ndarray, split: Split, eval_fraction: float) -> np.ndarray:
    corpora.check_fraction(eval_fraction)
    cut = int(len(array) * (1 - eval_fraction))
    return array[:cut] if split == "train" else array[cut:]


def _tokenizer(file: Path, facts: dict[str, Any], cfg: Tokens) -> Tokenizer | None:
    if facts["tokenizer"]:
        tokenizer = load_tokenizer(file.parent / facts["tokenizer"])
        if facts["vocab_size"] is not None and tokenizer.vocab_size > facts["vocab_size"]:
            raise UserError(
                f"got vocab_size {facts['vocab_size']:,} in {_sidecar(file)} and a tokenizer of "
                f"{tokenizer.vocab_size:,}, expected room for all of its tokens, try preparing the file again"
            )
        if cfg.tokenizer != default(cfg, "tokenizer"):
            raise UserError(
                f"got data.tokenizer {cfg.tokenizer!r} for {file}, which was made with {facts['tokenizer']} beside it, "
                "expected that one, try without --data.tokenizer"
            )
        return tokenizer
    # The field's default says nothing about a file that was tokenized elsewhere.
    return load_tokenizer(Path(cfg.tokenizer).expanduser()) if cfg.tokenizer not in ("bytes", "chars") else None


def write(file: Path, chunks: Iterable[np.ndarray], tokenizer: Tokenizer, source: str) -> int:
    """Write tokens and their description; the file appears only when it is complete. Return the number of tokens."""
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
