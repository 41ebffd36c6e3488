"""Compiles attention for eight H100 GPUs; prints, for each case, the kernel taken and what the program contains."""

from __future__ import annotations

from compile_attention_tpu import compile_cases
from jax.experimental import topologies

from jaxmodels.config import Mesh
from jaxmodels.parallel.mesh import make_mesh

H100 = """
gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000
  l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 } registers_per_core_limit: 65536 registers_per_block_limit: 65536 }
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 } device_description_str: "NVIDIA H100 80GB HBM3"
"""


def main() -> None:
    devices = topologies.get_topology_desc(platform="cuda", topology="1x1x8", target_config=H100).devices
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
        },
    )


if __name__ == "__main__":
    main()
