"""From a stored sound to samples of one rate: mono, 16 bits.

WAV of whole numbers is read by Python's standard library, anything else by the package soundfile (extra `audio`).
"""

from __future__ import annotations

import io
import math
import wave

import numpy as np

from jaxmodels.data.records import Sound
from jaxmodels.errors import UserError

SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".au", ".caf", ".w64")
"""Endings of files that are taken for sounds, in lower case."""
_FULL = 32768.0
_LOUDEST = 4.0
"""What a sound of floats may have at most, 12 dB above full scale: with more, its numbers mean something else."""
_SLOWEST, _FASTEST = 1_000, 400_000
_UNKNOWN = 0x7FFF0000
"""A length of a WAV file's samples that is none: sox writes about 0x7FFFF000 to a pipe, ffmpeg 0xFFFFFFFF."""


class Unreadable(Exception):
    """A sound cannot be decoded; the message says why."""


def samples_of(value: bytes | Sound, rate: int) -> np.ndarray:
    """Return a sound's samples at this rate, int16 (N,): the mean of its channels, resampled.

    Raises:
        Unreadable: it is no sound, damaged or empty.
        UserError: its format needs a package that is not installed.
    """
    samples, own = value if isinstance(value, tuple) else decode(value)
    if samples.ndim == 2:
        whole = samples.shape[1] == 1
        samples = samples[:, 0] if whole else floats(samples).mean(1)
    if not _SLOWEST <= own <= _FASTEST:  # a filter between such rates would take minutes to make
        raise Unreadable(f"has {own:,} samples a second, expected {_SLOWEST:,} to {_FASTEST:,}")
    if samples.dtype != np.int16 and (peak := float(np.abs(samples).max(initial=0))) > _LOUDEST:
        raise Unreadable(f"holds samples of up to {peak:g}, expected -1 to 1")
    if own != rate:
        samples = resampled(floats(samples), own, rate)
    if not samples.size:
        raise Unreadable("holds no samples")
    if samples.dtype == np.int16:
        return samples
    return np.clip(np.rint(samples * _FULL), -_FULL, _FULL - 1).astype(np.int16)


def floats(samples: np.ndarray) -> np.ndarray:
    """Scale 16 bits to [-1, 1); return floats unchanged."""
    return samples.astype(np.float32) / np.float32(_FULL) if samples.dtype == np.int16 else samples


def resampled(samples: np.ndarray, rate: int, to: int) -> np.ndarray:
    """Resample (N,) to another rate by a low-pass filter of scipy, (ceil(N · to / rate),)."""
    from scipy.signal import resample_poly

    common = math.gcd(rate, to)
    return resample_poly(samples, to // common, rate // common).astype(np.float32)


def decode(value: bytes) -> Sound:
    """Decode a sound file: int16 or float32 (N, channels).

    Raises:
        Unreadable: it is no sound, damaged or cut off.
        UserError: its format needs a package that is not installed.
    """
    if value[:4] == b"RIFF":
        value = _measured(value)
        if (found := _wav(value)) is not None:
            return found
    try:
        import soundfile
    except (ModuleNotFoundError, OSError) as error:  # OSError: without its library of C
        raise UserError(
            "got a sound that is no WAV file of whole numbers, expected the package soundfile for it, "
            "try pip install 'jaxmodels[audio]'"
        ) from error
    try:
        with soundfile.SoundFile(io.BytesIO(value)) as file:
            small = file.subtype in ("PCM_16", "PCM_S8", "PCM_U8")
            samples = file.read(dtype="int16" if small else "float32", always_2d=True)
            rate, frames = file.samplerate, file.frames
    except (soundfile.SoundFileError, RuntimeError, TypeError) as error:
        raise Unreadable(
            f"is no sound that can be decoded ({str(error).splitlines()[0].rpartition('>: ')[2]})"
        ) from error
    if len(samples) < frames < 1 << 62:  # a stream does not know its length
        raise Unreadable(f"ends after {len(samples):,} of {frames:,} samples")
    if samples.dtype != np.int16 and not np.isfinite(samples).all():
        raise Unreadable("holds samples that are not finite")
    return Sound(samples, rate)


def _measured(value: bytes) -> bytes:
    """A WAV file with the length of its samples, where a program could not go back to write it, as in a pipe.

    It is then 0xFFFFFFFF, 0x7FFFF000 or, in a file that is longer than it says, 0; the samples go on to the end.
    """
    at, short = 12, int.from_bytes(value[4:8], "little") + 8 < len(value)
    while at + 8 <= len(value):
        size = int.from_bytes(value[at + 4 : at + 8], "little")
        if value[at : at + 4] == b"data":
            rest = len(value) - at - 8
            if (rest < size and size >= _UNKNOWN) or (size == 0 and short):
                lengths = [(len(value) - 8).to_bytes(4, "little"), rest.to_bytes(4, "little")]
                return value[:4] + lengths[0] + value[8 : at + 4] + lengths[1] + value[at + 8 :]
            return value
        at += 8 + size + size % 2
    return value


def _wav(value: bytes) -> Sound | None:
    """Decode a WAV file of whole numbers; None if its numbers are others."""
    try:
        with wave.open(io.BytesIO(value)) as file:
            channels, width, rate, frames = file.getparams()[:4]
            data = file.readframes(frames)
    except (wave.Error, EOFError, ZeroDivisionError) as error:
        if "unknown format" in str(error):
            return None
        raise Unreadable(f"is no WAV file that can be decoded ({str(error) or 'it is cut off'})") from error
    if len(data) < frames * channels * width:
        raise Unreadable(f"ends after {len(data) // (channels * width):,} of {frames:,} samples")
    raw = np.frombuffer(data, np.uint8).reshape(-1, channels, width)
    if width == 1:  # unsigned
        return Sound(((raw[..., 0].astype(np.int16) - 128) << 8).astype(np.int16), rate)
    if width == 2:
        return Sound(raw.view("<i2")[..., 0].astype(np.int16), rate)
    # the highest bytes of 24 or 32 bits
    wide = np.zeros((*raw.shape[:2], 4), np.uint8)
    wide[..., -width:] = raw
    whole = wide.view("<i4")[..., 0]
    return Sound((whole / np.float32(2**31)).astype(np.float32), rate)
