"""Compiles attention for eight H100 GPUs; prints, for each case, the kernel taken and what the program contains."""

from __future__ import annotations

from compile_attention_tpu import compile_cases

from jaxmodels.config import Mesh
from jaxmodels.parallel.mesh import make_mesh
from jaxmodels.plan import topology


def main() -> None:
    devices = topology.describe(topology.parse("h100:1x8")).devices
    mesh = make_mesh(Mesh(data=2, tensor=4), devices)
    compile_cases(
        mesh,
        "cuda",
        "__cudnn$fmha",
        {
            "causal": {"causal": True},
            "packed, one head of keys for two devices": {"causal": True, "G": 2, "segment_ids": True, "K": 64},
            "window": {"causal": True, "window": 100, "K": 64},
            "bias": {"bias": True},
            "kv_length, causal": {"causal": True, "kv_length": 300},
            "odd lengths": {"T": 197, "S": 197},
            "one token": {"causal": True, "T": 1, "S": 1},
            "large heads": {"causal": True, "K": 256},
        },
    )


if __name__ == "__main__":
    main()
