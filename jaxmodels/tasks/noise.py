"""Adding noise to images, and removing it again: diffusion, and the straight paths of flow matching.

Everywhere x = signal · image + noise · ε, with ε standard normal. Time goes from 0, the image, to `steps`, the noise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

Objective = Literal["epsilon", "v", "flow"]
Schedule = Literal["linear", "cosine"]
Predict = Callable[[jax.Array, jax.Array], jax.Array]
"""(x (B, H, W, C), timesteps (B,) of the network) -> what it predicts."""


@dataclass(frozen=True)
class Process:
    """A path from images to noise, and what a network predicts on it.

    epsilon: the noise (Ho et al. 2020); v: noise less image, weighted to the derivative along the angle between them
    (Salimans & Ho 2022); flow: noise less image, on a straight line (Liu et al. 2022).
    """

    objective: Objective
    schedule: Schedule = "linear"
    """Variances of diffusion from 1e-4 to 0.02 (Ho et al. 2020), or by a squared cosine (Nichol & Dhariwal 2021)."""
    steps: int = 1000

    @functools.cached_property
    def signals(self) -> np.ndarray:
        """The share of the image's variance at each time of diffusion, (steps + 1,)."""
        if self.schedule == "cosine":
            level = np.cos((np.arange(self.steps + 1) / self.steps + 0.008) / 1.008 * np.pi / 2) ** 2
            kept = np.maximum(level[1:] / level[:-1], 1 - 0.999)
        else:
            kept = 1 - np.linspace(1e-4, 0.02, self.steps)
        return np.concatenate([[1.0], np.cumprod(kept)])

    def level(self, time: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the factors of image and noise at times (…)."""
        if self.objective == "flow":
            return 1 - time / self.steps, time / self.steps
        factors = (jnp.asarray(np.sqrt(x), jnp.float32) for x in (self.signals, 1 - self.signals))
        signal, noise = (x[time.astype(int)] for x in factors)
        return signal, noise

    def timestep(self, time: jax.Array) -> jax.Array:
        """Convert times to the network's timesteps: those of diffusion begin with 0, and both end near 1000."""
        return time.astype(jnp.float32) * (1000 / self.steps) if self.objective == "flow" else time - 1.0

    def time(self, share: jax.Array) -> jax.Array:
        """Return the time of a share in [0, 1) of the path, at which a network can be trained."""
        return share * self.steps if self.objective == "flow" else jnp.floor(share * self.steps) + 1

    def grid(self, count: int) -> jax.Array:
        """Return the times of `count` steps of sampling, (count + 1,), from noise to image."""
        times = self.steps * np.arange(count, -1, -1) / count
        return jnp.asarray(times if self.objective == "flow" else times.round(), jnp.float32)

    def mix(self, images: jax.Array, noise: jax.Array, time: jax.Array) -> jax.Array:
        """Return the mixtures of images and noise (B, …) at times (B,)."""
        a, s = (_beside(x, images) for x in self.level(time))
        return a * images + s * noise

    def target(self, images: jax.Array, noise: jax.Array, time: jax.Array) -> jax.Array:
        """Return what a network should predict of the mixture."""
        if self.objective == "epsilon":
            return noise
        a, s = (1, 1) if self.objective == "flow" else (_beside(x, images) for x in self.level(time))
        return a * noise - s * images

    def parts(self, found: jax.Array, x: jax.Array, time: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the image and the noise that a prediction for x at this time implies."""
        a, s = self.level(time)
        if self.objective == "epsilon":
            return (x - s * found) / a, found
        if self.objective == "flow":
            return x - s * found, x + a * found
        return a * x - s * found, s * x + a * found

    def step(
        self, found: jax.Array, x: jax.Array, time: jax.Array, after: jax.Array, eta: float, drawn: jax.Array
    ) -> jax.Array:
        """Return x at the time `after`, given a prediction for x at an earlier one, and noise for `eta`.

        The image found is mixed with the noise found, of which `eta` lets noise that is drawn take a part. With 0 this
        is DDIM (Song et al. 2021, equation 12), or Euler's method where the path is straight; with 1 the ancestral
        sampling of DDPM. Diffusion's images are kept in [-1, 1].
        """
        image, noise = self.parts(found, x, time)
        (a, s), (a2, s2) = self.level(time), self.level(after)
        if self.objective != "flow":
            image = jnp.clip(image, -1, 1)
            noise = (x - a * image) / s
        new = eta * s2 / s * jnp.sqrt(jnp.maximum(1 - jnp.square(a / a2), 0)) if eta else 0.0
        return a2 * image + jnp.sqrt(jnp.maximum(jnp.square(s2) - jnp.square(new), 0)) * noise + new * drawn

    def sample(
        self, predict: Predict, x: jax.Array, key: jax.Array, count: int, eta: float = 0.0, kept: bool = False
    ) -> Any:
        """Turn noise x (B, …) into images in `count` steps; with `kept`, return the states of all, (count, B, …)."""

        def one(x: jax.Array, now: Any) -> tuple[jax.Array, jax.Array | None]:
            time, after, key = now
            found = predict(x, jnp.broadcast_to(self.timestep(time), x.shape[:1]))
            drawn = jax.random.normal(key, x.shape) if eta else x
            x = self.step(found, x, time, after, eta, drawn)
            return x, x if kept else None

        times = self.grid(count)
        x, path = jax.lax.scan(one, x, (times[:-1], times[1:], jax.random.split(key, count)))
        return path if kept else x


def guided(predict: Callable[..., jax.Array], scale: float) -> Callable[..., jax.Array]:
    """Move predictions away from the unconditional ones, by classifier-free guidance (Ho & Salimans 2022).

    `predict(x, times, conditional)` gets a boolean for each row. A scale of 1 changes nothing.
    """

    def both(x: jax.Array, times: jax.Array) -> jax.Array:
        B = x.shape[0]
        if scale == 1:
            return predict(x, times, jnp.ones(B, bool))
        found = predict(*(jnp.concatenate([each, each]) for each in (x, times)), jnp.arange(2 * B) < B)
        conditional, unconditional = found[:B], found[B:]
        return unconditional + scale * (conditional - unconditional)

    return both


def _beside(x: jax.Array, like: jax.Array) -> jax.Array:
    return x.reshape(-1, *(1,) * (like.ndim - 1))
