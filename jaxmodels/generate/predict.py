"""Predictions of a saved run for records: classes, captions, continuations, translations, masked tokens."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.data import given, pixels, texts, transforms
from jaxmodels.data.files import shown
from jaxmodels.data.records import Bad, distinct
from jaxmodels.data.section import Augment
from jaxmodels.data.tokenizer import Tokenizer
from jaxmodels.errors import UserError
from jaxmodels.generate import asked
from jaxmodels.generate.sample import sample
from jaxmodels.generate.translation import translate_texts
from jaxmodels.train.saved import Run

Answer = dict[str, Any]
Answers = Callable[[Sequence[Any]], Sequence[Answer]]
"""Computes the answers for a batch of prepared records."""

LISTED = 100
"""With more classes than this, only the likeliest are listed."""
LIKELIEST = 5
MASK = "[MASK]"


def said(
    records: Iterable[given.Given],
    ready: Callable[[Any], Any],
    answers: Answers,
    size: int,
    threads: ThreadPoolExecutor,
) -> Iterator[Answer]:
    """Yield an answer for each record, in order; `answers` always receives `size` records prepared by `ready`."""

    def prepare(value: Any) -> Any:
        try:
            return value if isinstance(value, Bad) else ready(value)
        except (UserError, pixels.Unreadable) as error:
            return Bad("", str(error))

    rest = iter(records)
    while chunk := list(islice(rest, size)):
        made = list(threads.map(prepare, [value for _, value in chunk]))
        good = [value for value in made if not isinstance(value, Bad)]
        # padded, so that nothing is compiled for another batch size
        found = iter(answers([*good, *[good[0]] * (size - len(good))])[: len(good)] if good else [])
        for (where, value), own in zip(chunk, made, strict=True):
            if isinstance(own, Bad):
                yield {"where": where, "error": own.reason}
            else:
                yield {"where": where, **({"text": value} if isinstance(value, str) else {}), **next(found)}


def kind_of(run: Run) -> given.Kind:
    """Return what a run's model reads."""
    if "model" in run.networks and np.issubdtype(run.model.inputs(1)[0].dtype, np.integer):
        return "text"
    return "array" if run.kept.kind == "array" or len(_shape(run)) != 3 else "image"


def predictor(run: Run, tokens: int, beams: int) -> tuple[Callable[[Any], Any], Answers]:
    """Return the function that prepares a value, and the one that answers a batch of them."""
    predicts = run.task.predicts  # refuses a model that no task trains
    answers = run.config.task.answers
    if not answers and predicts is None:
        raise UserError(
            f"got a run of task {run.config.task.kind}, expected one that says something of a record, "
            f"try jaxmodels report {run.directory}, which shows the images that it makes"
        )
    if kind_of(run) == "text" and run.tokenizer is None:
        raise UserError(f"got {run.directory} without a tokenizer, expected a run that was trained on texts")
    if not answers and predicts is not None:
        return reader(run), _own(run, predicts)
    if answers in ("class", "classes"):
        return reader(run), _classifier(run)
    if answers == "caption":
        return _images(run), _captioned(run)
    assert run.tokenizer is not None
    if answers == "translation":
        return _source(run, run.tokenizer), _translator(run, run.tokenizer, beams)
    if answers == "continuation":
        return _prompt(run, run.tokenizer, tokens), _writer(run, run.tokenizer, tokens)
    return _gaps(run, run.tokenizer), _filler(run, run.tokenizer)


# ---- classes


def reader(run: Run) -> Callable[[Any], Any]:
    """Return the function that turns a record into a row of each of a classifier's inputs."""
    kind = kind_of(run)
    if kind != "text":
        return _images(run) if kind == "image" else _array(run)
    tokenizer = run.tokenizer
    assert tokenizer is not None

    def ready(value: Any) -> Any:
        length = run.config.data.seq_len
        rows = texts.single(tokenizer.encode_many([_text(value)], special=True, length=length), length)
        return {name: row[0] for name, row in rows.items()}

    return ready


def _images(run: Run) -> Callable[[Any], Any]:
    section, crop = run.config.data, Augment(crop=run.config.augment.crop)
    pixels.check_library(section.pixels)
    height, width, channels = _shape(run)

    def ready(value: Any) -> Any:
        if not isinstance(value, bytes):
            raise UserError(f"is {shown(value)}, expected an image")
        image = pixels.decode(value, section.pixels)
        return {"inputs": transforms.center(image, crop, (height, width, channels), section.pixels)}

    return ready


