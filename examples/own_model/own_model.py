from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmodels import Family, register
from jaxmodels.fields import Depth, Dim
from jaxmodels.models import layers
from jaxmodels.models.config import ModelConfig


@dataclass(frozen=True)
class DenseConfig(ModelConfig):
    """A residual network of dense layers."""

    input_shape: tuple[Dim, ...] = (28, 28, 1)
    """Shape of one example; it is flattened."""
    classes: Dim = 10
    """Outputs."""
    width: Dim = 64
    """Hidden units."""
    depth: Depth = 2
    """Residual layers."""


class Dense(nn.Module):
    """Inputs (B, …) to logits (B, classes) in float32."""

    config: DenseConfig

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        c = self.config
        x = x.reshape(len(x), -1)
        x = layers.Linear((c.width,), ("features", "embed"), name="inputs")(x)
        for i in range(c.depth):
            x = x + nn.relu(layers.Linear((c.width,), ("embed", "mlp"), name=f"layer{i}")(x))
        return layers.Linear((c.classes,), ("embed", "classes"), name="head")(x).astype(jnp.float32)


register(
    Family(
        name="dense",
        config=DenseConfig,
        network=Dense,
        inputs=lambda c, batch, length: (jax.ShapeDtypeStruct((batch, *c.input_shape), jnp.float32),),
        presets={"dense-small": DenseConfig()},
    )
)
