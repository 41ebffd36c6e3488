"""Distillation: a frozen teacher gets the model's inputs, and the model learns its outputs beside the labels.

Dims: B rows, T tokens, D width, H heads, G heads of values, K head size, V vocabulary, N layers of the student and M of
the teacher.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.errors import UserError
from jaxmodels.fields import Positive, Section, Share, Weight
from jaxmodels.models.families import create
from jaxmodels.models.model import Dtype, Model
from jaxmodels.parallel import rules
from jaxmodels.tasks.losses import divergence, in_pieces, logits_of
from jaxmodels.tasks.task import Aux, Batch, ModelCall, Params, Task, forward

INNER = ("hidden", "attention", "relations")
"""What may be learned of a teacher besides its outputs."""


@dataclass(frozen=True)
class Distill(Section, section="distill"):
    """A frozen teacher whose outputs are learned beside the task's own labels."""

    teacher: str | None = None
    """Directory of a run, or of a model in Hugging Face's format, that teaches. None: no teacher."""
    alpha: Share = 0.5
    """Weight of the teacher's outputs; that of the task's own loss is 1 - alpha."""
    temperature: Positive = 2.0
    """T, by which the logits of both are divided; the divergence is multiplied by its square (Hinton et al. 2015)."""
    hidden: Weight = 0.0
    """Weight of the squared difference of what blocks give, paired with the teacher's that are as deep (TinyBERT, eq.
    8)."""
    attention: Weight = 0.0
    """Weight of the squared difference of the attention scores of paired blocks (TinyBERT, eq. 7)."""
    relations: Weight = 0.0
    """Weight of the divergences of the last block's attention, and of its values' relations (MiniLM, eq. 6 to 8)."""
    dtype: Dtype | None = None
    """Type of the teacher's products and of its matrices in memory. None: those of its own config, and float32."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher is None:
            own = type(self)
            if given := [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]:
                raise UserError(
                    f"got {own.section}.{given[0]} {getattr(self, given[0])} without distill.teacher, expected a "
                    "teacher, try --distill.teacher DIR"
                )
        elif not self.alpha and not self.inner:
            raise UserError(
                "got distill.alpha 0 and distill.hidden, attention and relations 0, expected something "
                "to learn of the teacher, try --distill.alpha 0.5"
            )

    @property
    def inner(self) -> dict[str, float]:
        """The weights above 0 of what is learned besides outputs."""
        return {name: weight for name in INNER if (weight := getattr(self, name))}


@dataclass(frozen=True)
class Teaching:
    """A teacher of a task's network, and what is learned of it."""

    section: Distill
    model: Model

    @staticmethod
    def of(section: Distill, config: Any) -> Teaching:
        """Make the teacher of a model's config."""
        wanted = section.dtype is not None and hasattr(config, "dtype")
        return Teaching(section, create(dataclasses.replace(config, dtype=section.dtype) if wanted else config))

    def plain(self) -> Teaching:
        """The same with the model whose FLOPs are counted."""
        return Teaching(self.section, create(self.model.config.plain()))

    def init(self, key: jax.Array) -> Params:
        """Initialize {"params": …, "stats": …} at random."""
        return {"params": self.stored(self.model.init(key)), "stats": self.model.stats()}

    def axes(self) -> Params:
        """Return the logical axes of each array of `init`."""
        nowhere = jax.tree.map(lambda x: (None,) * x.ndim, jax.eval_shape(self.model.stats))
        return {"params": self.model.axes(), "stats": nowhere}

    def stored(self, params: Params) -> Params:
        """Return parameters in the types in which they are held: of matrices and embeddings, that of products."""
        if self.section.dtype is None:
            return params
        to = jnp.dtype(self.section.dtype)
        return jax.tree.map(
            lambda axes, x: x.astype(to) if axes.kind in ("matrix", "embedding") else x,
            self.model.axes(),
            params,
            is_leaf=lambda x: isinstance(x, tuple),
        )

    def taught(self, task: Task) -> Task:
        """Return the task with the teacher's part in its loss; networks, metrics and batches stay as they are.

        Raises:
            UserError: the task's outputs cannot be compared with a teacher's, or those of the two models differ.
        """
        ask = task.ask
        if ask is None or len(task.losses) != 1:
            raise UserError(
                "got distill.teacher with a task whose outputs are not those of one network for labels or tokens, "
                "expected causal_lm, masked_lm, classification or seq2seq, try --distill.teacher None"
            )
        student = task.networks[task.losses[0].trains]
        check_outputs(self.section, student, self.model)
        return dataclasses.replace(
            task, losses=(dataclasses.replace(task.losses[0], fn=self.loss(student, ask)),), teacher=self.model
        )

    def loss(self, student: Model, ask: Any) -> Any:
        """Return the loss: (1 - alpha) of the task's own and alpha of the divergence, plus what is inside.

        All are sums over the same targets, so that they add up over microbatches and devices as one loss does.
        """
        section, teacher, inside = self.section, self.model, bool(self.section.inner)

        def loss(params: Params, stats: Params, batch: Batch, rng: jax.Array, step: Any = 0) -> tuple[jax.Array, Aux]:
            call: ModelCall = ask(batch, rng)
            how: dict[str, Any] = {**call.options, **({"keep": True} if inside else {})}
            extra = {"auxiliary": True} if student.auxiliary else {}
            own = {**how, **extra, "train": True, "rng": call.rng}
            out, stats = forward(("model", student), params, stats, *call.inputs, **own)
            frozen = params["teacher"]
            known = {"teacher": frozen["stats"]} if frozen["stats"] else {}
            theirs, _ = forward(("teacher", teacher), {"teacher": frozen["params"]}, known, *call.inputs, **how)
            out, mine = out if inside else (out, {})
            theirs, others = theirs if inside else (theirs, {})
            out, added = out if extra else (out, {})
            models = ((student, params["model"]), (teacher, frozen["params"]))
            scores, soft = compared(call, out, theirs, models, section.temperature)
            count = scores.count
            parts = {"hard": scores.objective, "soft": soft, **matched(section, call, mine, others)}
            weights = {"hard": 1 - section.alpha, "soft": section.alpha, **section.inner}
            total: Any = sum(weights[name] * value for name, value in parts.items())
            parts |= {name: count * value for name, value in added.items()}
            total = total + sum(count * value for value in added.values())
            sums = {"loss": total, "accuracy": scores.correct, **parts}
            return total, Aux(count, {name: (value, count) for name, value in sums.items()}, stats)

        return loss


