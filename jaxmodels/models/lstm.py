"""Long short-term memory: stacked layers in one or both directions, as a language model or a classifier.

Hochreiter & Schmidhuber 1997, with forget gates (Gers et al. 2000); gates and order are PyTorch's, whose two biases are
one here, their sum. The language models are those of Zaremba et al. 2014.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmodels.errors import UserError
from jaxmodels.fields import Depth, Dim, Dropped
from jaxmodels.models import layers
from jaxmodels.models.config import ModelConfig
from jaxmodels.models.decoder import Body, Decoder
from jaxmodels.models.decoding import Context
from jaxmodels.models.families import register
from jaxmodels.models.inputs import token_inputs
from jaxmodels.models.model import Dtype, Family, Params


@dataclass(frozen=True)
class LSTMConfig(ModelConfig):
    """An LSTM; the defaults are the medium language model of Zaremba et al. 2014."""

    stacked: ClassVar[bool] = False

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
    """The state between time steps, (B, H): outputs h in the compute dtype and cells c in float32."""

    h: jax.Array
    c: jax.Array


class Marks(NamedTuple):
    """Masks over tokens, (T, B): `real` ones, and `fresh` ones, which begin another segment."""

    real: jax.Array
    fresh: jax.Array

    @staticmethod
    def of(ids: jax.Array) -> Marks:
        """The masks for segment ids (T, B), 0 for padding; the first token continues from the state it is given."""
        at = jnp.where(ids != 0, jnp.arange(ids.shape[0])[:, None], -1)
        last = jnp.roll(jax.lax.cummax(at, axis=0), 1, axis=0).at[0].set(-1)  # the index of the real token before
        before = jnp.take_along_axis(ids, jnp.maximum(last, 0), axis=0)
        return Marks(ids != 0, (ids != 0) & (last >= 0) & (before != ids))


def cell(gates: jax.Array, c: jax.Array) -> tuple[jax.Array, jax.Array]:
    """New h and c (B, H) from the sums of gates (B, 4, H), in the order input, forget, candidate, output; float32."""
    i, f, g, o = jnp.moveaxis(gates, 1, 0)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def recur(w: jax.Array, inputs: jax.Array, state: State, marks: Marks | None, unroll: int) -> tuple[jax.Array, State]:
    """Outputs of all time steps and the last state; padding keeps the state, and a fresh token starts from zeros.

    The backward pass computes the gradient of w as one product over all time steps, where the transposed scan would add
    a matrix at each.
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
    """`chosen` where a mask is set, else `other`; without masks all tokens are real and none is fresh."""
    if marks is None:
        return chosen if name == "real" else other
    return jnp.where(getattr(marks, name)[:, None], chosen, other)


def uniform(bound: float, draws: int = 1) -> layers.Init:
    """Uniform in ±bound; the sum of several draws."""

    def initialize(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, (draws, *shape), dtype, -bound, bound).sum(0)

    return initialize


class Recurrent(nn.Module):
    """The matrix w[H, 4, H] from one step's outputs to the next one's gates."""

    hidden: int
    dtype: str

    @nn.compact
    def __call__(self) -> jax.Array:
        shape, axes = (self.hidden, 4, self.hidden), ("embed", "gates", "mlp")
        return layers.weight(self, "w", uniform(self.hidden**-0.5), axes, shape, self.dtype, "matrix")


class Direction(nn.Module):
    """One direction of a layer, on x (T, B, D): outputs (T, B, H) and the last state."""

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
    """One layer in its one or two directions, whose outputs and last states are concatenated."""

    config: LSTMConfig

    @nn.compact
    def __call__(self, x: jax.Array, ids: jax.Array | None, state: State | None) -> tuple[jax.Array, State]:
        y, last = Direction(self.config, name="forward")(x, ids, state)
        if self.config.bidirectional:
            z, other = Direction(self.config, reverse=True, name="reverse")(x, ids, None)
            y = jnp.concatenate([y, z], -1)
            last = State(*(jnp.concatenate(parts, -1) for parts in zip(last, other, strict=True)))
        return layers.shard(y, "seq", "batch", None), last