def _array(run: Run) -> Callable[[Any], Any]:
    shape = _shape(run)

    def ready(value: Any) -> Any:
        try:
            numbers = np.asarray(json.loads(value) if isinstance(value, str) else value, np.float32)
        except (ValueError, TypeError, RecursionError):
            raise UserError(f"is {shown(value)}, expected numbers") from None
        if numbers.shape != shape:
            raise UserError(f"has the shape {numbers.shape}, expected {shape}")
        if not np.isfinite(numbers).all():
            raise UserError("has numbers that are not finite, expected finite ones")
        return {"inputs": numbers}

    return ready


def _shape(run: Run) -> tuple[int, ...]:
    """Return the shape of one example of numbers or pixels."""
    return tuple(run.networks[next(iter(run.networks))].inputs(1)[0].shape[1:])


def class_names(run: Run) -> list[str]:
    """Return the names of a classifier's outputs."""
    return distinct([run.class_name(i) for i in range(run.model.config.classes)])


def class_shares(run: Run) -> Callable[[Any, Any], jax.Array]:
    """Return the function of parameters and a batch that gives each row's probabilities, (B, classes)."""
    several = run.config.task.answers == "classes"

    def shares(params: Any, batch: Any) -> jax.Array:
        inputs, named = run.inputs(batch)
        logits = run.apply(inputs, params=params, **named).astype(jnp.float32)
        return jax.nn.sigmoid(logits) if several else jax.nn.softmax(logits)

    return shares


def _classifier(run: Run) -> Answers:
    names, several, shares = class_names(run), run.config.task.answers == "classes", jax.jit(class_shares(run))

    def answers(ready: Sequence[Any]) -> list[Answer]:
        batch = {name: np.stack([each[name] for each in ready]) for name in ready[0]}
        return [chosen(row, names, several) for row in np.asarray(shares(run.params["model"], batch))]

    return answers


def _own(run: Run, predicts: Callable[..., Any]) -> Answers:
    """Answer with what the run's task itself predicts, by the task's names."""

    @jax.jit
    def said(params: Any, stats: Any, batch: Any) -> Any:
        return predicts(params, stats, batch)

    def answers(ready: Sequence[Any]) -> list[Answer]:
        batch = {name: np.stack([each[name] for each in ready]) for name in ready[0]}
        found = {name: np.asarray(x) for name, x in said(run.params, run.stats, batch).items()}
        return [one({name: x[i] for name, x in found.items()}) for i in range(len(ready))]

    def one(values: dict[str, np.ndarray]) -> Answer:
        wrong = [name for name, x in values.items() if not np.isfinite(x).all()]
        if wrong:
            return {"error": f"the model's {wrong[0]} is no finite number"}
        return {name: x.tolist() for name, x in values.items()}

    return answers


def _captioned(run: Run) -> Answers:
    """Answer with the class whose captions are closest to an image."""
    section, tokenizer = run.config.data, run.tokenizer
    names = section.class_names or run.kept.classes
    if tokenizer is None:
        raise UserError(f"got {run.directory} without a tokenizer, expected one that reads captions, try another run")
    if not section.captions or not names:
        what = " and ".join(["captions"] * (not section.captions) + ["names of classes"] * (not names))
        raise UserError(
            f"got {run.directory} without {what}, expected those that images are matched with, "
            f"try --captions {shlex.join(section.captions or ('a photo of a {label}',))} "
            f"--class-names {shlex.join(names or ('cat', 'dog'))}"
        )
    rows = texts.encoded(texts.filled(section.captions, names), tokenizer, section.seq_len)
    _, read, scale = run.apply(None, rows["inputs"], segment_ids=rows["segment_ids"])
    read = np.asarray(read).reshape(len(names), len(section.captions), -1).mean(1)
    read /= np.linalg.norm(read, axis=-1, keepdims=True)

    @jax.jit
    def shares(params: Any, inputs: jax.Array) -> jax.Array:
        seen, _, _ = run.apply(run.inputs({"inputs": inputs})[0], None, params=params)
        return jax.nn.softmax(jnp.minimum(scale, 100.0) * seen @ read.T)

    def answers(ready: Sequence[Any]) -> list[Answer]:
        found = shares(run.params["model"], np.stack([each["inputs"] for each in ready]))
        return [chosen(row, distinct(names)) for row in np.asarray(found)]

    return answers