def compared(call: ModelCall, out: Any, theirs: Any, models: Any, temperature: float) -> Any:
    """Return the student's scores, and the sum of its divergences from the teacher.

    Of features the logits are made a piece at a time, if there are many; the teacher's may have another width.
    """

    def both(targets: jax.Array, logits: jax.Array, others: jax.Array) -> Any:
        return call.score(logits, targets), divergence(logits, others, targets, temperature)

    if call.options.get("head", True):
        return both(call.targets, out, theirs)
    # float32, in which the gradient of the student's table adds up over pieces
    tables: Any = [rules.gather(model.unembedding(params), ("vocab", "embed")) for model, params in models]

    def piece(targets: jax.Array, *features: jax.Array) -> Any:
        return both(targets, *(logits_of(h, w.astype(h.dtype)) for h, w in zip(features, tables, strict=True)))

    return in_pieces(piece, tables[0].shape[0], call.targets, out, theirs)


def matched(
    section: Distill, call: ModelCall, mine: Mapping[str, Any], others: Mapping[str, Any]
) -> dict[str, jax.Array]:
    """Return the sums of what is learned inside: each row's mean over its tokens, as often as it has targets."""
    if not section.inner:
        return {}
    a, b = mine["layers"], others["layers"]
    targets = (call.targets >= 0).reshape(len(call.targets), -1).sum(-1)
    N, M = len(a["hidden"]), len(b["hidden"])
    at = pairs(N, M)
    tokens = a["hidden"].shape[1:3]
    real = jnp.ones(tokens, bool)
    if (segments := call.options.get("segment_ids")) is not None:
        real = segments > 0

    def rows(each: jax.Array, seen: jax.Array) -> jax.Array:
        """Sum the rows' means (B,) over what is seen, each weighted by how many targets the row has."""
        over = range(1, each.ndim)
        seen = jnp.broadcast_to(seen, each.shape)
        means = jnp.where(seen, each, 0).sum(over) / jnp.maximum(seen.sum(over), 1)
        return (targets * means).sum()

    found: dict[str, jax.Array] = {}
    if "hidden" in section.inner:
        x, y = (each.astype(jnp.float32) for each in (a["hidden"], b["hidden"][at]))
        found["hidden"] = rows(jnp.square(x - y).mean((0, -1)), real)
    if "attention" in section.inner:
        x, y = a["attn"]["scores"], b["attn"]["scores"][at]
        seen = jnp.isfinite(y)
        gaps = jnp.where(seen, x, 0) - jnp.where(seen, y, 0)
        found["attention"] = rows(jnp.square(gaps).mean((0, 2)), seen[0, :, 0] & real[..., None])
    if "relations" in section.inner:
        x, y = (each["attn"]["scores"][-1] for each in (a, b))
        seen = jnp.isfinite(y[:, :1])
        values = [each["attn"]["values"][-1].astype(jnp.float32) for each in (a, b)]
        v, w = (jnp.einsum("btgk,bsgk->bgts", v, v) * v.shape[-1] ** -0.5 for v in values)
        found["relations"] = rows(apart(x, y, seen).mean(1), real) + rows(apart(v, w, seen).mean(1), real)
    return found


