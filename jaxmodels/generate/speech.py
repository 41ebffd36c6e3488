"""Transcripts of sounds by a saved run: of its likeliest characters, or by its decoder."""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.data import sounds
from jaxmodels.data.files import shown
from jaxmodels.data.tokenizer import Tokenizer
from jaxmodels.errors import UserError
from jaxmodels.generate import asked
from jaxmodels.generate.beam import decode
from jaxmodels.generate.prepare import Answer, Answers, tokenizer_of
from jaxmodels.generate.translation import upto
from jaxmodels.tasks import ctc
from jaxmodels.tasks.task import Batch, Params, floats
from jaxmodels.train.saved import Evaluation, Run


def listener(run: Run) -> Callable[[Any], list[Any]]:
    """Return the function that turns the bytes of a sound file into samples of the run's rate: the rows of its parts,
    each padded to the run's length."""
    field = run.task.fields["inputs"]
    (most,), rate = field.shape or (0,), field.rate or 0

    def ready(value: Any) -> list[Any]:
        if not isinstance(value, bytes):
            raise UserError(f"is {shown(value)}, expected a sound")
        return [
            {"inputs": np.pad(part, (0, most - len(part))), "lengths": np.int32(len(part))}
            for part in cut(sounds.samples_of(value, rate), most, rate)
        ]

    return ready