def chosen(shares: np.ndarray, names: Sequence[str], several: bool = False) -> Answer:
    """Return the class, or with `several` all classes above 1/2, and all probabilities."""
    if not np.isfinite(shares).all():
        return {"error": "the model's probabilities are no finite numbers"}
    order = np.argsort(-shares, kind="stable")[:LIKELIEST] if len(shares) > LISTED else range(len(shares))
    listed = {names[i]: round(float(shares[i]), 6) for i in order}
    if several:
        return {"labels": [names[i] for i in np.flatnonzero(shares > 0.5).tolist()], "probabilities": listed}
    best = int(shares.argmax())
    return {"label": names[best], "probability": round(float(shares[best]), 6), "probabilities": listed}


# ---- texts


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise UserError(f"is {shown(value)}, expected text")
    if re.search(r"[\ud800-\udfff]", value):
        raise UserError("has half of a surrogate pair, expected text of UTF-8")
    if not value.strip():
        raise UserError("is blank, expected text")
    return value


def _source(run: Run, tokenizer: Tokenizer) -> Callable[[Any], Any]:
    def ready(value: Any) -> Any:
        count, longest = len(tokenizer.encode(_text(value))) + 1, run.model.longest
        if longest is not None and count > longest:
            raise UserError(f"has {count} tokens, expected at most the model's context of {longest}")
        return value

    return ready


def _translator(run: Run, tokenizer: Tokenizer, beams: int) -> Answers:
    asked.say_what_is_left_out(run.directory, asked.asked_of(run.directory))

    def answers(ready: Sequence[Any]) -> list[Answer]:
        found = translate_texts(run.model, run.params["model"], tokenizer, ready, beams=beams, batch_size=len(ready))
        return [{"translation": text} for text in found]

    return answers


def _prompt(run: Run, tokenizer: Tokenizer, tokens: int) -> Callable[[Any], Any]:
    longest = run.model.longest
    most = None if longest is None else longest - min(tokens, longest - 1)

    def ready(value: Any) -> Any:
        ids = np.append(
            np.array(tokenizer.before, np.int32), tokenizer.encode(_text(value))
        )  # as `sample` begins a text
        if most is not None and len(ids) > most:
            raise UserError(f"has {len(ids)} tokens, expected at most {most} with --tokens {tokens}")
        return ids

    return ready


def _writer(run: Run, tokenizer: Tokenizer, tokens: int) -> Answers:
    tokens = tokens if run.model.longest is None else min(tokens, run.model.longest - 1)
    how = {"temperature": 0, "repetition_penalty": asked.repetition_penalty(run.directory)}

    def answers(ready: Sequence[Any]) -> list[Answer]:
        ends = tokenizer.special.ends
        rows = sample(run.model, run.params["model"], ready, tokens, ends=ends, **how)
        new = [row[len(ids) :] for row, ids in zip(rows, ready, strict=True)]
        return [{"continuation": tokenizer.decode(row[: np.append(np.isin(row, ends), True).argmax()])} for row in new]

    return answers


def _gaps(run: Run, tokenizer: Tokenizer) -> Callable[[Any], Any]:
    """Return the function that turns a text into a row of tokens and the positions of `[MASK]`."""
    section, gap = run.config.data, _gap(run)
    special = section.pack or not section.real  # for whole texts only; windows of joined texts have none

    def encode(text: str) -> np.ndarray:
        if list(tokenizer.encode(MASK)) == [gap]:
            return tokenizer.encode_many([text], special=special)[0]
        parts = [tokenizer.encode(part) for part in text.split(MASK)]
        inner = [np.append(part, gap) for part in parts[:-1]]
        around = tokenizer.encode_many([""], special=special)[0] if special else np.zeros(0, np.int32)
        return np.concatenate([around, *inner, parts[-1]]).astype(np.int32)

    def ready(value: Any) -> Any:
        ids = encode(_text(value))
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


def _filler(run: Run, tokenizer: Tokenizer) -> Answers:
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
