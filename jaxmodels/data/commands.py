"""What `jaxmodels data` does: inspect, prepare, train-tokenizer."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from jaxmodels.config import Config, DataConfig
from jaxmodels.data import Loader, Order, corpus, open_corpus, open_for, preview, tokens
from jaxmodels.data import tokenizer as tokenizers
from jaxmodels.data.source import Source, Split, Windows, unigram_loss


def inspect(cfg: Config, n: int = 3, out: Path = Path("inspect.png")) -> None:
    """Prints what a run would train and evaluate on, and the first n examples as the model will see them.

    Of images it draws some into `out`, each as several epochs change it.
    """
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
        print(preview.show(example, train))
    first = np.concatenate([order.indices(k) for k in range(-(-preview.IMAGES // order.batch_size))])
    if preview.grid(train, first[: preview.IMAGES], out):
        print(f"\n{out}: images to train on with their labels, each as several epochs show it")


def prepare(data: DataConfig, out: Path) -> None:
    """Tokenises the texts of a source once, into train.bin and val.bin for `--data.source tokens`."""
    texts = open_corpus(data)
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
