"""A task's contract for its batches: shape, dtype, logical axes and bound of each array."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxmodels.errors import UserError
from jaxmodels.parallel import rules

IGNORED = -1
"""What stands in the place of a target or label that does not count, in no loss and no metric.

A batch says so in the array that is to be predicted, and not in a second one of its shape beside it: the two cannot
disagree, and only one is packed, sent to the devices and cut over the mesh. The losses make their weights of it. Whole
rows that do not count, whatever a task predicts of them, have the weight 0 in a batch's `weight` (B,).
"""


@dataclass(frozen=True)
class Places:
    """Where a language model reads a medium: in the places of a token of its texts."""

    token: int
    """The token's id."""
    count: Callable[[int], int]
    """How many places one takes; of a sound, by its samples."""


@dataclass(frozen=True)
class BatchField:
    """One array of a batch. Its first dimension is the batch's rows, which are sharded over the mesh."""

    shape: tuple[int, ...] | None
    """Shape of one example; None if it may vary."""
    dtype: Any = np.int32
    axes: rules.Names = ()
    """Logical axes of an example's dimensions, as in `parallel.rules` ("seq": a sequence's tokens). Without any, every
    device of a row holds the whole example."""
    below: int | None = None
    """Upper bound of the array's integers: the size of the vocabulary, or the number of classes."""
    stored: Any = None
    """The dtype in the data, if it differs: image bytes, which stand for [0, 1]."""
    optional: bool = False
    """Whether a batch may lack it."""
    usual: bool = False
    """Whether batches of real data have it although it is optional; a plan includes it then."""
    rate: int | None = None
    """Samples a second of a sound (N,)."""
    places: Places | None = None
    """Where a text has the image or the sound, if a model of texts reads it."""

    def rows(self, count: int, stored: bool = False) -> jax.ShapeDtypeStruct:
        """Return the array for this many examples, as the task computes with it or as it is stored."""
        dtype = self.dtype if self.stored is None or not stored else self.stored
        return jax.ShapeDtypeStruct((count, *(self.shape or ())), dtype)


Contract = Mapping[str, BatchField]
"""A batch's fields by name. A batch may have others, such as each row's `group`; only their rows are sharded."""


def texts(fields: Contract) -> list[str]:
    """Return the names of the fields that hold token ids: numbers below the size of a vocabulary, along a sequence.

    If the model does not say how large its vocabulary is, the first field along a sequence is taken.
    """
    along = [name for name, field in fields.items() if field.axes == ("seq",)]
    return [name for name in along if fields[name].below is not None] or along[:1]


def images(fields: Contract) -> list[str]:
    """Return the names of the fields that hold images (H, W, C)."""
    return [name for name, field in fields.items() if len(field.shape or ()) == 3]


def check_batch(fields: Contract, batch: Mapping[str, Any]) -> None:
    """Check a batch of the data against what the task takes; integers may stand for floats.

    Raises:
        UserError: a field is missing, or has another shape or kind of dtype.
    """
    for name, want in fields.items():
        if name not in batch:
            if want.optional:
                continue
            raise UserError(
                f"got batches of {', '.join(batch)}, expected a field {name!r}, try another --data or --task"
            )
        got = batch[name]
        kinds = (got.dtype.kind, np.dtype(want.dtype).kind)
        wrong = kinds[0] != kinds[1] and kinds not in (("u", "f"), ("i", "f"))
        if want.shape is None and want.axes and len(want.axes) != got.ndim - 1:
            raise UserError(
                f"got {name} of shape {got.shape} from the data, expected {len(want.axes)} dimensions behind the rows, "
                f"for the axes {want.axes} of the task's field"
            )
        if want.shape is not None and (got.shape[1:] != want.shape or wrong):
            expected = want.rows(got.shape[0])
            hint = "a model whose inputs have the data's shape"
            if name == "labels":
                several = "--task.multi-label True" if got.ndim == 2 else "without --task.multi-label"
                hint = several if got.ndim != len(expected.shape) else "another --data.label-field"
            raise UserError(
                f"got {name} of shape {got.shape} {got.dtype} from the data, expected {expected.shape} "
                f"{expected.dtype}, try {hint}"
            )


def check_lengths(fields: Contract, mesh_sizes: Mapping[str, int]) -> None:
    """Refuse sequences that the mesh cannot divide into equal parts.

    Raises:
        UserError: there is such a field.
    """
    axes = rules.rules_of(mesh_sizes)["residual"]
    parts = rules.shards(mesh_sizes, axes)
    for name, field in fields.items():
        for size in (n for n, axis in zip(field.shape or (), field.axes, strict=False) if axis == "seq" and n % parts):
            # twice as many parts, because each device of a causal ring holds two
            better = max(1, round(size / (2 * parts))) * 2 * parts
            raise UserError(
                f"got {name} of {size} tokens, expected a multiple of {parts} "
                f"(mesh {'*'.join(axes)} = {parts}), try --data.seq-len {better}"
            )
