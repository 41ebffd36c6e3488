"""Compiles attention for eight TPU v5e chips; prints, for each case, the kernel taken and what the program contains."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

import jaxmodels.models.attention as module
from jaxmodels.config import Mesh
from jaxmodels.parallel import rules
from jaxmodels.parallel.mesh import make_mesh


def main() -> None:
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    mesh = make_mesh(Mesh(data=2, tensor=4), devices)
    compile_cases(
        mesh,
        "tpu",
        "tpu_custom_call",
        {
            "causal": {"causal": True},
            "packed, grouped": {"causal": True, "G": 4, "segment_ids": True},
            "window, softcap, narrow heads": {"causal": True, "window": 100, "softcap": 30.0, "K": 64},
            "kv_length, offset, float32": {
                "causal": True,
                "T": 256,
                "q_offset": 128,
                "kv_length": 300,
                "dtype": "float32",
            },
        },
    )


def compile_cases(mesh: jax.sharding.Mesh, platform: str, custom_call: str, cases: dict[str, dict[str, Any]]) -> None:
    taken = []
    module.log_choice = lambda kernel, reason: taken.append(kernel)
    rows, by_head = rules.spec(("batch",)), rules.spec(("batch", "seq", "heads"))

    def abstract(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    for name, case in cases.items():
        case = {"T": 512, "S": 512, "G": 8, "K": 128, "dtype": "bfloat16", **case}
        T, S, G, K, kind = (case.pop(key) for key in ("T", "S", "G", "K", "dtype"))
        kv = abstract((4, S, G, K), kind, by_head if G % 4 == 0 else rows)
        ids = abstract((4, T), "int32", rows) if case.pop("segment_ids", False) else None
        bias = abstract((1, 8, T, S), kind, PartitionSpec(None, "tensor")) if case.pop("bias", False) else None

        def total(q, k, v, ids, bias, case=case):
            return module.attention(q, k, v, segment_ids=ids, bias=bias, **case).astype(jnp.float32).sum()

        with jax.set_mesh(mesh):
            grad = jax.jit(jax.grad(total, (0, 1, 2) if bias is None else (0, 1, 2, 4)))
            traced = grad.trace(abstract((4, T, 8, K), kind, by_head), kv, kv, ids, bias)
            text = traced.lower(lowering_platforms=(platform,)).compile().as_text()
        calls, gathers = text.count(f'custom_call_target="{custom_call}'), text.count(" all-gather(")
        print(f"case:{name.replace(' ', '_')} {taken.pop()} custom_calls={calls} gathers={gathers}", flush=True)


if __name__ == "__main__":
    main()
