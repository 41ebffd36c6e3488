"""The layers that families are built of; each says of its parameters what `parameters` asks for.

Parameters are float32; each layer casts its inputs and weights to its compute `dtype`. Normalization is computed in
float32. Dims: B batch, T tokens, D width, H heads, K head size, F hidden, V vocabulary, C channels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxmodels.errors import UserError
from jaxmodels.models import pipeline
from jaxmodels.models import remat as remats
from jaxmodels.models.adapted import Adapted, adapt, base_of, merged
from jaxmodels.models.coded import Coded, rows, taken, through
from jaxmodels.models.inner import INNER, with_hidden
from jaxmodels.models.kernels.convolution import convolve, overlap
from jaxmodels.models.kernels.dropout import drop
from jaxmodels.models.kernels.lookup import lookup
from jaxmodels.models.kernels.normalize import layer_norm, rms_norm
from jaxmodels.models.kernels.product import PRODUCT, product, weight_product
from jaxmodels.models.kernels.quantized import coded_product, kind_of, quantized_product
from jaxmodels.models.observed import matrix_rows, observe, patch_rows, unobserved
from jaxmodels.models.parameters import Init, contracted_dimensions, leaf, parameter, weight
from jaxmodels.parallel.rules import REPLICAS, constrain, gather

normal = nn.initializers.normal
zeros = nn.initializers.zeros
ones = nn.initializers.ones


class Linear(nn.Module):
    """x[..., inputs] · w[inputs, outputs] + b, over one or more contracted dimensions.

    `axes` names the dimensions of w: the contracted ones, then the outputs.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    bias: bool = True
    initializer: Init = normal(0.02)
    dtype: str = "float32"
    bias_initializer: Init = zeros
    before_stack: bool = False
    """Whether it comes before the stack of layers."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        contracted = contracted_dimensions(self, self.shape, self.axes, x.shape)
        inputs = x.shape[x.ndim - contracted :]
        given = leaf(self, "w", self.initializer, self.axes, inputs + self.shape, "matrix", self.before_stack)
        x, given = observe(x, given, functools.partial(matrix_rows, contracted), x.ndim - contracted)
        how, kind = (tuple(self.axes), contracted, self.dtype), kind_of(self.axes)
        multiply = weight_product()
        whole: Any = lambda w: multiply(x, w, *how) if kind is None else quantized_product(x, w, *how, kind)  # noqa: E731
        base = base_of(given)
        if isinstance(base, Coded) and base.activations:
            y: Any = coded_product(x, base, *how)
        else:
            y = through(whole, base, how[0], self.dtype)
        if isinstance(given, Adapted):
            ins, outs = (*self.axes[:contracted], None), (None, *self.axes[contracted:])
            down: Any = lambda a: multiply(x, a, ins, contracted, self.dtype)  # noqa: E731
            y = adapt(y, given, down, lambda h, b: multiply(h, b, outs, 1, self.dtype))
        y = checkpoint_name(y, PRODUCT)
        if self.bias:
            axes = self.axes[contracted:]
            b = parameter(self, "b", self.bias_initializer, axes, self.shape, "bias", self.before_stack)
            y = y + b.astype(self.dtype)
        return y


class Embed(nn.Module):
    """A table of vectors: `embed(ids)` looks up, `embed.logits(x)` multiplies by its transpose in float32."""

    count: int
    width: int
    axes: tuple[str, str] = ("vocab", "embed")
    initializer: Init = normal(0.02)
    dtype: str = "float32"
    before_stack: bool = False
    """Whether it comes before the stack of layers: an embedding of inputs does, an output layer does not."""

    def setup(self) -> None:
        shape = (self.count, self.width)
        given = leaf(self, "w", self.initializer, self.axes, shape, "embedding", self.before_stack)
        tables: Any = [(given, self.axes)]
        if isinstance(given, Adapted):
            a, b = (self.axes[0], None), (None, self.axes[1])
            tables = [(given.base, self.axes), (given.factors.a, a), (given.factors.scale * given.factors.b, b)]
        # what a product takes, whole along what fsdp cuts
        self.tables: Any = [taken(each, axes, self.dtype) for each, axes in tables]

    def __call__(self, ids: jax.Array) -> jax.Array:
        w, *factors = self.tables
        y = rows(w, ids).astype(self.dtype) if isinstance(w, Coded) else lookup(w, ids, self.axes)
        return y + lookup(factors[0], ids, (self.axes[0], None)) @ factors[1] if factors else y

    def logits(self, x: jax.Array) -> jax.Array:
        w, *factors = self.tables
        x = x.astype(self.dtype)
        outputs: Any = lambda w: jnp.einsum("...d,vd->...v", x, w, preferred_element_type=jnp.float32)  # noqa: E731
        y = through(outputs, w, self.axes, self.dtype)
        for a, b in [factors] if factors else []:
            y = y + jnp.einsum("...r,vr->...v", x @ b.T, a, preferred_element_type=jnp.float32)
        return y


class MLP(nn.Module):
    """down(activation(up(x))), or with `gated` down(activation(gate(x)) * up(x)) (Shazeer 2020)."""

    hidden: int
    activation: Callable[[jax.Array], jax.Array]
    gated: bool = False
    bias: bool = True
    dropout: float = 0.0
    """Share of hidden units dropped while training."""
    train: bool = False
    initializers: tuple[Init, Init] = (normal(0.02), normal(0.02))
    """Initializers of up (and gate) and of down."""
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        first, last = self.initializers

        def project(name: str) -> jax.Array:
            linear = Linear((self.hidden,), ("embed", "mlp"), self.bias, first, self.dtype, name=name)
            return shard(linear(x), "batch", "seq", "mlp")

        y = self.activation(project("gate")) * project("up") if self.gated else self.activation(project("up"))
        y = shard(Dropout(self.dropout)(y, self.train), "batch", "seq", "mlp")  # which pins its gradient too
        return Linear(x.shape[-1:], ("mlp", "embed"), self.bias, last, self.dtype, name="down")(y)


class Experts(nn.Module):
    """A weight matrix for each expert, w[expert, inputs, outputs]; `experts` multiplies by them."""

    shape: tuple[int, int, int]
    axes: tuple[str, str, str]
    initializer: Init = normal(0.02)

    @nn.compact
    def __call__(self) -> jax.Array:
        return parameter(self, "w", self.initializer, self.axes, self.shape, "matrix")


class LayerNorm(nn.Module):
    """Layer normalization over the last dimension."""

    eps: float = 1e-5
    bias: bool = True
    before_stack: bool = False
    """Whether it comes before the stack of layers."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        description: Any = (("norm",), x.shape[-1:], "norm", self.before_stack)
        scale = parameter(self, "scale", ones, *description)
        bias = parameter(self, "bias", zeros, *description) if self.bias else None
        return layer_norm(x, scale, bias, self.eps)


