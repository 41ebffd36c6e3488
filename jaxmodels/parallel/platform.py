"""The platform that a program is built for."""

from __future__ import annotations

import re
from typing import Any

import jax

from jaxmodels.parallel import hardware


def platform() -> str:
    """cpu, gpu or tpu: what the ambient mesh is made of (also when compiling for it elsewhere), else the default."""
    device = _ambient()
    kind = str(getattr(device, "platform", None) or getattr(device, "device_kind", "")).lower()
    for name, signs in {"tpu": ("tpu",), "gpu": ("gpu", "cuda", "rocm", "nvidia", "amd"), "cpu": ("cpu",)}.items():
        if any(sign in kind for sign in signs):
            return name
    return jax.default_backend()


def capability() -> tuple[int, ...]:
    """The compute capability of the NVIDIA GPU that a program is for, as `platform`; of another device ()."""
    device, here = _ambient(), jax.local_devices()[0]
    if device is not None and device.device_kind != here.device_kind:
        row = hardware.of(device.device_kind)
        return row.capability if row else ()
    found = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(here, "compute_capability", "")))
    return (int(found[1]), int(found[2])) if found else ()


def _ambient() -> Any:
    """The device of the ambient mesh; None where there is none."""
    return getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
