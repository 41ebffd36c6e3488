"""Our own tokenizers as a tokenizer.json of Hugging Face's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxmodels.data.tokenizer import FILE, Bytes, Chars, Tokenizer


def save(tokenizer: Tokenizer, directory: Path) -> None:
    """Write tokenizer.json, and the tokenizer_config.json that makes AutoTokenizer take it as it is."""
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
        tokenizer.save(directory)
        if tokenizer.end is not None:
            settings["eos_token"] = Rust.from_str(tokenizer.to_json()).id_to_token(tokenizer.end)
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def byte_letters() -> list[str]:
    """The letter that byte-level BPE writes for each byte.

    Source: Radford et al. 2019, `bytes_to_unicode`: a printable byte stands for itself, the others follow 255.
    """
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in shown else next(others)) for byte in range(256)]
