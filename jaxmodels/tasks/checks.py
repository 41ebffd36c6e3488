"""What a task's class gives, checked when it is built and, for its functions, when they are traced."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import partial_eval

from jaxmodels.data.contract import BatchField
from jaxmodels.errors import UserError, nearest
from jaxmodels.fields import described, shown
from jaxmodels.models.model import Model
from jaxmodels.parallel import rules
from jaxmodels.registry import function_of, named
from jaxmodels.tasks.task import Answers, Aux, Loss, Task, TaskConfig

_NUMBERS = (jax.Array, np.ndarray, np.number, int, float)
_SUMS = "{'loss': (sum, count), …}"
_LOSS = "(sum over the batch, Aux(weight, sums, stats))"
_OF_A_LOSS = ("params", "stats", "batch", "rng", "step")
_ARGUMENTS = {
    "metrics": ("params", "stats", "batch"),
    "summarize": ("totals", "classes"),
    "samples": ("params", "stats", "count", "seed"),
    "path": ("params", "stats", "count", "seed"),
    "predicts": ("params", "stats", "batch"),
    "outputs": ("params", "stats", "batch"),
    "ask": ("batch", "rng"),
}
"""What each function of a task is called with."""


def checked(made: Any, config: TaskConfig) -> Task:
    """Return the task that `config.build` gave, with functions that refuse results of another form when traced.

    Raises:
        UserError: it is no task, or its parts do not fit together.
    """
    what, known = f"task {named(type(config))}", get_args(Answers)
    if config.answers not in known:
        raise UserError(
            f"got {what}, whose answers is {shown(config.answers)}, expected one of {', '.join(filter(None, known))}"
            f"{nearest(str(config.answers), known)}, or '' and Task.predicts for what it says itself"
        )
    if wrong := _wrong(made):
        raise UserError(f"got {what}, whose build {wrong}")

    def losses(loss: Loss) -> Loss:
        def check(found: Any, params: Any, stats: Any, *rest: Any) -> Any:
            if wrong := _wrong_loss(found, stats):
                raise UserError(f"got {what}, whose loss {loss.name!r} gives {wrong}")
            return found

        return dataclasses.replace(loss, fn=_then(loss.fn, check))

    def sums(found: Any, *given: Any) -> Any:
        return check_sums(found, what)

    def metrics(found: Any, *given: Any) -> Any:
        if not _by_name(found) or any(map(_no_number, found.values())) or "loss" not in found:
            raise UserError(
                f"got {what}, whose summarize gives {shown(found)}, expected numbers by name, the loss among them"
            )
        return found

    def predictions(found: Any, params: Any, stats: Any, batch: Any) -> Any:
        rows = next(iter(batch.values())).shape[0]  # which may stand for any number of them
        if not _by_name(found) or not found or not all(_is_of_rows(x, rows) for x in found.values()):
            raise UserError(
                f"got {what}, whose predicts gives {described(found)}, expected arrays of real numbers by name, each "
                f"of {rows} rows"
            )
        return found

    def outputs(found: Any, *given: Any) -> Any:
        if not (leaves := jax.tree.leaves(found)) or not all(hasattr(x, "shape") for x in leaves):
            raise UserError(f"got {what}, whose outputs gives {described(found)}, expected arrays, try its logits")
        return found

    def images(found: Any, *given: Any) -> Any:
        if len(getattr(found, "shape", ())) != 4:
            raise UserError(
                f"got {what}, whose samples gives {described(found)}, expected images (count, height, width, channels) "
                "in [0, 1]"
            )
        return found

    whole, predicts = made.whole, made.predicts
    return dataclasses.replace(
        made,
        losses=tuple(map(losses, made.losses)),
        metrics=_then(made.metrics, sums),
        summarize=_then(made.summarize, metrics),
        whole=None if whole is None else whole._replace(sums=_then(whole.sums, sums)),
        predicts=None if predicts is None else _then(predicts, predictions),
        outputs=None if made.outputs is None else _then(made.outputs, outputs),
        samples=None if made.samples is None else _then(made.samples, images),
    )


def check_sums(found: Any, what: str) -> Any:
    """Return the sums that a task's metrics are, if that is what they are.

    Raises:
        UserError: they are not named, one is not (sum, count), or there is no loss among them.
    """
    if not _by_name(found):
        raise UserError(f"got metrics of {what} as {described(found)}, expected {_SUMS}")
    for name, pair in found.items():
        parts = pair if isinstance(pair, tuple | list) else ()
        if len(parts) != 2 or not all(isinstance(x, _NUMBERS) for x in parts) or np.size(parts[1]) != 1:
            raise UserError(
                f"got metric {name!r} of {what} as {described(pair)}, expected its sum and its count, try {_SUMS}"
            )
    if "loss" not in found:
        raise UserError(f"got metrics {', '.join(map(str, found)) or '{}'} of {what}, expected a loss too, try {_SUMS}")
    return found


def check_padding(task: Task, batch: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    """Refuse metrics that count the rows of weight 0, which fill up the last batch of an evaluation.

    Raises:
        UserError: a metric depends on the batch, but its sum or its count does not depend on which rows count.
    """
    params, stats = ({name: model.shapes() for name, model in task.networks.items()}, jax.eval_shape(task.stats))
    rows = jax.ShapeDtypeStruct(next(iter(batch.values())).shape[:1], jnp.float32)
    names: list[str] = []

    def sums(weight: Any, batch: Any, params: Any, stats: Any) -> list[tuple[Any, Any]]:
        found = task.metrics(params, stats, {**batch, "weight": weight})
        names[:] = found
        return [(jnp.asarray(total), jnp.asarray(count)) for total, count in found.values()]

    traced: Any = jax.make_jaxpr(sums)(rows, dict(batch), params, stats)
    jaxpr, used = getattr(traced, "jaxpr", traced), []
    for index in range(len(jaxpr.outvars)):
        needed = partial_eval.dce_jaxpr(jaxpr, [index == i for i in range(len(jaxpr.outvars))])[1]
        used.append((needed[0], any(needed[: 1 + len(batch)])))
    for name, total, count in zip(names, used[::2], used[1::2], strict=True):
        if (total[1] or count[1]) and not (total[0] and count[0]):
            raise UserError(
                f"got metric {name!r} of a task from outside, which also counts the rows of weight 0 that fill up the "
                "last batch, expected a sum and a count without them, try counts = jaxmodels.tasks.task.rows(batch), "
                "then (counts * each).sum() and counts.sum()"
            )


def _by_name(found: Any) -> bool:
    return isinstance(found, Mapping) and all(isinstance(name, str) for name in found)


def _is_of_rows(found: Any, rows: Any) -> bool:
    """Whether something is an array of real numbers or booleans, of so many rows."""
    if getattr(found, "shape", ())[:1] != (rows,):
        return False
    return found.dtype == np.bool_ or not jnp.issubdtype(found.dtype, jnp.complexfloating)


def _then(function: Callable[..., Any], check: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with its result given to `check`, and its arguments."""

    @functools.wraps(function)
    def both(*args: Any, **kwargs: Any) -> Any:
        return check(function(*args, **kwargs), *args)

    return both