def apart(x: jax.Array, y: jax.Array, seen: jax.Array) -> jax.Array:
    """Return KL(softmax(y) ‖ softmax(x)) over the last dimension of scores, of what is seen alone."""
    x, y = (jax.nn.log_softmax(jnp.where(seen, each, -1e30)) for each in (x, y))
    return jnp.where(seen, jnp.exp(y) * (y - x), 0).sum(-1)


def pairs(layers: int, others: int) -> np.ndarray:
    """Return the teacher's layer that is as deep as each of the student's; the last is paired with the last."""
    return np.arange(1, layers + 1) * others // layers - 1


def check_outputs(section: Distill, student: Model, teacher: Model) -> None:
    """Refuse a teacher whose inputs, outputs or inner states cannot be those of the student.

    Raises:
        UserError: names what differs.
    """
    ours, theirs = student.config, teacher.config
    for name, what in (("vocab_size", "vocabulary"), ("classes", "classes")):
        a, b = getattr(ours, name, None), getattr(theirs, name, None)
        if a is not None and b is not None and a != b:
            raise UserError(
                f"got distill.teacher {section.teacher} with model.{name} {b}, expected {a}, the {what} of the model, "
                f"try --model.{name.replace('_', '-')} {b} or another teacher"
            )
    a, b = ([x.shape for x in model.inputs(1)] for model in (student, teacher))
    if a != b:
        raise UserError(
            f"got distill.teacher {section.teacher} that takes inputs of shape {_shown(b)}, expected {_shown(a)} as of "
            "the model, try another teacher"
        )
    if not section.inner:
        return
    field, here, there = next(iter(section.inner)), *(_inner(model) for model in (student, teacher))
    if {*here} != {*there} or "layers/hidden" not in here:
        raise UserError(
            f"got distill.{field} with {type(ours).__name__} and the teacher's {type(theirs).__name__}, expected "
            f"one stack of blocks with attention in each, try --distill.{field} 0"
        )
    sizes = {"hidden": ("width", "layers/hidden", -1), "attention": ("heads", "layers/attn/scores", 2)}
    sizes["relations"] = sizes["attention"]
    checks = [(field, *sizes[field]) for field in section.inner]
    if "relations" in section.inner:
        checks.append(("relations", "kv_heads", "layers/attn/values", 3))
    for field, name, path, axis in checks:
        a, b = (found[path].shape[axis] for found in (here, there))
        if a != b:
            raise UserError(
                f"got distill.{field} with model.{name} {a} and the teacher's {b}, expected the same, "
                f"try --model.{name.replace('_', '-')} {b} or --distill.{field} 0"
            )
    N, M = (found["layers/hidden"].shape[0] for found in (here, there))
    if N > M and (paired := [name for name in section.inner if name != "relations"]):
        raise UserError(
            f"got distill.{paired[0]} with model.layers {N} and a teacher of {M} layers, expected no more than those, "
            f"try --model.layers {M}"
        )


def _inner(model: Model) -> dict[str, Any]:
    """Return the shapes of a model's inner states by their paths."""
    stats = jax.eval_shape(model.stats)

    def kept(params: Any, stats: Any, *inputs: Any) -> Any:
        found = model.apply(params, *inputs, keep=True, **({"stats": stats} if stats else {}))
        return (found[0] if stats else found)[1]

    tree = jax.eval_shape(kept, model.shapes(), stats, *model.inputs(1))
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _shown(shapes: Any) -> str:
    return " and ".join(str(shape[1:]) for shape in shapes)
