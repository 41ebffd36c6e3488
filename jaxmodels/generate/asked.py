"""What the files of an imported model ask of text generation: transformers' generation_config.json."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, TypedDict

from jaxmodels.data import special
from jaxmodels.errors import UserError
from jaxmodels.generate.beam import EarlyStopping
from jaxmodels.hf.beside import KEPT

log = logging.getLogger("jaxmodels")

PENALTY = "repetition_penalty"
"""The one setting that `sample` applies, whether it draws or not."""
_SEARCHED: dict[str, Any] = {"num_beams": 4, "length_penalty": 1.0, "early_stopping": False}
"""Settings of a search for targets, which follows them: transformers' defaults, but for the number of beams."""
_DRAWN: dict[str, tuple[float, float, float]] = {
    "temperature": (1.0, 0.0, float("inf")), "top_k": (50, 0, 2**31 - 1), "top_p": (1.0, 0.0, 1.0),
}  # fmt: skip
"""Settings of files that ask for tokens to be drawn: transformers' defaults, the least value and the highest."""
_LIMITS = ("max_length", "max_new_tokens")
"""Settings of a search for targets that are not followed: how long one may be depends on its source here."""
REFUSED = {"never": "suppress_tokens", "not_first": "begin_suppress_tokens"}
"""What a decoder of sounds applies: tokens that are in no transcript, and those that do not begin one."""
_NEUTRAL: dict[str, Any] = {
    PENALTY: 1,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1,
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
    "bad_words_ids": [],
    "force_words_ids": [],
    "sequence_bias": {},
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "min_length": 0,
    "min_new_tokens": 0,
    "exponential_decay_length_penalty": None,
    "typical_p": 1,
    "min_p": 0,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "penalty_alpha": 0,
    "guidance_scale": 1,
    "num_beam_groups": 1,
    "diversity_penalty": 0,
    "stop_strings": [],
}
"""Settings that change which tokens are generated, and the values (None too) with which they change nothing."""


def _told(run: Path) -> tuple[Path, dict[str, Any]]:
    """Return the file that says how an imported run generates, and what it says; nothing where there is none."""
    files = [run / KEPT / name for name in ("generation_config.json", "config.json")]
    path = next((path for path in files if path.is_file()), files[0])
    return path, special.objects(path) if path.is_file() else {}


def asked_of(run: Path) -> dict[str, Any]:
    """The settings with an effect that an imported run's files ask for, by their names in transformers.

    As there, those of config.json count where generation_config.json is missing.

    Raises:
        UserError: a file is damaged, or its repetition penalty is not a positive number.
    """
    path, told = _told(run)
    found = {name: told[name] for name, neutral in _NEUTRAL.items() if told.get(name) not in (None, neutral)}
    penalty = found.get(PENALTY, 1)
    if isinstance(penalty, bool) or not isinstance(penalty, int | float) or not 0 < penalty < float("inf"):
        raise UserError(f"got {PENALTY} {penalty!r} in {path}, expected a number above 0, try 1 for no penalty")
    return found


def repetition_penalty(run: Path) -> float:
    """The penalty that an imported run's files ask of `sample`; says in one line what they ask that is not applied."""
    found = asked_of(run)
    penalty = float(found.pop(PENALTY, 1))
    say_what_is_left_out(run, found)
    return penalty


def drawing(run: Path) -> dict[str, Any]:
    """How `sample` draws for an imported run whose files ask it to draw: temperature, top_k and top_p, as in
    transformers.

    Raises:
        UserError: one of them is out of range.
    """
    path, told = _told(run)
    if told.get("do_sample") is not True:
        return {}
    found = {}
    for name, (usual, least, most) in _DRAWN.items():
        value = usual if told.get(name) is None else told[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            raise UserError(f"got {name} {value!r} in {path}, expected a number from {least:g} to {most:g}")
        found[name] = int(value) if name == "top_k" else float(value)
    return {name: value for name, value in found.items() if value or name == "temperature"}  # a top_k of 0 means all


class Searched(TypedDict):
    """How targets are searched for, as `beam.decode` takes it."""

    beams: int
    alpha: float
    early_stopping: EarlyStopping | None


def searching(run: Path) -> Searched:
    """How targets are searched for: as an imported run's files ask, with transformers' penalty of lengths and its rule
    of when to stop; by Wu et al. for a run that was trained here.

    Raises:
        UserError: one of the settings is out of range.
    """
    path, told = _told(run)
    found = {name: usual if told.get(name) is None else told[name] for name, usual in _SEARCHED.items()}
    beams, alpha, early_stopping = found.values()
    if type(beams) is not int or not 1 <= beams <= 1000:
        raise UserError(f"got num_beams {beams!r} in {path}, expected a whole number from 1, try 4")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not -100 <= alpha <= 100:
        raise UserError(f"got length_penalty {alpha!r} in {path}, expected a number from -100 to 100, try 1")
    if early_stopping not in (True, False, "never") or type(early_stopping) not in (bool, str):
        raise UserError(f"got early_stopping {early_stopping!r} in {path}, expected true, false or never, try false")
    return {"beams": beams, "alpha": float(alpha), "early_stopping": early_stopping if told else None}


def say_what_no_search_follows(run: Path) -> None:
    """Log the settings that a search for targets, which begin and end with the forced tokens, does not follow."""
    told = _told(run)[1]
    found = {name: x for name, x in asked_of(run).items() if name not in special.FORCED}
    found |= {name: told[name] for name in _LIMITS if told.get(name) is not None}
    say_what_is_left_out(run, found)


def say_what_is_left_out(run: Path, settings: dict[str, Any]) -> None:
    """Log the settings that are asked for and not applied, in one line."""
    if settings:
        asked = ", ".join(f"{name} {value}" for name, value in settings.items())
        log.warning("%s: not applied, though the files of the imported model ask for it: %s", run, asked)