def cut(samples: np.ndarray, most: int, rate: int) -> list[np.ndarray]:
    """Cut a sound (N,) into parts of at most `most` samples, each where the end of what fits is quietest, so that few
    words are cut: at the middle of the quietest tenth of a second of its last third.

    Source: Bain et al. 2023 (WhisperX), "cut and merge", with loudness in place of a detector of voices.
    """
    parts = []
    while len(samples) > most:
        end = samples[most - max(1, most // 3) : most].astype(np.float64)
        span = max(1, min(rate // 10, len(end)))
        total = np.concatenate([[0.0], np.cumsum(end * end)])
        loud = total[span:] - total[:-span]
        at = most - len(end) + int(loud.argmin()) + (span + 1) // 2
        parts.append(samples[:at])
        samples = samples[at:]
    return [*parts, samples]


Sounding = Mapping[str, Any]
"""A batch of sounds, on the host."""


class Heard(NamedTuple):
    """The transcript of a sound."""

    text: str
    confidence: float
    """The mean probability of its frames, or of its tokens and their end by the geometric mean."""


def transcriber(run: Run) -> Callable[[Sounding], list[Heard]]:
    """Return the function that transcribes a batch of sounds.

    Raises:
        UserError: the run has no tokenizer, or its files refuse tokens that the model does not have.
    """
    tokenizer, predicts = tokenizer_of(run), run.task.predicts
    if predicts is None:
        return _decoder(run)

    @jax.jit
    def read(params: Params, stats: Params, batch: Batch) -> Any:
        return predicts(params, stats, batch)

    def transcribe(batch: Sounding) -> list[Heard]:
        found = jax.device_get(read(run.params, run.stats, {name: batch[name] for name in ("inputs", "lengths")}))
        rows = zip(found["tokens"], found["confidence"], strict=True)
        return [Heard(tokenizer.decode(ids[ids >= 0]).strip(), float(sure)) for ids, sure in rows]

    return transcribe


def decoding(run: Run) -> dict[str, Any]:
    """Return how a run's decoder is asked for transcripts, as `beam.decode` takes it; log what of its files is not
    applied.

    Raises:
        UserError: the tokenizer has no token that ends a text, or the files refuse tokens that the model does not have.
    """
    model, special, settings = run.model, tokenizer_of(run).special, asked.asked_of(run.directory)
    ends = ends_of(tokenizer_of(run))
    if not ends or model.longest is None:
        raise UserError(f"got {run.directory}, whose tokenizer has no token that ends a text, expected one")
    refused = {name: settings.pop(asked_for, []) for name, asked_for in asked.REFUSED.items()}
    for name, ids in refused.items():
        if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < model.config.vocab_size for i in ids):
            raise UserError(
                f"got {asked.REFUSED[name]} {ids} in the files of {run.directory}, expected ids of the model's tokens"
            )
    asked.say_what_is_left_out(run.directory, settings)
    return {"start": special.opening, "end": ends, "limit": model.longest + 1 - len(special.opening), **refused}


def ends_of(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the tokens that end a text."""
    special = tokenizer.special
    return special.ends or ((special.end,) if special.end is not None else ())


def _decoder(run: Run) -> Callable[[Sounding], list[Heard]]:
    """Transcribe by greedy decoding."""
    tokenizer, how = tokenizer_of(run), decoding(run)

    def transcribe(batch: Sounding) -> list[Heard]:
        found = decode(run.model, run.params["model"], np.asarray(floats(batch["inputs"])), **how)
        rows = [upto(tokens, how["end"]) for tokens in found.tokens]
        sure = np.exp(found.scores / [len(row) + 1 for row in rows])
        return [Heard(tokenizer.decode(row).strip(), float(p)) for row, p in zip(rows, sure, strict=True)]

    return transcribe


def recognizer(run: Run) -> Answers:
    """Return the function that answers with the transcripts of sounds, and how sure the model is of them: of a sound in
    parts, of the one that it is least sure of."""
    transcribe = transcriber(run)

    def answers(ready: Sequence[list[Any]]) -> list[Answer]:
        known = {id(parts): parts for parts in ready}  # what fills a batch is one of its sounds again
        rows, heard = [part for parts in known.values() for part in parts], []
        for at in range(0, len(rows), len(ready)):  # as many parts at a time as there are sounds
            some = rows[at : at + len(ready)]
            padded = [*some, *[some[0]] * (len(ready) - len(some))]
            batch = {name: np.stack([each[name] for each in padded]) for name in padded[0]}
            heard += transcribe(batch)[: len(some)]
        rest = iter(heard)
        answer = {key: _joined(list(itertools.islice(rest, len(parts)))) for key, parts in known.items()}
        return [answer[id(parts)] for parts in ready]

    return answers


def _joined(parts: Sequence[Heard]) -> Answer:
    sure = [part.confidence for part in parts]
    if not np.isfinite(sure).all():
        return {"error": "the model's probabilities are no finite numbers"}
    return {"transcript": " ".join(part.text for part in parts if part.text), "confidence": round(min(sure), 6)}


def spelled(evaluation: Evaluation, batch: Sounding) -> list[str]:
    """Return the texts that the sounds of a batch have, empty where they do not count."""
    tokenizer = tokenizer_of(evaluation.run)
    ends = ends_of(tokenizer)
    return [tokenizer.decode(upto(row[row >= 0], ends)).strip() for row in np.asarray(batch["targets"])]


def plain(text: str) -> str:
    """Return a text as recognizers are compared by: in lower case, with spaces in place of punctuation.

    Source: Radford et al. 2022, appendix C; but apostrophes, which are part of a word, stay.
    """
    text = unicodedata.normalize("NFKC", text).lower().replace("’", "'")
    return " ".join("".join(c if c == "'" or unicodedata.category(c)[0] not in "MSP" else " " for c in text).split())


def error_rates(found: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    """Count the errors of transcripts in words and characters, per word and character of the texts that are wanted."""
    rates, pairs = {}, [[plain(text) for text in texts] for texts in (found, wanted)]
    for name, cut in (("wer", str.split), ("cer", list)):
        parts = [[cut(text) for text in texts] for texts in pairs]
        ids = {part: i for i, part in enumerate({part: 0 for texts in parts for text in texts for part in text})}
        rows = []
        for texts in parts:
            rows.append(np.full((len(texts), max(map(len, texts), default=0) or 1), -1, np.int32))
            for row, text in zip(rows[-1], texts, strict=True):
                row[: len(text)] = [ids[part] for part in text]
        total = (rows[1] >= 0).sum()
        if total:
            rates[name] = float(jax.jit(ctc.edits)(jnp.asarray(rows[0]), jnp.asarray(rows[1])).sum() / total)
    return rates