class RMSNorm(nn.Module):
    """Division by the root mean square over the last dimension."""

    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, parameter(self, "scale", ones, ("norm",), x.shape[-1:], "norm"), self.eps)


class Conv(nn.Module):
    """Convolution of (B, …, C) by w[window…, C_in / groups, C_out]; any number of spatial dimensions."""

    features: int
    window: tuple[int, ...] = (3, 3)
    strides: tuple[int, ...] | None = None
    padding: str | Sequence[tuple[int, int]] = "SAME"
    groups: int = 1
    bias: bool = True
    axes: tuple[str, str] = ("channels_in", "channels_out")
    """Logical axes of the channels; those of an image are ("features", "channels_out")."""
    initializer: Init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        spatial = len(self.window)
        axes = ("window",) * spatial + self.axes
        shape = (*self.window, x.shape[-1] // self.groups, self.features)
        given = leaf(self, "w", self.initializer, axes, shape, "matrix")
        if isinstance(given, Adapted) and self.groups > 1:
            given = merged(given, axes, "matrix")
        x, how = x.astype(self.dtype), (self.strides or (1,) * spatial, self.padding, self.groups)
        if self.groups == 1:
            patches = functools.partial(patch_rows, self.window, how[0], self.padding)
            x, given = observe(x, given, patches, 1)
        given = unobserved(given)
        convolved: Any = lambda w, names: convolve(x, gather(w.astype(self.dtype), names), *how)  # noqa: E731
        y: Any = through(lambda w: convolved(w, axes), base_of(given), axes, self.dtype)
        if isinstance(given, Adapted):
            down: Any = lambda a: convolved(a, (*axes[:-1], None))  # noqa: E731
            y = adapt(y, given, down, lambda h, b: product(h, b, (None, axes[-1]), 1, self.dtype))
        if self.bias:
            y = y + parameter(self, "b", zeros, axes[-1:], (self.features,), "bias").astype(self.dtype)
        return y


class ConvTranspose(nn.Module):
    """Transposed convolution: each place of x (B, …, C) adds its share of w[window…, C_in, C_out], `strides` apart.

    A dimension of n becomes (n - 1) · stride + window, less what `padding` cuts off at either end; "SAME" leaves
    n · stride. One product and shifted sums: the weights' gradient took five times as long by a dilated convolution on
    a CPU.
    """

    features: int
    window: tuple[int, ...] = (4, 4)
    strides: tuple[int, ...] = (2, 2)
    padding: str | Sequence[tuple[int, int]] = "SAME"
    bias: bool = True
    axes: tuple[str, str] = ("channels_in", "channels_out")
    initializer: Init = normal(0.02)
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        spatial = len(self.window)
        shape, axes = (*self.window, x.shape[-1], self.features), ("window",) * spatial + self.axes
        w = weight(self, "w", self.initializer, axes, shape, self.dtype, "matrix")
        y = jnp.tensordot(x.astype(self.dtype), w, ((-1,), (spatial,)))
        for i, (size, stride) in enumerate(zip(self.window, self.strides, strict=True)):
            if isinstance(self.padding, str):
                low = max(size - stride, 0) // 2
                cut = (low, size - stride - low)
            else:
                cut = self.padding[i]
            y = overlap(jnp.moveaxis(y, 1 + spatial, 2 + i), 1 + i, stride, cut)
        if self.bias:
            y = y + parameter(self, "b", zeros, axes[-1:], (self.features,), "bias").astype(self.dtype)
        return y


def max_pool(x: jax.Array, window: int, stride: int, padding: int = 0) -> jax.Array:
    """The maximum of each window of (B, H, W, C); like PyTorch's, it drops rows and columns that fill no window."""
    # maxima of slices, because the gradient of reduce_window took 3 to 10 times as long on a CPU
    for axis in (1, 2):
        if padding:
            around = [(0, 0, 0)] * x.ndim
            around[axis] = (padding, padding, 0)
            x = jax.lax.pad(x, jnp.array(-jnp.inf, x.dtype), around)
        reach = (x.shape[axis] - window) // stride * stride + 1
        x = functools.reduce(jnp.maximum, [jax.lax.slice_in_dim(x, i, i + reach, stride, axis) for i in range(window)])
    return x


class BatchNorm(nn.Module):
    """Normalization by statistics of the global batch, with running averages in the explicit `stats` tree.

    Source: Ioffe & Szegedy 2015. `momentum` is the share of the old average kept; running variance is unbiased, as
    in PyTorch.
    """

    momentum: float = 0.9
    eps: float = 1e-5
    initializer: Init = ones
    """Initializer of the scale."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        if not self.is_initializing() and not self.has_variable("stats", "mean"):
            raise UserError(
                "got no batch statistics for a model that has them, expected apply(..., stats=model.stats()), "
                "which gives (outputs, new statistics)"
            )
        width = x.shape[-1:]
        scale = parameter(self, "scale", self.initializer, ("norm",), width, "norm")
        bias = parameter(self, "bias", zeros, ("norm",), width, "norm")
        running_mean = self.variable("stats", "mean", jnp.zeros, width)
        running_var = self.variable("stats", "var", jnp.ones, width)
        y = x.astype(jnp.float32)
        if not train:
            mean, var = running_mean.value, running_var.value
            return ((y - mean) * (jax.lax.rsqrt(var + self.eps) * scale) + bias).astype(x.dtype)
        over = tuple(range(x.ndim - 1))
        count = math.prod(x.shape[:-1])
        try:
            count *= jax.lax.axis_size(REPLICAS)
            average = functools.partial(jax.lax.pmean, axis_name=REPLICAS)
        except NameError:  # without replicas, a mean is over the global batch already
            average = jnp.asarray
        # mean(y²) - mean² needs one pass, but cancels where the mean is large, even to below 0; so the mean of one
        # example is subtracted first. The result does not depend on that mean, so it needs no gradient
        near = jax.lax.stop_gradient(average(y[:1].mean(over)))
        y = y - near
        mean, square = average(y.mean(over)), average(jnp.square(y).mean(over))
        var = jnp.maximum(square - jnp.square(mean), 0)
        if not self.is_initializing():
            keep = self.momentum
            running_mean.value = keep * running_mean.value + (1 - keep) * (near + mean)
            running_var.value = keep * running_var.value + (1 - keep) * var * count / max(count - 1, 1)
        # y and not y - mean, so that the backward pass sums over y twice and no more
        factor = jax.lax.rsqrt(var + self.eps) * scale
        return (y * factor + (bias - mean * factor)).astype(x.dtype)


class FrozenNorm(nn.Module):
    """Batch normalization whose averages, scale and shift are constants, all in the `stats` tree."""

    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        constants = {"mean": jnp.zeros, "var": jnp.ones, "scale": jnp.ones, "bias": jnp.zeros}
        mean, var, scale, bias = (
            self.variable("stats", name, of, x.shape[-1:]).value for name, of in constants.items()
        )
        factor = jax.lax.rsqrt(var + self.eps) * scale
        return (x.astype(jnp.float32) * factor + (bias - mean * factor)).astype(x.dtype)


class Dropout(nn.Module):
    """Zero a share `rate` of x while training, and scale the rest to keep the mean."""

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        if not train or self.rate == 0.0:
            return x
        return drop(x, self.rate, self.make_rng("dropout"))


class StochasticDepth(nn.Module):
    """Drop a layer's residual branch for a share `rate` of the examples while training, and scale it for the others.

    The rate may be an array. Source: Huang et al. 2016, where it grows with the depth.
    """

    @nn.compact
    def __call__(self, x: jax.Array, rate: Any, train: bool) -> jax.Array:
        if not train or (isinstance(rate, float) and rate == 0.0):
            return x
        keep = jax.random.bernoulli(self.make_rng("dropout"), 1 - rate, (x.shape[0], *(1,) * (x.ndim - 1)))
        return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def scan_layers(block: type[nn.Module], layers: int, remat: str, unroll: int = 1) -> Callable[..., Any]:
    """`layers` blocks with stacked parameters: a scan, or a pipeline; a block maps (x, cache, *shared) to (x, outputs).

    `remat`: "none" keeps all activations, "dots" only the results of weight products, "full" only block inputs, and
    "offload" keeps those in the memory of the host.
    """
    kept = with_hidden(block, remat != "none")
    if remat != "none":
        named = remats.with_named_input(kept) if remat == "offload" else kept
        kept = nn.remat(named, policy=remats.policy(remat), prevent_cse=False)
    scanned = nn.scan(
        kept,
        variable_axes={"params": 0, "stats": 0, INNER: 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType]
        out_axes=0,
        length=layers,
        unroll=min(unroll, layers),
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return pipeline.staged(scanned, block, layers, remat, unroll)


@functools.partial(jax.checkpoint, prevent_cse=False)
def gelu(x: jax.Array) -> jax.Array:
    """The tanh form of GELU (Hendrycks & Gimpel 2016), as GPT-2 and BERT's first code use it.

    Written by the logistic function, (1 + tanh z) / 2 = sigmoid(2z), which XLA computes faster; the backward pass keeps
    x alone and computes the rest again, which costs less than the memory.
    """
    return x * jax.nn.sigmoid(2 * math.sqrt(2 / math.pi) * x * (1 + 0.044715 * x * x))


@functools.partial(jax.checkpoint, prevent_cse=False)
def exact_gelu(x: jax.Array) -> jax.Array:
    """GELU by the normal distribution's own function, x · Φ(x), as BERT and ViT are published with."""
    return jax.nn.gelu(x, approximate=False)


def shard(x: jax.Array, *names: str | None) -> jax.Array:
    """Pin an activation's dimensions to logical axes (no effect without a mesh)."""
    return constrain(x, names)
