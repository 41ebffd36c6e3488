"""Model FLOPs of a training step, counted from the losses and their gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
from jax.interpreters import partial_eval

from jaxmodels import tasks
from jaxmodels.data.section import DataConfig
from jaxmodels.models.adapted import join
from jaxmodels.models.flops import products
from jaxmodels.models.kernels.visibility import Mask
from jaxmodels.tasks import losses
from jaxmodels.tasks.task import Task, TaskConfig


class Step(NamedTuple):
    """Model FLOPs of a training step."""

    model: int
    """Counting attention in full, causal or not; with a window, only the window. Source: Chowdhery et al. 2022,
    appendix B."""
    visible: int
    """Counting what must be computed: in attention, only the pairs that its masks show."""
    attention: int
    """The part of `model` that is attention."""


class Divides(Protocol):
    """What divides the parameters of a task's networks into frozen and trained ones."""

    def shapes(self) -> tuple[Any, Any]:
        """The shapes of frozen and of trained parameters."""
        ...


def per_step(
    section: TaskConfig,
    model: Any,
    data: DataConfig,
    adapter: Divides | None = None,
    taught: Callable[[Task], Task] | None = None,
) -> Step:
    """Count the model FLOPs of a training step: each loss and its gradient, without what neither needs.

    A language model's step is three times `flops.forward`; a model of images needs no gradient of its pixels, and one
    with an adapter none of its frozen parameters. `taught` adds a teacher to the task, whose forward pass counts.
    """
    task = tasks.build(section, model.plain(), data)
    task = task if taught is None else taught(task)
    every = {name: network.shapes() for name, network in task.networks.items()}
    frozen, params = ({}, every) if adapter is None else adapter.shapes()
    if task.teacher is not None:
        teacher = {"params": task.teacher.shapes(), "stats": jax.eval_shape(task.teacher.stats)}
        frozen = {**frozen, "teacher": teacher}
    stats, batch = jax.eval_shape(task.stats), task.batch_spec(data.batch_size)
    found: list[tuple[float, Mask | None]] = []
    for loss in task.losses:

        def gradient(params: Any, frozen: Any, stats: Any, batch: Any, loss: Any = loss) -> Any:
            def total(trained: Any) -> Any:
                whole = join(frozen, {**params, loss.trains: trained})
                return loss.fn(whole, stats, batch, jax.random.key(0), jax.numpy.int32(0))

            return jax.grad(total, has_aux=True)(params[loss.trains])

        with losses.whole():
            jaxpr = jax.make_jaxpr(gradient)(params, frozen, stats, batch).jaxpr
        needed, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
        found += products(needed)
    attention = [(flops, mask) for flops, mask in found if mask is not None]
    rest = sum(flops for flops, mask in found if mask is None)
    full, visible = (
        sum(flops * share(mask) for flops, mask in attention) for share in (lambda m: m.band, lambda m: m.share)
    )
    return Step(round(rest + full), round(rest + visible), round(full))
