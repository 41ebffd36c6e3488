"""A multilayer perceptron: flattened inputs, hidden layers, one logit a class."""

from __future__ import annotations

import math
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmodels.fields import Dim, Dropped
from jaxmodels.models import layers
from jaxmodels.models.checks import check_shape
from jaxmodels.models.config import ModelConfig
from jaxmodels.models.families import register
from jaxmodels.models.inputs import image_inputs
from jaxmodels.models.model import Dtype, Family


@dataclass(frozen=True)
class MLPConfig(ModelConfig):
    """A multilayer perceptron; the defaults fit MNIST."""

    input_shape: tuple[Dim, ...] = (28, 28, 1)
    """Shape of one example; it is flattened."""
    classes: Dim = 10
    """Outputs."""
    hidden: tuple[Dim, ...] = (512, 512)
    """Units of each hidden layer."""
    dropout: Dropped = 0.0
    """Share of hidden units dropped while training."""
    dtype: Dtype = "float32"
    """Type of activations and products; parameters stay float32."""


class MLP(nn.Module):
    """Inputs (B, …) to logits (B, classes) in float32."""

    config: MLPConfig

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False, head: bool = True) -> jax.Array:
        c = self.config
        check_shape(x, c.input_shape)
        x = x.reshape(x.shape[0], math.prod(c.input_shape))
        he = nn.initializers.he_normal()
        for i, width in enumerate(c.hidden):
            axes = ("features", "mlp") if i == 0 else ("embed", "mlp")
            x = nn.relu(layers.Linear((width,), axes, initializer=he, dtype=c.dtype, name=f"hidden{i}")(x))
            x = layers.Dropout(c.dropout)(x, train)
        if not head:
            return x
        return layers.Linear((c.classes,), ("embed", "classes"), initializer=he, dtype=c.dtype, name="head")(x).astype(
            jnp.float32
        )


register(
    Family(
        name="mlp",
        config=MLPConfig,
        network=MLP,
        inputs=image_inputs,
        presets={"mlp-mnist": MLPConfig()},
    )
)
