"""The platform that a program is built for."""

from __future__ import annotations

import re
from typing import Any

import jax

from jaxmodels.parallel import hardware


def platform() -> str:
    """Return cpu, gpu or tpu: the platform of the mesh that is set (even one of absent devices), or the default."""
    device = _ambient()
    kind = str(getattr(device, "platform", None) or getattr(device, "device_kind", "")).lower()
    for name, signs in {"tpu": ("tpu",), "gpu": ("gpu", "cuda", "rocm", "nvidia", "amd"), "cpu": ("cpu",)}.items():
        if any(sign in kind for sign in signs):
            return name
    return jax.default_backend()


def capability() -> tuple[int, ...]:
    """Return the compute capability of the NVIDIA GPU that a program is built for; () for any other device."""
    device, here = _ambient(), jax.local_devices()[0]
    if device is not None and device.device_kind != here.device_kind:
        row = hardware.of_device(device.device_kind)
        return row.capability if row else ()
    found = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(here, "compute_capability", "")))
    return (int(found[1]), int(found[2])) if found else ()


def _ambient() -> Any:
    """Return the device of the mesh that is set; None if there is none."""
    return getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
