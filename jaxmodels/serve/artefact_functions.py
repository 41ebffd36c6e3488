"""The functions of a run that an artefact holds: what its task says of a record, as pure functions of named arrays.

Dims: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from jaxmodels.errors import UserError
from jaxmodels.generate import asked, beam
from jaxmodels.generate.prepare import kind_of
from jaxmodels.generate.speech import decoding
from jaxmodels.models.families import create
from jaxmodels.models.model import Model, quantized
from jaxmodels.tasks.task import Task
from jaxmodels.train.saved import Run

BATCH, LENGTH = "batch", "length"
"""The dimensions that are known only when a function is called."""
CACHE = "cache/"
"""The beginning of the names of a key-value cache's arrays."""
Arrays = dict[str, Any]
Compute = Callable[[Run, Arrays], Mapping[str, Any]]
"""(run with the weights that are given, inputs by name) -> outputs by name."""


@dataclass(frozen=True)
class Input:
    """An array that a function takes."""

    shape: tuple[int | str, ...]
    """A name stands for a size that is known only when the function is called."""
    dtype: str = "int32"
    least: int | None = None
    """The smallest value that it may hold."""
    below: int | tuple[str, int] | None = None
    """What its values must be smaller than: a number, or a size by name plus a number."""


@dataclass(frozen=True)
class Function:
    """What is computed, and of what."""

    compute: Compute
    inputs: Mapping[str, Input]


def portable(run: Run, attention: str = "xla") -> Run:
    """The run with a kernel of attention that is plain XLA, which every platform and `jax.export` take.

    Raises:
        UserError: no task trains such a model.
    """
    config = run.config.model
    if not hasattr(config, "attention"):
        return run
    networks = {name: _with(model, attention) for name, model in run.networks.items()}
    changed: Any = dataclasses.replace(config, attention=attention)
    return dataclasses.replace(run, config=dataclasses.replace(run.config, model=changed), networks=networks)


def _with(model: Model, attention: str) -> Model:
    made = create(model.config, attention=attention)
    return quantized(made, model.rule) if model.rule else made


def functions(run: Run) -> dict[str, Function]:
    """The functions of a run, by name.

    Raises:
        UserError: its task is one that an artefact has no function for.
    """
    task, answers = run.task, run.config.task.answers
    if answers in ("class", "classes"):
        return {"classify": Function(_classify(answers == "classes"), _read(run))}
    if answers == "caption":
        return _towers(run)
    if answers == "continuation":
        return _decoder(run)
    if answers == "translation":
        return {"translate": _translate(run)}
    if answers == "transcript" and task.predicts is None:
        return {"transcribe": _transcribe(run)}
    if answers == "gaps":
        return {"fill": _fill(run)}
    if task.predicts is not None:
        return {"predict": Function(_predicts(task), _read(run))}
    if task.samples is not None:
        return {"generate": _samples(run)}
    raise UserError(
        f"got a run of task {run.config.task.kind}, for which an artefact has no function, expected one "
        "that classifies, writes, translates, fills gaps or makes images, try --format huggingface"
    )


def _ids(run: Run) -> Input:
    return Input((BATCH, LENGTH), least=0, below=getattr(run.model.config, "vocab_size", None))


MARKS = Input((BATCH, LENGTH), least=0, below=2)
"""1 for a text's tokens, 0 for padding."""


def _read(run: Run) -> dict[str, Input]:
    """The inputs of a model of texts, sounds, images or numbers, as `jaxmodels predict` makes them."""
    kind = kind_of(run)
    if kind == "text":
        return {"inputs": _ids(run), "segment_ids": MARKS}
    if kind == "audio":
        sounds = _sounds(run)
        return {"inputs": sounds, "lengths": Input((BATCH,), least=1, below=int(sounds.shape[1]) + 1)}
    shape = run.networks[next(iter(run.networks))].inputs(1)[0].shape[1:]
    return {"inputs": Input((BATCH, *shape), "uint8" if kind == "image" else "float32")}


