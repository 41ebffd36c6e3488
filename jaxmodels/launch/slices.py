"""Slices of TPUs in Google Cloud: their hosts, the chips of a host, and their names in GKE and Cloud TPU."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxmodels.errors import UserError
from jaxmodels.plan.topology import parse

_HOST = 4
_WHOLE = 8
"""Chips of the largest machine: a slice of v5e or v6e of up to this size is one machine; other machines have four."""

# Source: cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus, cloud.google.com/tpu/docs/runtimes
_GKE = {
    "v4": "tpu-v4-podslice",
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
    "v7": "tpu7x",
}
_TYPE = {"v4": "v4", "v5e": "v5litepod", "v5p": "v5p", "v6e": "v6e"}
_RUNTIME = {
    "v4": "tpu-ubuntu2204-base",
    "v5e": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}


@dataclass(frozen=True)
class Slice:
    """One or several slices of TPUs of the same shape."""

    kind: str
    """The TPU, as `jaxmodels plan` names it: v5e."""
    shape: tuple[int, ...]
    """Chips along each dimension."""
    count: int = 1

    @classmethod
    def of(cls, text: str) -> Slice:
        """Parse the name that a plan gives to slices: v5e:4x4, or v5e:2x4x4 for two.

        Raises:
            UserError: it is no TPU, or there is no such shape.
        """
        found = parse(text)
        if found.hardware.platform != "tpu":
            raise UserError(f"got tpu {text}, expected one of {', '.join(_GKE)} with its shape, try v5e:4x4")
        return cls(found.hardware.name, found.shape, found.slices)

    @property
    def chips(self) -> int:
        """Chips of one slice."""
        return math.prod(self.shape)

    @property
    def chips_per_host(self) -> int:
        whole = self.kind in ("v5e", "v6e") and self.chips <= _WHOLE
        return self.chips if whole else min(_HOST, self.chips)

    @property
    def hosts(self) -> int:
        """Hosts of one slice."""
        return self.chips // self.chips_per_host

    @property
    def topology(self) -> str:
        """The shape of one slice as text: 4x4."""
        return "x".join(map(str, self.shape))

    @property
    def gke(self) -> str:
        """The accelerator label of GKE's machines."""
        return self._named(_GKE, "GKE")

    @property
    def type(self) -> str:
        """The kind of chip, as Cloud TPU names it."""
        return self._named(_TYPE, "Cloud TPU's queued resources")

    @property
    def runtime(self) -> str:
        """The software version that Cloud TPU recommends for JAX on these machines."""
        return self._named(_RUNTIME, "Cloud TPU's queued resources")

    def _named(self, names: dict[str, str], service: str) -> str:
        if self.kind not in names:
            raise UserError(f"got tpu {self.kind}, expected one of {', '.join(names)} on {service}, try v5e:4x4")
        return names[self.kind]
