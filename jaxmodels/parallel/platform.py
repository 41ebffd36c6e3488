"""Which platform a program is for."""

from __future__ import annotations

import jax


def platform() -> str:
    """cpu, gpu or tpu: what the ambient mesh is made of (also when compiling for it elsewhere), else the default."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    kind = str(getattr(device, "platform", None) or getattr(device, "device_kind", "")).lower()
    for name, signs in {"tpu": ("tpu",), "gpu": ("gpu", "cuda", "rocm", "nvidia", "amd"), "cpu": ("cpu",)}.items():
        if any(sign in kind for sign in signs):
            return name
    return jax.default_backend()
