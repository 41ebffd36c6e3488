"""How a directory of sentence-transformers makes one vector of a text."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from jaxmodels.data import special
from jaxmodels.errors import UserError

MODULES = "modules.json"
FILES = (MODULES, "sentence_bert_config.json", "config_sentence_transformers.json", "*_Pooling/config.json")
Pool = Literal["mean", "cls", "max"]
_SWITCHES = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token", "max": "pooling_mode_max_tokens"}


@dataclass(frozen=True)
class Sentences:
    """What is done with a text, and with its tokens' features. The defaults are those for an encoder by itself."""

    pool: Pool = "mean"
    """The mean of all tokens, special ones included, the first token, or the largest value of each feature."""
    unit: bool = False
    """Whether vectors are scaled to length 1."""
    lower: bool = False
    """Whether texts are put into lower case before they are tokenized."""
    prefix: str = ""
    """What precedes each text."""
    length: int | None = None
    """The most tokens of a text, special ones included; None: what the model takes."""


def read(directory: Path) -> Sentences:
    """Read the files that sentence-transformers puts beside an encoder; the defaults where there are none.

    Raises:
        UserError: a file is damaged, or names a step that is not computed here.
    """
    path = directory / MODULES
    if not path.is_file():
        return Sentences()
    steps = [(kind, _folder(path, place)) for kind, place in _steps(path)]
    kinds = [kind for kind, _ in steps]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise UserError(
            f"got {path} with {', '.join(kinds)}, expected Transformer, Pooling and maybe Normalize, which alone are "
            "computed here, try a copy without it for the mean of all tokens"
        )
    how = _read(directory / steps[0][1] / "sentence_bert_config.json")
    prompts = _read(directory / "config_sentence_transformers.json")
    length, name = how.get("max_seq_length"), prompts.get("default_prompt_name")
    if length is not None and (type(length) is not int or length < 1):
        raise UserError(f"got max_seq_length {str(length)[:40]} in {directory}, expected a number above 0")
    prefix = "" if name is None else (prompts.get("prompts") or {}).get(name)
    if not isinstance(prefix, str):
        raise UserError(f"got default_prompt_name {str(name)[:40]!r} in {directory}, expected one of its prompts")
    config = _read(directory / steps[1][1] / "config.json")
    if prefix and config.get("include_prompt") is False:
        raise UserError(
            f"got {directory} with include_prompt false, expected true, since pooling takes all tokens here"
        )
    return Sentences(_pool(directory, config), "Normalize" in kinds, how.get("do_lower_case") is True, prefix, length)


def _steps(path: Path) -> list[tuple[str, Any]]:
    """The kind and the folder of each step."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return [(str(each["type"]).rpartition(".")[2], each["path"]) for each in found]
    except (OSError, ValueError, RecursionError, TypeError, KeyError) as error:
        raise UserError(f"got {path}, expected the modules of sentence-transformers, try another copy") from error


def _folder(path: Path, place: Any) -> str:
    if not isinstance(place, str) or place in (".", "..") or "/" in place or "\\" in place:
        raise UserError(f"got path {str(place)[:60]!r} in {path}, expected a folder beside it, try another copy")
    return place


def _read(path: Path) -> dict[str, Any]:
    return special.objects(path) if path.is_file() else {}


def _pool(directory: Path, config: dict[str, Any]) -> Pool:
    named = [name for name, value in config.items() if name.startswith("pooling_mode_") and value is True]
    found = next(
        (pool for pool in get_args(Pool) if named == [_SWITCHES[pool]] or config.get("pooling_mode") == pool), None
    )
    if found is None:
        pooling = ", ".join(named) or config.get("pooling_mode")
        raise UserError(
            f"got pooling {pooling} in {directory}, expected one of {', '.join(_SWITCHES)}, which are computed here"
        )
    return found
