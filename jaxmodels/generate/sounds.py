"""Sounds that a model of sounds draws."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import numpy as np

from jaxmodels.data.columns import listed
from jaxmodels.data.waves import decode
from jaxmodels.errors import UserError, nearest
from jaxmodels.train.saved import Run


def draw_sounds(
    run: Run,
    conditions: Sequence[tuple[str, ...]] = (),
    *,
    count: int = 1,
    seconds: float = 1.0,
    temperature: float = 1.0,
    seed: int = 0,
) -> tuple[np.ndarray, int]:
    """Draw sounds with a run: samples (B, N) in [-1, 1], and their rate.

    `conditions` are the names of what each sound is conditioned on, one of each kind; without any, `count` sounds are
    drawn. A sound depends on the seed and its place alone, not on those beside it.

    Raises:
        UserError: the run draws no sounds, or was not trained on such a condition.
    """
    sounds = run.task.sounds
    if sounds is None:
        raise UserError(f"got a run of task {run.config.task.kind}, expected one that draws sounds, try another run")
    names = names_of(run)
    rows = [tuple(_number(name, known) for name, known in zip(row, names, strict=True)) for row in conditions]
    given = np.array(rows, np.int32).reshape(len(rows), len(names)) if names else None
    if given is not None and not len(given):
        raise UserError(f"got no conditions for {run.directory}, expected one of each of {len(names)} kinds")
    length = max(1, round(seconds * sounds.rate))
    how = {"count": count, "length": length, "temperature": temperature, "seed": seed}
    codes = jax.jit(functools.partial(sounds.draw, conditions=given, **how))(run.params)
    return decode(np.asarray(codes)), sounds.rate


def names_of(run: Run) -> list[tuple[str, ...]]:
    """Return the names that each of a model's conditions may have, in order."""
    kinds, sounds = {"label": run.kept.classes, "group": run.kept.groups}, run.task.sounds
    assert sounds is not None
    return [kinds[kind] or tuple(map(str, range(count))) for kind, count in sounds.conditions]


def conditions_of(run: Run, prompt: str | None) -> list[tuple[str, ...]]:
    """Read what to draw from a prompt, such as "seven, george": one name for each of a model's conditions.

    Raises:
        UserError: there are more or fewer.
    """
    names = names_of(run)
    given = tuple(part.strip() for part in prompt.split(",")) if prompt is not None else ()
    if len(given) != len(names):
        example = f"--prompt '{', '.join(each[0] for each in names)}'" if names else "it without"
        prompted = f"--prompt {prompt!r}" if prompt is not None else "no --prompt"
        raise UserError(
            f"got {prompted} for {run.directory}, expected {len(names)} name(s) of what is to be drawn, try {example}"
        )
    return [given] if names else []


def _number(name: str, known: Sequence[str]) -> int:
    if name not in known:
        near = nearest(name, known) or f", try {known[0]}"
        raise UserError(f"got {name!r} to draw, expected one of {listed(known)}{near}")
    return list(known).index(name)
