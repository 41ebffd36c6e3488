"""Write our own tokenizers as a tokenizer.json in Hugging Face's format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxmodels.data.special import objects, text_of
from jaxmodels.data.tokenizer import FILE, Bytes, Chars, HuggingFace, Tokenizer, load_tokenizer
from jaxmodels.errors import UserError

SPOKEN = "vocab.json"
"""The file with the characters of a model for CTC, which has no tokenizer.json."""


def load(directory: Path) -> Tokenizer | None:
    """Load the tokenizer of a directory of transformers: its tokenizer.json, or the characters of a model for CTC.

    Raises:
        UserError: a file is damaged.
    """
    if (directory / FILE).is_file():
        return load_tokenizer(directory)
    path, config = directory / SPOKEN, directory / "config.json"
    if not path.is_file() or not config.is_file() or objects(config).get("model_type") != "wav2vec2":
        return None
    from tokenizers import Tokenizer as Rust
    from tokenizers import decoders, models, normalizers

    vocabulary = objects(path)
    if not vocabulary or {*vocabulary.values()} != {*range(len(vocabulary))}:
        raise UserError(f"got {path}, expected the characters with their ids, from 0 on, try another copy")
    unknown, between = text_of(directory, "unk_token") or "<unk>", delimiter(directory)
    rust = Rust(models.BPE(vocab=vocabulary, merges=[], unk_token=unknown if unknown in vocabulary else None))
    rust.normalizer = normalizers.Replace(" ", between)  # type: ignore
    rust.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace(between, " ")])  # type: ignore
    return HuggingFace(rust.to_str())


def delimiter(directory: Path) -> str:
    """Return what stands between the words of a model for CTC."""
    return text_of(directory, "word_delimiter_token") or "|"


def save(tokenizer: Tokenizer, directory: Path, translates: bool = False) -> None:
    """Write tokenizer.json, and a tokenizer_config.json with which AutoTokenizer uses it unchanged.

    The tokenizer puts around a text the tokens that a run of this task was trained with.
    """
    from tokenizers import Tokenizer as Rust
    from tokenizers import decoders, models, pre_tokenizers

    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if isinstance(tokenizer, Bytes):
        rust = Rust(models.BPE(vocab={letter: byte for byte, letter in enumerate(byte_letters())}, merges=[]))
        rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # type: ignore
        rust.decoder = decoders.ByteLevel()  # type: ignore
        (directory / FILE).write_text(rust.to_str(), encoding="utf-8")
    elif isinstance(tokenizer, Chars):
        rust = Rust(models.BPE(vocab={letter: i for i, letter in enumerate(tokenizer.characters)}, merges=[]))
        rust.decoder = decoders.Fuse()  # type: ignore
        (directory / FILE).write_text(rust.to_str(), encoding="utf-8")
    else:
        if not isinstance(tokenizer, HuggingFace):
            raise UserError(f"got tokenizer {tokenizer}, expected one of Hugging Face's library, bytes or chars")
        whole = HuggingFace(tokenizer.to_json())
        end = None if tokenizer.end is None else Rust.from_str(tokenizer.to_json()).id_to_token(tokenizer.end)
        if translates and end is not None:
            whole.wrap("", end)  # as a source ends
        (directory / FILE).write_text(whole.to_json(), encoding="utf-8")
        if end is not None:
            settings |= {"eos_token": end, "pad_token": end}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def ids(tokenizer: Tokenizer, translates: bool) -> dict[str, Any]:
    """Return the ids in config.json with which transformers begins, ends and pads texts; None where there is none."""
    end, ends = tokenizer.special.end, list(tokenizer.special.ends)
    first, *forced = tokenizer.special.opening or (None,)
    return {
        "bos_token_id": tokenizer.before[-1] if tokenizer.before else end,
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": end,
        **({"decoder_start_token_id": first} if translates else {}),
        **({"forced_bos_token_id": forced[0]} if translates and forced else {}),
    }


def byte_letters() -> list[str]:
    """Return the letter that byte-level BPE writes for each byte.

    Source: Radford et al. 2019, `bytes_to_unicode`: a printable byte stands for itself, the others follow 255.
    """
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in shown else next(others)) for byte in range(256)]
