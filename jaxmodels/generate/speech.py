"""Transcripts of sounds by a saved run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxmodels.data import sounds
from jaxmodels.data.files import shown
from jaxmodels.errors import UserError
from jaxmodels.generate.prepare import Answer, Answers, tokenizer_of
from jaxmodels.tasks.task import Batch, Params
from jaxmodels.train.saved import Run


def listener(run: Run) -> Callable[[Any], Any]:
    """Return the function that turns the bytes of a sound file into samples of the run's rate and length."""
    field = run.task.fields["inputs"]
    (most,), rate = field.shape or (0,), field.rate or 0

    def ready(value: Any) -> Any:
        if not isinstance(value, bytes):
            raise UserError(f"is {shown(value)}, expected a sound")
        samples = sounds.samples_of(value, rate)
        if len(samples) > most:
            raise UserError(
                f"lasts {len(samples) / rate:.1f} s, expected at most task.seconds, {most / rate:g}, try parts of it"
            )
        padded = np.pad(samples, (0, most - len(samples)))
        return {"inputs": padded, "lengths": np.int32(len(samples))}

    return ready


def recognizer(run: Run) -> Answers:
    """Return the function that transcribes sounds, with the mean probability of the frames that were read."""
    tokenizer, predicts = tokenizer_of(run), run.task.predicts
    assert predicts is not None

    @jax.jit
    def read(params: Params, stats: Params, batch: Batch) -> Any:
        return predicts(params, stats, batch)

    def answers(ready: Sequence[Any]) -> list[Answer]:
        batch = {name: np.stack([each[name] for each in ready]) for name in ready[0]}
        found = jax.device_get(read(run.params, run.stats, batch))
        return [
            {"transcript": tokenizer.decode(ids[ids >= 0]).strip(), "confidence": round(float(sure), 6)}
            if np.isfinite(sure)
            else {"error": "the model's probabilities are no finite numbers"}
            for ids, sure in zip(found["tokens"], found["confidence"], strict=True)
        ]

    return answers