def run_layers(
    c: LSTMConfig,
    drop: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    ids: jax.Array | None,
    cache: dict[str, Any] | None = None,
) -> tuple[jax.Array, list[State]]:
    """Embedded tokens (B, T, D) through all layers: the last one's outputs (T, B, H), and each one's last state."""
    ids, states = None if ids is None else ids.T, []
    x = layers.shard(jnp.swapaxes(x, 0, 1), "seq", "batch", None)
    for i in range(c.layers):
        before = None if cache is None else State(cache["h"][i], cache["c"][i])
        x, state = Layer(c, name=f"layer{i}")(drop(x), ids, before)
        states.append(state)
    return x, states


class LSTM(Decoder):
    """A language model. It takes positions, as other language models do, and ignores them."""

    config: LSTMConfig

    def token_embedding(self, name: str) -> layers.Embed:
        c = self.config
        width = c.width if name == "embed" else c.hidden
        bound, first = uniform(c.hidden**-0.5), name == "embed"
        return layers.Embed(c.vocab_size, width, initializer=bound, dtype=c.dtype, before_stack=first, name=name)

    def output(self, embed: layers.Embed) -> layers.Embed:
        return self.token_embedding("head")

    def enter(self, x: jax.Array, ctx: Context, train: bool) -> jax.Array:
        return x

    def body(self, x: jax.Array, ctx: Context, cache: dict[str, Any] | None, train: bool) -> Body:
        drop = functools.partial(layers.Dropout(self.config.dropout), train=train)
        x, states = run_layers(self.config, drop, x, ctx.segment_ids, cache)
        h, cells = (jnp.stack(parts) for parts in zip(*states, strict=True))
        return Body(layers.shard(jnp.swapaxes(drop(x), 0, 1), "batch", "seq", None), {"h": h, "c": cells})


class Classifier(nn.Module):
    """Tokens (B, T) to logits (B, classes) in float32, or with `head=False` to the last outputs (B, H or 2H)."""

    config: LSTMConfig

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        train: bool = False,
        head: bool = True,
    ) -> jax.Array:
        c, bound = self.config, uniform(self.config.hidden**-0.5)
        embed = layers.Embed(c.vocab_size, c.width, initializer=bound, dtype=c.dtype, before_stack=True, name="embed")
        drop = functools.partial(layers.Dropout(c.dropout), train=train)
        _, states = run_layers(c, drop, embed(tokens), segment_ids)
        x = drop(states[-1].h)
        if not head:
            return x
        axes = ("embed", "classes")
        y = layers.Linear((c.classes or 0,), axes, initializer=bound, dtype=c.dtype, name="head")(x)
        return y.astype(jnp.float32)


def empty_cache(config: LSTMConfig, batch: int, length: int) -> dict[str, jax.Array]:
    """States of all layers (L, B, H), whatever the length, and how many tokens each row has taken (B,)."""
    _language_model(config)
    c = jnp.zeros((config.layers, batch, config.hidden), jnp.float32)
    return {"h": c.astype(config.dtype), "c": c, "length": jnp.zeros((batch,), jnp.int32)}


def unembedding(config: LSTMConfig, params: Params) -> jax.Array:
    """The output layer (V, H)."""
    _language_model(config)
    return params["head"]["w"]


def _language_model(config: LSTMConfig) -> None:
    if config.classes is not None:
        raise UserError(
            f"got an LSTM with classes {config.classes}, expected a language model, "
            "try --model.classes None, or a --task of classes"
        )


medium = LSTMConfig(dropout=0.5)

register(
    Family(
        name="lstm",
        config=LSTMConfig,
        network=lambda c: LSTM(c) if c.classes is None else Classifier(c),
        inputs=token_inputs,
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
