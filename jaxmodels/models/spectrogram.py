"""Log-mel frames of sounds, computed where the model is.

On the device, so that a batch is the waveform whatever a model makes of it: 16-bit samples, half the bytes of the
frames. Dims: B sounds, N samples, T frames, M mel bands.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

WINDOW, HOP = 0.025, 0.010
"""Seconds that a frame sees, and from one frame to the next."""
_LINEAR, _PER_MEL = 1000.0, 200 / 3
"""Below this frequency, in Hz, the mel scale of Slaney's toolbox is linear, at so many Hz a mel."""
_PER_LOG = np.log(6.4) / 27
_FLOOR, _RANGE = 1e-10, 8.0


def hop(rate: int) -> int:
    """Samples from one frame to the next."""
    return max(1, round(HOP * rate))


def log_mel(samples: jax.Array, rate: int, mels: int) -> jax.Array:
    """Compute the logarithms of power in mel bands, as Whisper reads them.

    The quietest are 8 orders of magnitude below the loudest of a sound, and its frames are scaled to about [-1, 1.5].
    Shapes: samples (B, N), in [-1, 1], to (B, N // hop, M) in float32.
    Source: Radford et al. 2022, section 2.2, and WhisperFeatureExtractor of transformers.
    """
    step, width = hop(rate), max(2, round(WINDOW * rate))
    count = samples.shape[1] // step
    x = jnp.pad(samples.astype(jnp.float32), ((0, 0), (width // 2, width // 2)), mode="reflect")
    # frames by slices of whole hops: a gather of samples is slow on accelerators
    parts = -(-width // step)
    x = jnp.pad(x, ((0, 0), (0, max(0, (count + parts) * step - x.shape[1]))))[:, : (count + parts) * step]
    pieces = x.reshape(x.shape[0], -1, step)
    frames = jnp.concatenate([pieces[:, i : i + count] for i in range(parts)], -1)[..., :width]
    # the Fourier transform is a product, which any mesh splits by rows; an FFT would be gathered
    waves, bands = (jnp.asarray(each) for each in tables(rate, mels))
    with jax.default_matmul_precision("highest"):
        real, imaginary = jnp.split(frames @ waves, 2, -1)
        power = jnp.maximum((real**2 + imaginary**2) @ bands, _FLOOR)
    found = jnp.log10(power)
    return (jnp.maximum(found, found.max((1, 2), keepdims=True) - _RANGE) + 4) / 4


@functools.cache
def tables(rate: int, mels: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the windowed cosines and sines of each frequency (window, 2F), and the share of each in bands (F, M)."""
    width = max(2, round(WINDOW * rate))
    at, count = np.arange(width), width // 2 + 1
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * at / width)
    angle = 2 * np.pi * (at[:, None] * np.arange(count) % width) / width
    waves = hann[:, None] * np.concatenate([np.cos(angle), -np.sin(angle)], 1)
    edges = hertz(np.linspace(0, mel(rate / 2), mels + 2))
    frequencies = np.linspace(0, rate / 2, count)[:, None]
    rise, fall = (frequencies - edges[:-2]) / np.diff(edges)[:-1], (edges[2:] - frequencies) / np.diff(edges)[1:]
    bands = np.maximum(0, np.minimum(rise, fall)) * 2 / (edges[2:] - edges[:-2])
    return waves.astype(np.float32), bands.astype(np.float32)


def mel(frequency: float) -> float:
    """Convert Hz to mels: linear up to 1,000 Hz, logarithmic from there (Slaney 1998)."""
    top = _LINEAR / _PER_MEL
    return frequency / _PER_MEL if frequency < _LINEAR else top + float(np.log(frequency / _LINEAR)) / _PER_LOG


def hertz(mels: np.ndarray) -> np.ndarray:
    """Convert mels to Hz."""
    top = _LINEAR / _PER_MEL
    return np.where(mels < top, mels * _PER_MEL, _LINEAR * np.exp(_PER_LOG * (np.maximum(mels, top) - top)))
