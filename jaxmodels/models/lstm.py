"""Long short-term memory: stacked layers in one or both directions, as a language model or a classifier.

Hochreiter & Schmidhuber 1997, with forget gates (Gers et al. 2000); gates and order are PyTorch's, whose two biases are
one here, their sum. The language models are those of Zaremba et al. 2014.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmodels.errors import UserError
from jaxmodels.fields import Depth, Dim, Dropped
from jaxmodels.models import layers
from jaxmodels.models.config import ModelConfig
from jaxmodels.models.families import register
from jaxmodels.models.model import Dtype, Family, Params


@dataclass(frozen=True)
class LSTMConfig(ModelConfig):
    """An LSTM; the defaults are the medium language model of Zaremba et al. 2014."""

    vocab_size: Dim = 10000
    """Rows of the embedding, and of a language model's output layer, which is a matrix of its own (V)."""
    width: Dim = 650
    """Size of an embedding (D)."""
    hidden: Dim = 650
    """Units of a layer, in each direction (H)."""
    layers: Depth = 2
    """Layers, each on the outputs of the one before."""
    bidirectional: bool = False
    """A second LSTM in each layer that reads from the end; only for a classifier."""
    classes: Dim | None = None
    """Outputs of a classifier of whole sequences; None: a language model."""
    dropout: Dropped = 0.0
    """Share dropped of each layer's inputs and of the last one's outputs while training, never between time steps."""
    dtype: Dtype = "float32"
    """Type of activations and products; parameters, the cells' states and the sums of gates stay float32."""
    unroll: Depth = 1
    """Time steps unrolled in each iteration of the scan: above 1 compiles far longer and was no faster on a CPU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bidirectional and self.classes is None:
            raise UserError(
                "got bidirectional with classes None, a language model that sees the future, expected a classifier, "
                "try classes 2 or bidirectional False"
            )


class State(NamedTuple):
    """What passes from one time step to the next: outputs h in the compute type and cells c in float32, (B, H)."""

    h: jax.Array
    c: jax.Array


class Marks(NamedTuple):
    """Where tokens are, (T, B): `real` ones, and those that are `fresh`, the first of another segment."""

    real: jax.Array
    fresh: jax.Array

    @staticmethod
    def of(ids: jax.Array) -> Marks:
        """The marks of segment ids (T, B), 0 for padding; a first token goes on from the state it is given."""
        at = jnp.where(ids != 0, jnp.arange(len(ids))[:, None], -1)
        last = jnp.roll(jax.lax.cummax(at, axis=0), 1, axis=0).at[0].set(-1)  # where the token before is
        before = jnp.take_along_axis(ids, jnp.maximum(last, 0), axis=0)
        return Marks(ids != 0, (ids != 0) & (last >= 0) & (before != ids))


def cell(gates: jax.Array, c: jax.Array) -> tuple[jax.Array, jax.Array]:
    """New h and c (B, H) from the sums of gates (B, 4, H), in the order input, forget, candidate, output; float32."""
    i, f, g, o = jnp.moveaxis(gates, 1, 0)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def recur(w: jax.Array, inputs: jax.Array, state: State, marks: Marks | None, unroll: int) -> tuple[jax.Array, State]:
    """Outputs of all time steps and the last state; padding leaves the state as it is, a fresh token starts from 0.

    The backward pass makes the gradient of w as one product over all time steps; the transposed scan would add up one
    matrix at each.
    Shapes: w (H, 4, H), inputs (T, B, 4, H), returns outputs (T, B, H).
    """
    return _forward(w, inputs, state, marks, unroll)[0]


def _forward(w: Any, inputs: Any, state: State, marks: Marks | None, unroll: int) -> tuple[Any, Any]:
    def step(state: State, now: Any) -> tuple[State, Any]:
        x, marks = now
        start = State(*(_where(marks, "fresh", 0, part) for part in state))
        gates = x + jnp.einsum("bh,hgk->bgk", start.h, w, preferred_element_type=jnp.float32)
        h, c = cell(gates, start.c)
        new = State(h.astype(state.h.dtype), c)
        new = State(*(_where(marks, "real", *parts) for parts in zip(new, state, strict=True)))
        return new, (new.h, gates, start)

    last, (outputs, gates, starts) = jax.lax.scan(step, state, (inputs, marks), unroll=unroll)
    return (outputs, last), (w, jnp.zeros((), inputs.dtype), gates, starts, marks)


def _backward(unroll: int, kept: Any, gradients: tuple[jax.Array, State]) -> tuple[Any, Any, State, None]:
    w, like, gates, starts, marks = kept
    d_outputs, d_last = gradients

    def step(d: State, now: Any) -> tuple[State, jax.Array]:
        d_output, gates, c, marks = now
        d = State(d.h + d_output, d.c)
        _, pull = jax.vjp(cell, gates, c)
        d_gates, d_c = pull(tuple(_where(marks, "real", part, 0) for part in d))
        d_gates = d_gates.astype(w.dtype)
        d_h = jnp.einsum("bgk,hgk->bh", d_gates, w, preferred_element_type=jnp.float32)
        through = State(*(_where(marks, "fresh", 0, part) for part in (d_h, d_c)))
        if marks is not None:
            through = State(*(a + _where(marks, "real", 0, b) for a, b in zip(through, d, strict=True)))
        return through, d_gates

    start = State(d_last.h.astype(jnp.float32), d_last.c)
    d, d_gates = jax.lax.scan(step, start, (d_outputs, gates, starts.c, marks), reverse=True, unroll=unroll)
    d_w = jnp.einsum("tbh,tbgk->hgk", starts.h, d_gates, preferred_element_type=jnp.float32)
    return d_w.astype(w.dtype), d_gates.astype(like.dtype), State(d.h.astype(starts.h.dtype), d.c), None


recur.defvjp(_forward, _backward)


def _where(marks: Marks | None, name: str, chosen: Any, other: Any) -> Any:
    """`chosen` where a mark is set, else `other`; without marks all tokens are real and none is fresh."""
    if marks is None:
        return chosen if name == "real" else other
    return jnp.where(getattr(marks, name)[:, None], chosen, other)


def uniform(bound: float, draws: int = 1) -> layers.Init:
    """Uniform in ±bound; of several draws, their sum."""

    def initialize(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, (draws, *shape), dtype, -bound, bound).sum(0)

    return initialize


class Recurrent(nn.Module):
    """The matrix w[H, 4, H] from a step's outputs to the next one's gates."""

    hidden: int
    dtype: str

    @nn.compact
    def __call__(self) -> jax.Array:
        shape, axes = (self.hidden, 4, self.hidden), ("embed", "gates", "mlp")
        return layers.weight(self, "w", uniform(self.hidden**-0.5), axes, shape, self.dtype)


class Direction(nn.Module):
    """One LSTM on x (T, B, D), from the first or from the last time step: outputs (T, B, H) and the last state."""

    config: LSTMConfig
    reverse: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, ids: jax.Array | None, state: State | None) -> tuple[jax.Array, State]:
        c = self.config
        if self.reverse:
            x, ids = jnp.flip(x, 0), None if ids is None else jnp.flip(ids, 0)
        project = layers.Linear(
            (4, c.hidden),
            ("embed", "gates", "mlp"),
            initializer=uniform(c.hidden**-0.5),
            bias_initializer=uniform(c.hidden**-0.5, draws=2),  # PyTorch's two biases
            dtype=c.dtype,
            name="x",
        )
        inputs = layers.shard(project(x), "seq", "batch", None, "mlp")
        # whole over fsdp before the loop, which would gather it at each time step
        w = layers.shard(Recurrent(c.hidden, c.dtype, name="h")(), None, None, "mlp")
        if state is None:
            zeros = jnp.zeros((x.shape[1], c.hidden), jnp.float32)
            state = State(zeros.astype(c.dtype), zeros)
        found: Any = recur(w, inputs, state, None if ids is None else Marks.of(ids), c.unroll)
        y, last = found
        return jnp.flip(y, 0) if self.reverse else y, last


class Layer(nn.Module):
    """The directions of one layer, their outputs and last states side by side."""

    config: LSTMConfig

    @nn.compact
    def __call__(self, x: jax.Array, ids: jax.Array | None, state: State | None) -> tuple[jax.Array, State]:
        y, last = Direction(self.config, name="forward")(x, ids, state)
        if self.config.bidirectional:
            z, other = Direction(self.config, reverse=True, name="reverse")(x, ids, None)
            y = jnp.concatenate([y, z], -1)
            last = State(*(jnp.concatenate(parts, -1) for parts in zip(last, other, strict=True)))
        return layers.shard(y, "seq", "batch", None), last


class LSTM(nn.Module):
    """Tokens (B, T) to logits in float32: (B, T, V) of a language model, (B, classes) of a classifier.

    `head=False` gives a language model's features (B, T, H), or a classifier's last outputs (B, H or 2H). Positions are
    taken, as other language models take them, and mean nothing here.
    """

    config: LSTMConfig

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        cache: dict[str, Any] | None = None,
        train: bool = False,
        head: bool = True,
    ) -> Any:
        c = self.config
        drop = layers.Dropout(c.dropout)
        bound = uniform(c.hidden**-0.5)
        ids = None if segment_ids is None else segment_ids.T
        x = layers.Embed(c.vocab_size, c.width, initializer=bound, dtype=c.dtype, name="embed")(tokens)
        x = layers.shard(jnp.swapaxes(x, 0, 1), "seq", "batch", None)
        states = []
        for i in range(c.layers):
            before = None if cache is None else State(cache["h"][i], cache["c"][i])
            x, state = Layer(c, name=f"layer{i}")(drop(x, train), ids, before)
            states.append(state)
        if c.classes is not None:
            x = drop(states[-1].h, train)
            if not head:
                return x
            axes = ("embed", "classes")
            return layers.Linear((c.classes,), axes, initializer=bound, dtype=c.dtype, name="head")(x).astype(
                jnp.float32
            )
        output = layers.Embed(c.vocab_size, c.hidden, initializer=bound, dtype=c.dtype, name="head")
        x = layers.shard(jnp.swapaxes(drop(x, train), 0, 1), "batch", "seq", None)
        y = output.logits(x) if head else x
        if cache is None:
            return y
        h, cells = (jnp.stack(parts) for parts in zip(*states, strict=True))
        return y, {"h": h, "c": cells, "length": cache["length"] + tokens.shape[1]}


def empty_cache(config: LSTMConfig, batch: int, length: int) -> dict[str, jax.Array]:
    """States of all layers (L, B, H), whatever the length, and how many tokens went in."""
    _language_model(config)
    c = jnp.zeros((config.layers, batch, config.hidden), jnp.float32)
    return {"h": c.astype(config.dtype), "c": c, "length": jnp.zeros((), jnp.int32)}


def unembedding(config: LSTMConfig, params: Params) -> jax.Array:
    """The output layer (V, H)."""
    _language_model(config)
    return params["head"]["w"]


def _language_model(config: LSTMConfig) -> None:
    if config.classes is not None:
        raise UserError(
            f"got an LSTM with classes {config.classes}, expected a language model, "
            "try --task classification or classes None"
        )


medium = LSTMConfig(dropout=0.5)

register(
    Family(
        name="lstm",
        config=LSTMConfig,
        network=LSTM,
        inputs=lambda c, batch, length: (jax.ShapeDtypeStruct((batch, length), jnp.int32),),
        cache=empty_cache,
        unembedding=unembedding,
        presets={
            # Zaremba et al. 2014, section 4.1; their counts of 20M and 66M are those of Merity et al. 2017, table 1
            "lstm-medium": medium,
            "lstm-large": dataclasses.replace(medium, width=1500, hidden=1500, dropout=0.65),
            "lstm-sst2": LSTMConfig(
                vocab_size=8192, width=128, hidden=128, layers=1, bidirectional=True, classes=2, dropout=0.5
            ),
        },
    )
)
