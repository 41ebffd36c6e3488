"""What `jaxmodels data` does: inspect, prepare, train-tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from jaxmodels.config import Config, DataConfig
from jaxmodels.data import Loader, Order, corpus, open_for, tfds, tokens
from jaxmodels.data import tokenizer as tokenizers
from jaxmodels.data.source import Source, Split, Windows, unigram_loss
from jaxmodels.errors import UserError

_SHADES = " .:-=+*#%@"
_WIDTH = 32


def inspect(cfg: Config, n: int = 3) -> None:
    """Prints what a run would train and evaluate on, and the first n examples as the model will see them."""
    sources: dict[Split, Source] = {}
    for split in ("train", "eval"):
        source = sources[split] = open_for(cfg, split)
        size = cfg.data.batch_size if split == "train" else cfg.eval.batch_size or cfg.data.batch_size
        print(f"{split}: {source.describe()}")
        print(f"    {-(-len(source) // size):,} batches of {size}, fingerprint {source.fingerprint}")
    train, held_out = sources["train"], sources["eval"]
    if isinstance(train, Windows) and isinstance(held_out, Windows):
        loss = unigram_loss(train, held_out)
        print(f"A unigram model of the training tokens has a loss of {loss:.3f} nats a token on the held-out ones.")

    order = Order(len(train), cfg.data.batch_size, cfg.train.seed)
    loader = Loader(train, order)
    print("A batch: " + ", ".join(f"{name} {x.shape} {x.dtype}" for name, x in loader.spec.items()))
    for k in range(n):
        step, row = divmod(k, order.batch_size)
        example = {name: x[row] for name, x in loader.local(step).items()}
        print(f"\nBatch {step}, row {row}: example {order.indices(step)[row]} of epoch {order.epochs(step)[row]}")
        print(show(example, train))


def prepare(data: DataConfig, out: Path) -> None:
    """Tokenises the texts of a source once, into train.bin and val.bin for `--data.source tokens`."""
    sources = {"stdlib": corpus.stdlib, "text": corpus.text, "tfds": tfds.corpus}
    if data.source not in sources:
        raise UserError(f"got data.source {data.source}, expected a source of texts: {', '.join(sources)}, try text")
    texts = sources[data.source](data)
    tokenizer = corpus.build_tokenizer(texts, data, None)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(out)
    splits: tuple[tuple[Split, str], ...] = (("train", "train.bin"), ("eval", "val.bin"))
    for split, name in splits:
        count = tokens.write(out / name, corpus.encode(texts, split, tokenizer), tokenizer, texts.label)
        print(f"{out / name}: {count:,} tokens, tokenizer {tokenizer}")
    print(f"Train on them with --data.source tokens --data.path {out / 'train.bin'} {out / 'val.bin'}")


def train_tokenizer(paths: tuple[str, ...], vocab_size: int, out: Path) -> None:
    """Trains a byte-level BPE on files of text and writes it to `out` as a Hugging Face tokenizer.json."""
    files = corpus.expand(paths, "text")
    tokenizer = tokenizers.train_bpe(corpus.read(files, strict=True), vocab_size, out)
    sample = next(iter(corpus.read(files[:1], strict=True)))[:100_000]
    ratio = len(sample.encode()) / max(len(tokenizer.encode(sample)), 1)
    print(f"{out}: {tokenizer.vocab_size:,} tokens, {ratio:.2f} bytes a token at the beginning of {files[0].name}")
    print(f"Use it with --data.tokenizer {out} --model.vocab-size {tokenizer.vocab_size}")


def show(example: dict[str, np.ndarray], source: Source) -> str:
    """One example of a batch as text."""
    if "tokens" in example:
        ignored = int((example["targets"] < 0).sum())
        return _text(example["tokens"], source) + f"\n    {ignored} of {len(example['targets'])} targets ignored"
    label, names = int(example["labels"]), source.class_names
    named = f" ({names[label]})" if 0 <= label < len(names) and names[label] != str(label) else ""
    x = example["inputs"]
    body = _text(np.trim_zeros(x, "b"), source) if source.tokenizer else _image(x) if x.ndim == 3 else _numbers(x)
    return f"{body}\n    label {label}{named}"


def _text(ids: np.ndarray, source: Source) -> str:
    if source.tokenizer is None:
        return _numbers(ids)
    lines = source.tokenizer.decode(ids).split("\n")
    # A control character of the data must not reach the terminal.
    shown = ("".join(c if c.isprintable() or c == "\t" else repr(c)[1:-1] for c in line) for line in lines)
    return "\n".join(f"    | {line}" for line in shown)


def _numbers(x: np.ndarray) -> str:
    flat: list[Any] = x.reshape(-1)[:_WIDTH].tolist()
    return f"    {x.shape} {x.dtype}: {' '.join(f'{v:.4g}' for v in flat)}{' ...' if x.size > _WIDTH else ''}"


def _image(x: np.ndarray) -> str:
    gray = x.astype(np.float32).mean(-1)
    step = -(-max(gray.shape) // _WIDTH)
    gray = gray[::step, ::step] - gray.min()
    shade = (gray / max(float(gray.max()), 1e-9) * (len(_SHADES) - 1)).astype(int)
    rows = ("".join(_SHADES[v] * 2 for v in row) for row in shade)
    return f"    {x.shape} {x.dtype}, {x.min()} to {x.max()}\n" + "\n".join(f"    | {row}".rstrip() for row in rows)