def _sounds(run: Run) -> Input:
    return Input((BATCH, *(run.task.fields["inputs"].shape or (0,))), "float32")


def _classify(several: bool) -> Compute:
    def compute(run: Run, given: Arrays) -> Arrays:
        inputs, named = run.inputs(given)
        logits = run.apply(inputs, **named).astype(jnp.float32)
        return {"logits": logits, "probabilities": jax.nn.sigmoid(logits) if several else jax.nn.softmax(logits)}

    return compute


def _predicts(task: Task) -> Compute:
    predicts = task.predicts
    assert predicts is not None
    return lambda run, given: dict(predicts(run.params, run.stats, given))


def _samples(run: Run) -> Function:
    samples, asks = run.task.samples, run.task.asks
    assert samples is not None

    def compute(run: Run, given: Arrays) -> Arrays:
        rows = {name: x for name, x in given.items() if name != "seed"}
        count = next(iter(rows.values())).shape[0]
        asked = {"given": rows} if asks else {}
        return {"images": samples(run.params, run.stats, count, given["seed"], **asked)}

    # of `images` only the number counts, since a size that is not known before is that of an array
    asked = {
        "labels": lambda: Input((BATCH,), least=0, below=run.model.config.classes + 1),
        "tokens": lambda: _ids(run),
        "segment_ids": lambda: MARKS,
    }
    rows = {name: asked[name]() for name in asks} or {"images": Input((BATCH,), "uint8")}
    return Function(compute, {**rows, "seed": Input((), least=0)})


def _towers(run: Run) -> dict[str, Function]:
    def images(run: Run, given: Arrays) -> Arrays:
        seen, _, scale = run.apply(run.inputs(given)[0], None)
        return {"embeddings": seen, "scale": scale}

    def texts(run: Run, given: Arrays) -> Arrays:
        _, read, scale = run.apply(None, given["inputs"], segment_ids=given["segment_ids"])
        return {"embeddings": read, "scale": scale}

    shape = run.model.inputs(1)[0].shape[1:]
    return {
        "embed_images": Function(images, {"inputs": Input((BATCH, *shape), "uint8")}),
        "embed_texts": Function(texts, {"inputs": _ids(run), "segment_ids": MARKS}),
    }


def _fill(run: Run) -> Function:
    def compute(run: Run, given: Arrays) -> Arrays:
        logits = run.apply(given["tokens"], segment_ids=given["segment_ids"], at=given["at"])
        return {"logits": logits.astype(jnp.float32)}

    places = Input((BATCH, "gaps"), least=0, below=(LENGTH, 0))
    return Function(compute, {"tokens": _ids(run), "segment_ids": MARKS, "at": places})


def _translate(run: Run) -> Function:
    tokenizer = run.tokenizer
    if tokenizer is None or tokenizer.end is None:
        raise UserError(f"got {run.directory} without a tokenizer that has an end token, expected one, try another run")
    ends = jnp.asarray(tokenizer.special.ends or (tokenizer.end,), jnp.int32)
    start = jnp.asarray(tokenizer.special.opening, jnp.int32)
    beams, alpha, early_stopping = asked.searching(run.directory).values()

    def compute(run: Run, given: Arrays) -> Arrays:
        sources, marks = given["inputs"], given["segment_ids"]
        room = 2 * sources.shape[1]  # as many as `limit` gives a source of this length
        how = given["limits"], start, ends, jnp.float32(alpha), room, beams, None, early_stopping
        tokens, scores = beam.search(run.model, run.params["model"], sources, marks, *how)
        return {"tokens": tokens, "scores": scores}

    limits = Input((BATCH,), least=1, below=(LENGTH, 10**9))
    return Function(compute, {"inputs": _ids(run), "segment_ids": MARKS, "limits": limits})


