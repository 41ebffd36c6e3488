"""Special tokens: the ids that begin and end what a model reads and writes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxmodels.errors import UserError

FILE = "special_tokens.json"
"""The file beside a run's tokenizer.json."""
NAMES = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
"""Their names in config.json and generation_config.json of transformers."""
FORCED = ("forced_bos_token_id", "forced_eos_token_id")
"""Those of the tokens that transformers' `generate` puts first, and last in a target that would be too long."""

# what transformers assumes if the config.json of this model_type names none
_LLAMA = {"bos_token_id": 1, "eos_token_id": 2}
_UNSAID: Mapping[Any, Mapping[str, int]] = {
    "gpt2": {"bos_token_id": 50256, "eos_token_id": 50256},
    **dict.fromkeys(("llama", "mistral", "mixtral"), _LLAMA),
    "t5": {"eos_token_id": 1, "pad_token_id": 0},
    "bart": {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "decoder_start_token_id": 2},
}
_GUESSES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")


@dataclass(frozen=True)
class Special:
    """The ids with which texts begin and end."""

    end: int | None = None
    """Closes a document, and the source and target of a translation."""
    ends: tuple[int, ...] = ()
    """Generated text stops at any of these."""
    start: tuple[int, ...] = ()
    """Precede the target of a translation; `end` if there are none."""
    before: tuple[int, ...] = ()
    """Precede its source."""

    @property
    def opening(self) -> tuple[int, ...]:
        """What precedes the target of a translation."""
        return self.start or (() if self.end is None else (self.end,))

    def save(self, directory: Path) -> None:
        """Write `special_tokens.json`, which `find_special` reads."""
        (directory / FILE).write_text(json.dumps(dataclasses.asdict(self)) + "\n")


def find_special(directory: Path | None, vocabulary: Mapping[str, int]) -> Special:
    """Find the special ids for the tokenizer.json in a directory, which has this vocabulary.

    They come from `special_tokens.json` if it is there. Beside a transformers model, generation_config.json or else
    config.json says what starts and ends a text, with the defaults of transformers, and `eos_token` in
    tokenizer_config.json says what closes a document. With only a tokenizer, they are guessed from its tokens' names.

    Raises:
        UserError: a file is damaged, or `eos_token` is not in the vocabulary.
    """
    guess = next((i for token in _GUESSES if (i := vocabulary.get(token)) is not None), None)
    alone = Special(guess, () if guess is None else (guess,))
    if directory is None:
        return alone
    if (own := directory / FILE).is_file():
        value = objects(own)
        return Special(
            _id(own, "end", value.get("end")),
            _ids(own, "ends", value.get("ends")),
            _ids(own, "start", value.get("start")),
            _ids(own, "before", value.get("before")),
        )
    named = text_of(directory, "eos_token")
    end = guess if named is None else vocabulary.get(named)
    if named is not None and end is None:
        raise UserError(
            f"got eos_token {named!r} for {directory}, expected a token in the vocabulary of tokenizer.json, "
            "try another copy"
        )
    stated_ids = stated(directory)
    if stated_ids is None:
        return Special(end, () if end is None else (end,))
    if named is None:
        end = next((i for i in stated_ids["eos_token_id"] if i in vocabulary.values()), guess)
    return Special(end, stated_ids["eos_token_id"], stated_ids["start"], stated_ids["before"])


def stated(directory: Path) -> dict[str, Any] | None:
    """Read the ids that a transformers model states, by their names there; those that end a text are a tuple, as are
    those that precede a target (`start`) and its source (`before`).

    None for a directory without such a model.
    """
    path = directory / "config.json"
    config = objects(path) if path.is_file() else {}
    if "model_type" not in config:
        return None
    unsaid = _UNSAID.get(config["model_type"] if isinstance(config["model_type"], str) else None, {})
    names = (*NAMES, FORCED[0])
    values = {name: config[name] if name in config else unsaid.get(name) for name in names}
    if (generation := directory / "generation_config.json").is_file():
        path, generates = generation, objects(generation)
        values |= {name: generates.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        values |= {name: generates[name] for name in names if name in generates}
    single = {name: _id(path, name, values[name]) for name in names if name != "eos_token_id"}
    if single["decoder_start_token_id"] is None and config["model_type"] == "t5":
        single["decoder_start_token_id"] = single["pad_token_id"]  # what T5 was trained with
    bart = config["model_type"] == "bart"  # whose texts all begin with <s>, whether that is forced or not
    first, begin = single["decoder_start_token_id"], single[FORCED[0]]
    begin = single["bos_token_id"] if bart and begin is None else begin
    generates = {
        "start": tuple(i for i in (first, begin) if i is not None) if first is not None else (),
        "before": tuple(i for i in (single["bos_token_id"],) if bart and i is not None),
    }
    if config["model_type"] == "whisper" and first is not None:
        generates["start"] = (first, *_transcribing(path, objects(path)))
    return {**single, **generates, "eos_token_id": _ids(path, "eos_token_id", values["eos_token_id"])}


def _transcribing(path: Path, settings: Mapping[str, Any]) -> tuple[int, ...]:
    """Read what follows the first token in Whisper's prompt: a language and a task if it has several, no timestamps.

    The language is English where the file names none.
    """
    forced = settings.get("forced_decoder_ids")
    ids = [each[1] for each in forced if isinstance(each, list) and len(each) == 2] if isinstance(forced, list) else []
    if isinstance(languages := settings.get("lang_to_id"), dict):
        codes, code = {name.strip("<|>"): i for name, i in languages.items()}, str(settings.get("language") or "en")
        if code.strip("<|>") not in codes:
            raise UserError(f"got language {code!r} in {path}, expected a code such as {', '.join([*codes][:5])}")
        tasks = settings.get("task_to_id")
        task = tasks.get(str(settings.get("task") or "transcribe")) if isinstance(tasks, dict) else None
        ids = [codes[code.strip("<|>")], task]
    if (untimed := settings.get("no_timestamps_token_id")) is not None and untimed not in ids:
        ids.append(untimed)
    return _ids(path, "forced_decoder_ids", ids)


def text_of(directory: Path, name: str) -> str | None:
    """Return a token such as `eos_token` as text, from tokenizer_config.json or special_tokens_map.json."""
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        path = directory / file
        token = objects(path).get(name) if path.is_file() else None
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None and not isinstance(token, str):
            raise UserError(f"got {name} {token!r} in {path}, expected the text of a token, try another copy")
        if token is not None:
            return token
    return None


def objects(path: Path, expected: str = "JSON") -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        UserError: it cannot be read, or is not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(
            f"got {path}, which cannot be read ({reason}), expected {expected}, try another copy"
        ) from error
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error).splitlines()[0]
        raise UserError(f"got {path}, expected {expected} ({reason}), try another copy") from error
    if not isinstance(value, dict):
        raise UserError(f"got {path} with {type(value).__name__}, expected {expected}, an object, try another copy")
    return value


def _id(path: Path, name: str, value: Any) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31):
        raise UserError(f"got {name} {str(value)[:40]} in {path}, expected the id of a token, try another copy")
    return value


def _ids(path: Path, name: str, value: Any) -> tuple[int, ...]:
    several = value if isinstance(value, list) else [] if value is None else [value]
    return tuple(i for item in several if (i := _id(path, name, item)) is not None)