def _wrong(made: Any) -> str:
    """Say what is wrong with a task's parts; empty if they fit together."""
    if not isinstance(made, Task):
        return f"gives {shown(made)}, expected a Task, try return Task({{'model': model}}, losses, metrics, fields)"
    networks, losses = made.networks, made.losses
    if not (isinstance(networks, Mapping) and networks and all(isinstance(x, Model) for x in networks.values())):
        return f"gives networks {shown(networks)}, expected models by name, try {{'model': model}}"
    if not (isinstance(losses, tuple | list) and losses and all(isinstance(x, Loss) for x in losses)):
        return f"gives losses {shown(losses)}, expected a tuple of Loss, try (Loss('loss', 'model', function),)"
    names = [loss.name for loss in losses]
    for loss in losses:
        if names.count(loss.name) > 1:
            return f"gives two losses {loss.name!r}, expected names that differ"
        if loss.trains not in networks:
            return f"gives a loss that trains {loss.trains!r}, expected one of {', '.join(networks)}"
        if type(loss.updates) is not int or loss.updates < 1:
            return f"gives a loss with updates {shown(loss.updates)}, expected a whole number from 1 on"
    for name, arguments in _ARGUMENTS.items():
        function, optional = getattr(made, name), name not in ("metrics", "summarize")
        if not (optional and function is None) and (wrong := function_of(*arguments)(function)):
            return f"gives {name}, {wrong}"
    for loss in losses:
        if wrong := function_of(*_OF_A_LOSS)(loss.fn):
            return f"gives loss {loss.name!r}, {wrong}"
    if not isinstance(made.fields, Mapping) or not made.fields:
        return f"gives fields {shown(made.fields)}, expected a BatchField by the name of each array of a batch"
    for name, field in made.fields.items():
        if wrong := _wrong_field(field):
            return f"gives a field {name!r} {wrong}"
    if made.unit not in ("tokens", "examples"):
        return f"gives unit {shown(made.unit)}, expected tokens or examples"
    return ""


