"""The parts of a task: losses with their sums, and what it states about its models for other modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from jaxmodels.data.source import Source
from jaxmodels.tasks.losses import Scores

Params = dict[str, Any]
Batch = Mapping[str, jax.Array]
"""Fields by name. `weight` (B,), if present, is 0 for a row that does not count, such as padding."""
Better = Literal["min", "max"]
Sums = dict[str, tuple[jax.Array, jax.Array]]
"""Metric -> (sum, count): added over batches and devices, divided once at the end. A sum may be an array."""
Totals = Mapping[str, tuple[Any, float]]
"""Sums over a whole set, in double precision on the host."""


class Aux(NamedTuple):
    """What a loss returns besides its sum."""

    weight: jax.Array
    """What the sum is divided by to give the loss: the number of tokens or examples."""
    sums: Sums
    stats: Params
    """The networks' batch statistics after this batch."""


@dataclass(frozen=True)
class Loss:
    """One loss and the network it trains: `fn(params, stats, batch, rng, step) -> (sum over the batch, Aux)`.

    Sums rather than means, so that microbatches, devices and padded rows add up to the loss of the whole batch.
    """

    name: str
    trains: str
    fn: Callable[..., tuple[jax.Array, Aux]]
    updates: int = 1
    """How many times a step updates the network, each time on its own share of the batch."""
    compares: bool = False
    """Whether examples of a batch are compared with each other, so that microbatches compute another loss."""


class ModelCall(NamedTuple):
    """What a loss feeds its network for a batch, and how it scores the output; a teacher is fed the same."""

    inputs: tuple[Any, ...]
    """What the network is applied to, such as a text in which tokens are masked."""
    options: dict[str, Any]
    """Keywords beside it; with `head=False` the answer is features (B, T, D), and logits otherwise."""
    targets: jax.Array
    """(B,), or (B, T) of a text; what is below 0 does not count. (B, classes) where classes are independent."""
    score: Callable[[jax.Array, jax.Array], Scores]
    """`score(logits, targets)`: the sums over both."""
    rng: jax.Array | None = None
    """The key of the network's dropout."""


class Whole(NamedTuple):
    """Metrics that compare each example with all others of a set, so that they are not sums over batches."""

    keep: Callable[[Params, Params, Batch], dict[str, jax.Array]]
    """`keep(params, stats, batch)`: what is kept of each example, arrays (B, …)."""
    sums: Callable[[Mapping[str, np.ndarray], Source], dict[str, tuple[Any, float]]]
    """`sums(kept, source)`: the metrics' sums from what was kept of all examples, and the source that they are of, for
    what is no array, such as texts."""
    names: tuple[str, ...] = ()
    """Metrics that `Task.metrics` does not have, since they are of no single batch."""


class Autoencoder(NamedTuple):
    """How an autoencoder's inputs and outputs relate to images."""

    seen: Callable[[jax.Array], jax.Array]
    """Convert images in [0, 1] to those that the model is given, in [0, 1]."""
    shown: Callable[[jax.Array], jax.Array]
    """Convert the decoder's outputs to images in [0, 1]."""


class Sounds(NamedTuple):
    """How a model of sounds draws them."""

    draw: Callable[..., jax.Array]
    """`draw(params, conditions=None, count=1, length=8000, temperature=1.0, seed=0)`: µ-law codes (B, length)."""
    rate: int
    """Samples a second."""
    conditions: tuple[tuple[str, int], ...] = ()
    """What each sound is conditioned on: "label" or "group", and how many values it has."""