def _decoder(run: Run) -> dict[str, Function]:
    """The logits of all tokens; and the two functions that generate, as `generate.sample` does."""

    def logits(run: Run, given: Arrays) -> Arrays:
        return {"logits": run.apply(given["tokens"])}

    def start(run: Run, given: Arrays) -> Arrays:
        tokens, lengths = given["tokens"], given["lengths"]
        B, room = tokens.shape
        real = (jnp.arange(room) < lengths[:, None]).astype(jnp.int32)
        found, cache = run.apply(tokens, segment_ids=real, cache=run.model.cache(B, room))
        return {"logits": found[jnp.arange(B), lengths - 1], **named({**cache, "length": lengths})}

    def step(run: Run, given: Arrays) -> Arrays:
        cache = unflatten({name.removeprefix(CACHE): x for name, x in given.items() if name.startswith(CACHE)})
        found, cache = run.apply(given["tokens"][:, None], cache=cache)
        return {"logits": found[:, -1], **named(cache)}

    lengths = Input((BATCH,), least=1, below=(LENGTH, 1))
    token = dataclasses.replace(_ids(run), shape=(BATCH,))
    return {
        "logits": Function(logits, {"tokens": _ids(run)}),
        "start": Function(start, {"tokens": _ids(run), "lengths": lengths}),
        "step": Function(step, {"tokens": token, **_cache(run.model)}),
    }


def _cache(model: Model) -> dict[str, Input]:
    batch, length = cast("tuple[int, int]", jax.export.symbolic_shape(f"{BATCH}, {LENGTH}"))
    shapes = jax.eval_shape(lambda: named(model.cache(batch, length)))

    def one(name: str, leaf: jax.ShapeDtypeStruct) -> Input:
        dims = tuple(n if isinstance(n, int) else str(n) for n in leaf.shape)
        own = {"least": 1, "below": (LENGTH, 0)} if name == f"{CACHE}length" else {}
        return Input(dims, leaf.dtype.name, **own)

    return {name: one(name, leaf) for name, leaf in shapes.items()}


def named(cache: Any) -> Arrays:
    """A cache's arrays by their paths."""
    return {f"{CACHE}{path}": leaf for path, leaf in flatten(cache).items()}


def flatten(tree: Any) -> Arrays:
    """The arrays of nested dicts by their paths."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(key.key for key in path): leaf for path, leaf in leaves}


def unflatten(arrays: Arrays) -> dict[str, Any]:
    """Nested dicts from arrays by their paths."""
    found: dict[str, Any] = {}
    for name, leaf in arrays.items():
        *path, last = name.split("/")
        inner = found
        for key in path:
            inner = inner.setdefault(key, {})
        inner[last] = leaf
    return found


def example(inputs: Mapping[str, Input], most: int | None, cache: Arrays) -> Arrays:
    """Inputs of a probe, drawn with a fixed seed: two rows, of up to 64 tokens; a cache is given."""
    sizes = {BATCH: 2, LENGTH: min(64, most or 64), "gaps": 2}
    rng = np.random.default_rng(0)

    def one(name: str, want: Input) -> Any:
        if name in cache:
            return cache[name]
        shape = tuple(sizes[n] if isinstance(n, str) else n for n in want.shape)
        if want is MARKS:
            return np.ones(shape, np.int32)
        if want.dtype.startswith("float"):
            return rng.random(shape).astype(want.dtype)
        below = want.below if want.below is not None else 256
        below = min(sizes[below[0]] + below[1], sizes[BATCH] * 16 + 1) if isinstance(below, tuple) else below
        return rng.integers(want.least or 0, below, shape).astype(want.dtype)

    return {name: one(name, want) for name, want in inputs.items()}


def _transcribe(run: Run) -> Function:
    how = decoding(run)
    begin, ends = (jnp.asarray(how[name], jnp.int32) for name in ("start", "end"))
    refused = beam.refusals(run.model, how["never"], how["not_first"])

    def compute(run: Run, given: Arrays) -> Arrays:
        sounds = given["inputs"]
        limits = jnp.full(sounds.shape[:1], how["limit"])
        rest = (limits, begin, ends, jnp.float32(1), how["limit"], 1, refused)
        tokens, scores = beam.search(run.model, run.params["model"], sounds, None, *rest)
        return {"tokens": tokens, "scores": scores}

    return Function(compute, {"inputs": _sounds(run)})