def _wrong_field(field: Any) -> str:
    if not isinstance(field, BatchField):
        return f"that is {shown(field)}, expected a BatchField"
    shape, axes = field.shape, field.axes
    if shape is not None and not (isinstance(shape, tuple) and all(type(n) is int and n > 0 for n in shape)):
        return f"of shape {shown(shape)}, expected a tuple of whole numbers, those of one example, or None"
    for dtype in (field.dtype, *([] if field.stored is None else [field.stored])):
        try:
            number = jnp.issubdtype(np.dtype(dtype), np.number) or np.dtype(dtype) == np.bool_
        except TypeError:
            number = False
        if dtype is None or not number:
            return f"of dtype {shown(dtype)}, expected that of numbers, try np.float32 or np.int32"
    known = [*rules.RULES]
    if not isinstance(axes, tuple) or (axes and shape is not None and len(axes) != len(shape)):
        return (
            f"of shape {shape} with the axes {shown(axes)}, expected a tuple of one for each dimension of an example, "
            "without that of the rows, or ()"
        )
    if odd := [axis for axis in axes if axis is not None and axis not in known]:
        return f"with the axis {odd[0]!r}, expected one of {', '.join(known)}{nearest(str(odd[0]), known)}, or None"
    return ""


def _wrong_loss(found: Any, stats: Any) -> str:
    """Say what is wrong with a loss's result, given the statistics that it was called with; empty if nothing is."""
    if not isinstance(found, tuple) or len(found) != 2 or not isinstance(found[1], Aux):
        return f"{described(found)}, expected {_LOSS}"
    total, aux = found
    if wrong := _no_number(total, floating=True):
        return f"{wrong} as its sum, expected a single float, try .sum()"
    if wrong := _no_number(aux.weight):
        return f"{wrong} as its weight, expected a single number, such as how many examples count"
    if not isinstance(aux.sums, Mapping):
        return f"{described(aux.sums)} as its sums, expected {_SUMS}"
    for name, pair in aux.sums.items():
        parts: Sequence[Any] = pair if isinstance(pair, tuple | list) else ()
        wrong = next(filter(None, map(_no_number, parts)), "")
        if len(parts) != 2 or wrong:
            return f"{wrong or described(pair)} as {name!r}, expected its sum and its count, try {_SUMS}"
    given, kept = ({p: (x.shape, x.dtype) for p, x in jax.tree.leaves_with_path(tree)} for tree in (stats, aux.stats))
    if given != kept:
        return (
            f"statistics that differ from those given in {_first_difference(given, kept)}, expected all of them, try "
            "Aux(…, stats) with the stats that forward returns"
        )
    return ""


def _no_number(value: Any, floating: bool = False) -> str:
    if not isinstance(value, _NUMBERS) or isinstance(value, bool) or np.shape(value):
        return described(value)
    return described(value) if floating and not jnp.issubdtype(jnp.result_type(value), jnp.floating) else ""


def _first_difference(a: Mapping[Any, Any], b: Mapping[Any, Any]) -> str:
    path = next(path for path in [*a, *b] if a.get(path) != b.get(path))
    return jax.tree_util.keystr(path, simple=True, separator="/")
