"""Text corpora, split for training and evaluation, and their tokenization."""

from __future__ import annotations

import difflib
import glob
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from jaxmodels.data import tokenizer as tokenizers
from jaxmodels.data.files import BOM, not_text
from jaxmodels.data.records import check_fraction, hash_fraction
from jaxmodels.data.section import DataConfig, FilesConfig, TextsConfig
from jaxmodels.data.source import Split, Windows
from jaxmodels.data.tokenizer import Tokenizer
from jaxmodels.errors import UserError
from jaxmodels.fields import Dropped

# Tests, installed packages, generated tables (encodings, pydoc_data: a quarter of the text), and packages whose data
# files only look like Python.
_NOT_STDLIB = {
    "site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "encodings", "pydoc_data",
    "__pycache__",
}  # fmt: skip
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Corpus:
    """Documents of each split, read on demand."""

    label: str
    documents: Callable[[Split], Iterable[str]]
    whole: bool = False
    """Whether the documents are parts of one text, to be joined without a separator."""

    def all_documents(self) -> Iterable[str]:
        """Return the documents of both splits, and the line end that separates them and begins a sample."""
        return chain(self.documents("train"), self.documents("eval"), ("\n",))


@dataclass(frozen=True)
class Stdlib(TextsConfig):
    """The source code of Python's standard library, split by file."""

    eval_fraction: Dropped = 0.1
    """Fraction held out for evaluation, by a hash of the file, so that the split is stable."""
    prompt = "def "

    def corpus(self) -> Corpus:
        return stdlib(self)


@dataclass(frozen=True)
class Text(TextsConfig, FilesConfig):
    """Text files. Several are split by file, a single one by its last part, unless `eval_path` names others."""

    def corpus(self) -> Corpus:
        return text(self)


def stdlib(cfg: Stdlib) -> Corpus:
    """Open the source code of Python's standard library, split by file."""
    root = Path(sysconfig.get_path("stdlib"))
    files: list[Path] = []
    for directory, inner, names in os.walk(root):
        inner[:] = sorted(set(inner) - _NOT_STDLIB)
        files += [Path(directory, name) for name in sorted(names) if name.endswith(".py")]
    if not files:
        raise UserError(f"got no .py files in {root}, expected Python's standard library there, try --data text")
    parts = split_files(files, root, cfg.eval_fraction)
    return Corpus(f"stdlib, {len(files)} files of {root}", lambda split: read(parts[split], strict=False))


def text(cfg: Text) -> Corpus:
    """Open text files. Several are split by file, a single one by its last part, unless `data.eval_path` names
    others."""
    files = expand(cfg.path, "text")
    if cfg.eval_path:
        parts: dict[Split, list[Path]] = {"train": files, "eval": expand(cfg.eval_path, "text", "data.eval_path")}
        each = [str(some[0]) if len(some) == 1 else f"{len(some)} files" for some in parts.values()]
        apart = cfg.eval_path != cfg.path  # a saved run may be evaluated on all of a text
        label = f"text, {each[0]} to train and {each[1]} to evaluate on" if apart else f"text, {each[1]}"
        return Corpus(label, lambda split: read(parts[split], strict=True), all(len(p) == 1 for p in parts.values()))
    if len(files) == 1:
        return Corpus(str(files[0]), lambda split: [_part(files[0], split, cfg.eval_fraction)], whole=True)
    parts = split_files(files, Path(os.path.commonpath([f.parent for f in files])), cfg.eval_fraction)
    return Corpus(f"text, {len(files)} files", lambda split: read(parts[split], strict=True))


_ENDINGS = {
    "table": ("csv", "jsonl", "tsv", "json", "parquet"),
    "tokens": ("bin", "npy"),
    "coco": ("json",),
    "texts": ("txt", "jsonl", "csv", "tsv", "json", "parquet"),
}
"""Extensions that a folder is searched for, to suggest a glob instead."""


def expand(patterns: Sequence[str], source: str, option: str = "data.path") -> list[Path]:
    """Return the files that paths and globs name, sorted and unique.

    `option` is the option that named them, or "" if they are a command's arguments.
    """
    flag, named = (f"--{option.replace('_', '-')} ", f"{option} ") if option else ("", "")
    if not patterns:
        got = f"data {source} without {option}" if option else "no files"
        raise UserError(f"got {got}, expected files or globs, try {flag}'data/*'")
    found: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_file():
            found[path.resolve()] = None
        elif path.is_dir():
            endings = _ENDINGS.get(source, ("txt",))
            held = next((end for end in endings if next(path.rglob(f"*.{end}"), None)), None)
            if held is None and source != "text":
                kinds = ", ".join(f".{end}" for end in endings)
                raise UserError(f"got the directory {pattern}, which holds no {kinds}, expected files, try {flag}FILE")
            raise UserError(
                f"got the directory {pattern}, expected files, try {flag}'{path}/**/*{(held and '.' + held) or ''}'"
            )
        elif path.exists():
            raise UserError(f"got {named}{pattern!r}, which is a pipe or a device, expected a file, try a copy")
        elif glob.has_magic(pattern):
            files = [p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file()]
            if not files:
                raise UserError(
                    f"got {named}{pattern!r}, which matches no file, expected one that does, try ls {pattern}"
                )
            found |= {p.resolve(): None for p in files}
        else:
            names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
            near = difflib.get_close_matches(path.name, names, 1)
            hint = str(path.parent / near[0]) if near else "a path that ls shows"
            raise UserError(f"got {named}{pattern!r}, which does not exist, expected a file or a glob, try {hint}")
    return sorted(found)


