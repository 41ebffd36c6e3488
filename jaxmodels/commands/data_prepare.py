"""`jaxmodels data prepare CONFIG.py`: texts tokenized once, into files."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jaxmodels.commands.options import Configured
from jaxmodels.config import DataConfig
from jaxmodels.data import special
from jaxmodels.errors import check_place
from jaxmodels.fields import Section
from jaxmodels.parts import MARK, filled


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
    from jaxmodels.data import corpus, examples, tokens
    from jaxmodels.data.source import Split

    check_place(out, "--out", folder=True)
    texts = examples.texts_of(data)
    tokenizer = corpus.build_tokenizer(texts, data, None)
    splits: tuple[tuple[Split, str], ...] = (("train", "train.bin"), ("eval", "val.bin"))
    counts = {}
    with together(out) as part:
        tokenizer.save(part)
        for split, name in splits:
            counts[name] = tokens.write(part / name, corpus.encode(texts, split, tokenizer), tokenizer, texts.label)
    for name, count in counts.items():
        print(f"{out / name}: {count:,} tokens, tokenizer {tokenizer}")
    print(f"Train on them with --data tokens --data.path {out / 'train.bin'} {out / 'val.bin'}")


@contextlib.contextmanager
def together(out: Path) -> Iterator[Path]:
    """A folder to write into, whose files come into `out` once all are there: no tokens beside another tokenizer."""
    new, part = not out.exists(), out / ".part"
    with filled(part, out):
        try:
            yield part
            if not (part / special.FILE).exists():
                (out / special.FILE).unlink(missing_ok=True)
            for file in sorted(part.iterdir(), key=lambda file: file.suffix == ".bin"):
                if file.name != MARK:
                    file.replace(out / file.name)
        finally:
            shutil.rmtree(part, ignore_errors=True)
            if new:
                with contextlib.suppress(OSError):  # not empty
                    out.rmdir()
