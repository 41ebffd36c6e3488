"""Slices of TPUs as Google Cloud rents them: hosts, chips of a host, and the names of both services for them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxmodels.errors import UserError
from jaxmodels.plan.topology import parse

_HOST = 4
_WHOLE = 8
"""Chips of the largest machine: of v5e and v6e a slice up to that size is one machine; of the others four chips are."""

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
    """One or several slices of TPUs of one shape."""

    kind: str
    """v5e, as `jaxmodels plan` calls it."""
    shape: tuple[int, ...]
    """Chips along each dimension."""
    count: int = 1

    @classmethod
    def of(cls, text: str) -> Slice:
        """The slices that a plan calls by this name: v5e:4x4, v5e:2x4x4 for two.

        Raises:
            UserError: it is no TPU, or comes in no such shape.
        """
        found = parse(text)
        if found.hardware.platform != "tpu":
            raise UserError(f"got tpu {text}, expected one of {', '.join(_GKE)} with its shape, try v5e:4x4")
        return cls(found.hardware.name, found.shape, found.slices)

    @property
    def chips(self) -> int:
        """Of one slice."""
        return math.prod(self.shape)

    @property
    def chips_per_host(self) -> int:
        whole = self.kind in ("v5e", "v6e") and self.chips <= _WHOLE
        return self.chips if whole else min(_HOST, self.chips)

    @property
    def hosts(self) -> int:
        """Of one slice."""
        return self.chips // self.chips_per_host

    @property
    def topology(self) -> str:
        """4x4."""
        return "x".join(map(str, self.shape))

    @property
    def gke(self) -> str:
        """What GKE's machines are labelled with."""
        return self._named(_GKE, "GKE")

    @property
    def type(self) -> str:
        """The kind of chip to Cloud TPU."""
        return self._named(_TYPE, "Cloud TPU's queued resources")

    @property
    def runtime(self) -> str:
        """The software of a TPU machine that Cloud TPU recommends for JAX."""
        return self._named(_RUNTIME, "Cloud TPU's queued resources")

    def _named(self, names: dict[str, str], service: str) -> str:
        if self.kind not in names:
            raise UserError(f"got tpu {self.kind}, expected one of {', '.join(names)} on {service}, try v5e:4x4")
        return names[self.kind]
