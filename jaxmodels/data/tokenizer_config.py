"""What a tokenizer_config.json of transformers changes of the tokenizer.json beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxmodels.data.special import objects
from jaxmodels.errors import UserError

FILE = "tokenizer_config.json"
NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
"""The settings that name one special token each, in the order in which transformers adds them."""
_LETTERS = ("bert", "distilbert", "electra", "mpnet")
"""Classes that make the normalizer from their settings, whatever tokenizer.json says."""
_SPACED = ("gpt2", "roberta", "bart", "qwen2", "whisper")
"""Classes that put a space before a text, or none, by their settings."""
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")


def settings_of(directory: Path | None) -> dict[str, Any]:
    """Read the settings of a directory's tokenizer; none where there is no file.

    Raises:
        UserError: the file is damaged, or asks for special tokens to be read as ordinary text.
    """
    if directory is None or not (path := directory / FILE).is_file():
        return {}
    found = objects(path)
    if found.get("split_special_tokens"):
        raise UserError(
            f"got split_special_tokens {found['split_special_tokens']!r} in {path}, expected special tokens in a text "
            "to be read as such, try it without"
        )
    return found


def rewritten(serialized: str, settings: Mapping[str, Any], directory: Path | None) -> str:
    """Return a tokenizer.json whose letters and first space are as the class of the settings makes them.

    Without a class, the model's counts, as in transformers.
    """
    name = settings.get("tokenizer_class")
    if name is None and directory is not None and (config := directory / "config.json").is_file():
        name = objects(config).get("model_type")
    kind = str(name).lower().removesuffix("fast").removesuffix("tokenizer")
    value = json.loads(serialized)
    normalizer = value.get("normalizer")
    if kind in _LETTERS and isinstance(normalizer, dict) and normalizer.get("type") == "BertNormalizer":
        normalizer["lowercase"] = settings.get("do_lower_case", True)
        normalizer["strip_accents"] = settings.get("strip_accents")
        normalizer["handle_chinese_chars"] = settings.get("tokenize_chinese_chars", True)
    elif kind in _SPACED and isinstance(settings.get("add_prefix_space"), bool):
        whole = value.get("pre_tokenizer") or {}
        for part in (whole, *(whole.get("pretokenizers") or ())):
            if part.get("type") == "ByteLevel":
                part["add_prefix_space"] = settings["add_prefix_space"]
    else:
        return serialized
    return json.dumps(value)


def add_tokens(rust: Any, settings: Mapping[str, Any], where: Path | None) -> None:
    """Add the tokens that the settings name and tokenizer.json does not have as added ones, as transformers does.

    What a setting such as `pad_token` names is left out where it would become the last id: the model of such a file,
    which was saved without it, has no row for it.

    Raises:
        UserError: something else stands for a token.
    """
    from tokenizers import AddedToken

    def token(value: Any, special: bool | None = None) -> Any:
        content = value.get("content") if isinstance(value, dict) else value
        if not isinstance(content, str) or not content:
            raise UserError(f"got the token {str(value)[:60]!r} in {where}, expected its text, try another copy")
        flags = {name: value[name] for name in _FLAGS if isinstance(value, dict) and isinstance(value.get(name), bool)}
        return AddedToken(content, **{**flags, **({} if special is None else {"special": special})})

    def extras() -> Iterator[Any]:
        for name in ("additional_special_tokens", "extra_special_tokens"):
            several = settings.get(name) or ()
            yield from several.values() if isinstance(several, dict) else several

    had = {each.content: repr(each) for each in rust.get_added_tokens_decoder().values()}
    decoder = settings.get("added_tokens_decoder")
    numbered = {int(i): x for i, x in decoder.items()} if isinstance(decoder, dict) else {}
    every = (token(value) for _, value in sorted(numbered.items()))
    new = {each.content: each for each in every if had.get(each.content) != repr(each)}
    named = [token(settings[name], special=True) for name in NAMED if settings.get(name) is not None]
    for each in (*named, *(token(value, special=True) for value in extras())):
        if each.content not in had:
            new.setdefault(each.content, each)
    order, names = list(new), {each.content for each in named}
    while order and order[-1] in names and rust.token_to_id(order[-1]) is None:
        order.pop()
    if order:
        rust.add_tokens([new[content] for content in order])
