"""`jaxmodels data prepare CONFIG.py`: texts tokenized once, into files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jaxmodels.commands.options import Configured
from jaxmodels.config import DataConfig
from jaxmodels.fields import Section


@dataclass(frozen=True)
class PrepareOptions(Section):
    """Where prepared tokens go, and the fields of the experiment."""

    out: Path = Path("tokens")
    """Folder for train.bin, val.bin and tokenizer.json."""


def prepare(given: Configured, options: PrepareOptions) -> None:
    """Tokenize the texts of a config's data once."""
    write(given.config.data, options.out)


def write(data: DataConfig, out: Path) -> None:
    """Tokenize the texts of a source once, into train.bin and val.bin for `--data tokens`."""
    from jaxmodels.data import corpus, tokens
    from jaxmodels.data.source import Split

    texts = data.corpus()
    tokenizer = corpus.build_tokenizer(texts, data, None)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(out)
    splits: tuple[tuple[Split, str], ...] = (("train", "train.bin"), ("eval", "val.bin"))
    for split, name in splits:
        count = tokens.write(out / name, corpus.encode(texts, split, tokenizer), tokenizer, texts.label)
        print(f"{out / name}: {count:,} tokens, tokenizer {tokenizer}")
    print(f"Train on them with --data tokens --data.path {out / 'train.bin'} {out / 'val.bin'}")
