"""Answer texts with a saved run: translations, continuations, masked tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.errors import UserError
from jaxmodels.generate import asked
from jaxmodels.generate.prepare import Answer, Answers, text_of, tokenizer_of
from jaxmodels.generate.sample import sample
from jaxmodels.generate.translation import translated
from jaxmodels.train.saved import Run

LIKELIEST = 5
MASK = "[MASK]"


def source(run: Run) -> Callable[[Any], Any]:
    """Return the function that checks a text to translate or sum up; a list is that of its sentences."""
    tokenizer, longest = tokenizer_of(run), run.model.longest
    sums_up = getattr(run.config.task, "target", "") == "summary"

    def ready(value: Any) -> Any:
        value = " ".join(map(text_of, value)) if isinstance(value, list) and value else text_of(value)
        if sums_up:
            return value  # and cut, as in training
        count = len(tokenizer.special.before) + len(tokenizer.encode(value)) + 1
        if longest is not None and count > longest:
            raise UserError(f"has {count} tokens, expected at most the model's context of {longest}")
        return value

    return ready


def translator(run: Run, beams: int | None) -> Answers:
    """Answer with a text's translation, or its summary."""
    name = getattr(run.config.task, "target", "translation")
    asked.say_what_no_search_follows(run.directory)

    def answers(ready: Sequence[Any]) -> list[Answer]:
        return [{name: text} for text in translated(run, ready, beams=beams, batch_size=len(ready))]

    return answers


def prompt(run: Run, tokens: int) -> Callable[[Any], Any]:
    """Return the function that turns the beginning of a text into tokens."""
    tokenizer, longest = tokenizer_of(run), run.model.longest
    most = None if longest is None else longest - min(tokens, longest - 1)

    def ready(value: Any) -> Any:
        ids = np.append(
            np.array(tokenizer.before, np.int32), tokenizer.encode(text_of(value))
        )  # as `sample` begins a text
        if most is not None and len(ids) > most:
            raise UserError(f"has {len(ids)} tokens, expected at most {most} with --tokens {tokens}")
        return ids

    return ready


def writer(run: Run, tokens: int) -> Answers:
    """Answer with the likeliest continuation of a text."""
    tokenizer = tokenizer_of(run)
    tokens = tokens if run.model.longest is None else min(tokens, run.model.longest - 1)
    how = {"temperature": 0, "repetition_penalty": asked.repetition_penalty(run.directory)}

    def answers(ready: Sequence[Any]) -> list[Answer]:
        ends = tokenizer.special.ends
        rows = sample(run.model, run.params["model"], ready, tokens, ends=ends, **how)
        new = [row[len(ids) :] for row, ids in zip(rows, ready, strict=True)]
        return [{"continuation": tokenizer.decode(row[: np.append(np.isin(row, ends), True).argmax()])} for row in new]

    return answers


def gaps(run: Run) -> Callable[[Any], Any]:
    """Return the function that turns a text into a row of tokens and the positions of `[MASK]`."""
    tokenizer, section, gap = tokenizer_of(run), run.config.data, _gap(run)
    special = section.pack or not section.real  # for whole texts only; windows of joined texts have none

    def encode(text: str) -> np.ndarray:
        if list(tokenizer.encode(MASK)) == [gap]:
            return tokenizer.encode_many([text], special=special)[0]
        parts = [tokenizer.encode(part) for part in text.split(MASK)]
        inner = [np.append(part, gap) for part in parts[:-1]]
        around = tokenizer.encode_many([""], special=special)[0] if special else np.zeros(0, np.int32)
        return np.concatenate([around, *inner, parts[-1]]).astype(np.int32)

    def ready(value: Any) -> Any:
        ids = encode(text_of(value))
        at = np.flatnonzero(ids == gap)
        if not len(at):
            raise UserError(f"has no {MASK}, expected one where a token is to be found")
        if len(ids) > section.seq_len:
            raise UserError(f"has {len(ids)} tokens, expected at most data.seq_len, {section.seq_len}")
        row, segments = np.zeros((2, section.seq_len), np.int32)
        row[: len(ids)], segments[: len(ids)] = ids, 1
        return {"tokens": row, "segment_ids": segments, "places": at, "length": len(ids)}

    return ready


def _gap(run: Run) -> int:
    """Return the id of the mask token."""
    if (gap := run.task.gap) is None:
        raise UserError(
            f"got a run of task {run.config.task.kind}, which does not say what stands for a missing token, expected "
            "one that does, try Task(gap=…) in it"
        )
    return gap


def filler(run: Run) -> Answers:
    """Answer with the likeliest tokens in place of each `[MASK]`."""
    tokenizer = tokenizer_of(run)

    @jax.jit
    def likeliest(params: Any, tokens: jax.Array, segment_ids: jax.Array, at: jax.Array) -> Any:
        logits = run.apply(tokens, params=params, segment_ids=segment_ids, at=at)
        return jax.lax.top_k(jax.nn.softmax(logits.astype(jnp.float32)), LIKELIEST)

    def answers(ready: Sequence[Any]) -> list[Answer]:
        most = max(len(each["places"]) for each in ready)
        # rounded up, so that few programs are compiled
        at = np.zeros((len(ready), 1 << (most - 1).bit_length()), np.int32)
        for row, each in zip(at, ready, strict=True):
            row[: len(each["places"])] = each["places"]
        tokens, segments = (np.stack([each[name] for each in ready]) for name in ("tokens", "segment_ids"))
        shares, ids = jax.device_get(likeliest(run.params["model"], tokens, segments, at))
        return [one(*each) for each in zip(ready, shares, ids, strict=True)]

    def one(each: Any, shares: np.ndarray, ids: np.ndarray) -> Answer:
        count = len(each["places"])
        if not np.isfinite(shares[:count]).all():
            return {"error": "the model's probabilities are no finite numbers"}
        whole = each["tokens"].copy()
        whole[each["places"]] = ids[:count, 0]
        masks = [
            [{"token": tokenizer.decode([i]), "probability": round(float(p), 6)} for i, p in zip(*pair, strict=True)]
            for pair in zip(ids[:count].tolist(), shares[:count].tolist(), strict=True)
        ]
        return {"filled": tokenizer.decode(whole[: each["length"]]), "masks": masks}

    return answers
