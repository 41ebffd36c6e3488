"""Checks that configs and networks share, each with the nearest value that would do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax

from jaxmodels.errors import UserError


def divide(config: Any, whole: str, parts: str) -> None:
    """Refuse a config where the field `parts` does not divide the field `whole`; call it in `__post_init__`."""
    a, b = getattr(config, whole), getattr(config, parts)
    if b < 1 or a % b:
        small = [n for n in range(1, math.isqrt(max(a, 1)) + 1) if a % n == 0]
        near = [*small, *(max(a, 1) // n for n in small)]
        best = min(near, key=lambda n: (abs(n - b), n))
        raise UserError(
            f"got {whole} {a} with {parts} {b}, expected {whole} to be a multiple of {parts}, try {parts} {best}"
        )


def check_rotary_heads(config: Any) -> None:
    """Refuse heads that do not fit together, or that rotary positions cannot pair; call it in `__post_init__`."""
    if config.head_dim is None:
        divide(config, "width", "heads")
    if config.kv_heads is not None:
        divide(config, "heads", "kv_heads")
    if config.head_size % 2:
        raise UserError(
            f"got head size {config.head_size}, expected an even number for rotary positions, "
            f"try head_dim {config.head_size + 1}"
        )


def halvings(input_shape: tuple[int, int, int], channels: tuple[int, ...], field: str) -> tuple[int, int]:
    """Height and width of an image after it is halved once for each entry of `channels`.

    Raises:
        UserError: a side is odd before one of the halvings.
    """
    height, width, _ = input_shape
    times = 2 ** len(channels)
    if height % times or width % times:
        even = math.gcd(height, width)
        most = (even & -even).bit_length() - 1
        raise UserError(
            f"got {field} {channels} for images of {height}×{width}, expected sides that {times} divides, "
            f"try at most {most} {field}"
        )
    return height // times, width // times


def check_patches(input_shape: tuple[int, int, int], patch: int) -> None:
    """Refuse images that square patches of side `patch` do not tile; call it in `__post_init__`."""
    height, width, _ = input_shape
    if patch < 1 or height % patch or width % patch:
        near = [n for n in range(1, min(height, width) + 1) if not height % n and not width % n]
        best = min(near, key=lambda n: (abs(n - patch), n))
        raise UserError(
            f"got patch {patch} with images of {height}x{width}, expected one that divides height and width, "
            f"try --model.patch {best}"
        )


def check_shape(x: jax.Array, expected: Sequence[int]) -> None:
    """Refuse a batch whose examples do not have the config's shape."""
    if x.shape[1:] != tuple(expected):
        raise UserError(f"got inputs of shape {x.shape[1:]}, expected {tuple(expected)}, try --model.input-shape")