def split_files(files: Sequence[Path], root: Path, eval_fraction: float) -> dict[Split, list[Path]]:
    """Assign each file to a split by a hash of its path below `root`; neither split is left empty."""
    check_fraction(eval_fraction)
    places = {file: hash_fraction(file.relative_to(root).as_posix().encode()) for file in files}
    ranked = sorted(files, key=places.__getitem__)
    count = sum(p < eval_fraction for p in places.values())
    if eval_fraction > 0:
        count = min(max(count, 1), len(files) - 1)
    held_out = set(ranked[:count])
    return {"train": [f for f in files if f not in held_out], "eval": [f for f in files if f in held_out]}


def read(files: Iterable[Path], strict: bool) -> Iterator[str]:
    """Read each file's text, without a byte order mark; a file that is not UTF-8 is an error (strict) or left out."""
    for file in files:
        raw = file.read_bytes()
        if strict and (foreign := not_text(raw[:4096])):
            raise UserError(f"got {file}, which is {foreign}")
        try:
            yield raw.removeprefix(BOM).decode("utf-8")
        except UnicodeDecodeError as error:
            if strict:
                raise UserError(
                    f"got {file}, whose byte {error.start} is not UTF-8, expected UTF-8, try iconv -t utf-8"
                ) from error


def _part(file: Path, split: Split, eval_fraction: float) -> str:
    check_fraction(eval_fraction)
    whole = next(read([file], strict=True))
    cut = int(len(whole) * (1 - eval_fraction))
    return whole[:cut] if split == "train" else whole[cut:]


def windows(corpus: Corpus, cfg: DataConfig, split: Split, vocab_size: int | None) -> Windows:
    """Open the windows of a corpus, whose texts are joined."""
    tokenizer = build_tokenizer(corpus, cfg, vocab_size)
    encoded = [*encode(corpus, split, tokenizer), np.array([], smallest_dtype(tokenizer.vocab_size))]
    return Windows(
        [np.concatenate(encoded)],
        cfg.seq_len,
        split=split,
        label=corpus.label,
        tokenizer=tokenizer,
        vocab_size=tokenizer.vocab_size,
    )


def build_tokenizer(corpus: Corpus, cfg: DataConfig, vocab_size: int | None) -> Tokenizer:
    """Build the tokenizer that the config names.

    Raises:
        UserError: it has more tokens than the model's `vocab_size`.
    """
    tokenizer = tokenizers.build(cfg.tokenizer, corpus.all_documents, lambda: corpus.documents("train"))
    check_vocab(tokenizer.vocab_size, vocab_size)
    return tokenizer


def check_vocab(size: int, vocab_size: int | None) -> None:
    """Raise UserError if a model of `vocab_size` has no room for a tokenizer of `size`."""
    if vocab_size is not None and vocab_size < size:
        raise UserError(
            f"got model.vocab_size {vocab_size}, expected at least the tokenizer's {size}, "
            f"try --model.vocab-size {size}"
        )


def encode(corpus: Corpus, split: Split, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Yield the tokens of a split, some documents at a time, in the smallest dtype that holds the vocabulary.

    A document ends with the tokenizer's end token or, if it has none, with an additional line end. It begins with the
    tokens that the tokenizer puts before a text, unless that is the end token, which the document before ends with.
    """
    dtype = smallest_dtype(tokenizer.vocab_size)
    end = np.array([], np.int32)
    first = np.array([] if corpus.whole or tokenizer.before == (tokenizer.end,) else tokenizer.before, np.int32)
    if not corpus.whole:
        end = tokenizer.encode("\n") if tokenizer.end is None else np.array([tokenizer.end], np.int32)
    for chunk in _chunks(corpus.documents(split)):
        parts = chain.from_iterable((first, ids, end) for ids in tokenizer.encode_many(chunk))
        yield np.concatenate([part.astype(dtype) for part in parts])


def smallest_dtype(vocab_size: int) -> np.dtype:
    """Return the smallest of uint8, uint16 and uint32 that holds the ids of a vocabulary."""
    return np.min_scalar_type(max(vocab_size - 1, 0))


def _chunks(documents: Iterable[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += len(document)
        if size >= _CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
