"""Which kernel `attention` takes, what it refuses, and that fused kernels compile for the hardware they are for."""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmodels.models.attention as module
from jaxmodels.errors import UserError
from jaxmodels.models.attention import attention, choose
from jaxmodels.models.kernels.kernel import Call, Kernel
from jaxmodels.parallel.platform import capability, platform

B, H, K = 2, 4, 16


def arrays(T=256, S=256, G=H):
    """q, k and v."""
    return jnp.ones((B, T, H, K)), jnp.ones((B, S, G, K)), jnp.ones((B, S, G, K))


LONG = Call(8, 2048, 2048, 16, 16, 128, "bfloat16", frozenset({"causal"}))


@pytest.mark.parametrize(
    ("place", "call", "kernel", "why"),
    [
        ("cpu", LONG, "blockwise", "fastest on cpu"),
        ("cpu", LONG._replace(T=1), "xla", "fastest on cpu"),
        ("cpu", LONG._replace(features=frozenset({"dropout"})), "xla", "blockwise does not support dropout"),
        ("tpu", LONG, "splash", "fused kernel of tpu"),
        ("tpu", LONG._replace(T=1), "xla", "splash needs lengths that 128 divides"),
        ("tpu", LONG._replace(features=frozenset({"bias"})), "blockwise", "splash does not support bias; the scores"),
        ("gpu", LONG, "cudnn", "fused kernel of gpu"),
        ("gpu", LONG._replace(features=frozenset({"softcap"})), "blockwise", "cudnn does not support softcap"),
        ("gpu", LONG._replace(K=256, capability=(9, 0)), "cudnn", "fused kernel of gpu"),
        ("gpu", LONG._replace(K=136, capability=(8, 0)), "blockwise", "up to 128 on GPUs before Hopper, got 136"),
        ("gpu", LONG._replace(K=264, capability=(10, 0)), "blockwise", "up to 256, got 264"),
    ],
)
def test_auto_picks_by_hardware_and_shapes(place, call, kernel, why, monkeypatch):
    monkeypatch.setattr(Kernel, "absence", lambda self, place: None)
    got, reason = choose(place, call)
    assert got == kernel and why in reason


def test_auto_takes_no_kernel_that_is_not_installed():
    if importlib.util.find_spec("jax_cuda12_plugin") or importlib.util.find_spec("jax_cuda13_plugin"):
        pytest.skip("JAX's CUDA plugin is installed")
    assert choose("gpu", LONG)[0] != "cudnn"


def test_auto_says_which_kernel_it_took_and_says_it_once(caplog):
    module.log_choice.cache_clear()
    q, k, v = arrays(9, 9)
    with caplog.at_level(logging.INFO, "jaxmodels"):
        for _ in range(2):
            attention(q, k, v)
    assert [r.message for r in caplog.records] == ["attention: kernel xla: fastest on cpu for T=9, S=9"]


def test_platform_and_capability_are_the_ambient_meshs():
    assert (platform(), capability()) == ("cpu", ())
    gpus = {"NVIDIA H100 80GB HBM3": ("gpu", (9, 0)), "NVIDIA A100-SXM4-80GB": ("gpu", (8, 0)), "NVIDIA X": ("gpu", ())}
    for device, expected in {"TPU v5 lite": ("tpu", ()), "cpu": ("cpu", ()), **gpus}.items():
        abstract = type("Device", (), {"device_kind": device, "platform": None})()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jax.sharding, "get_abstract_mesh", lambda a=abstract: type("M", (), {"abstract_device": a}))
            assert (platform(), capability()) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel": "splach"}, "got attention kernel 'splach', expected one of xla, .* did you mean 'splash'"),
        (
            {"kernel": "splash", "bias": np.ones(256)},
            "kernel 'splash' does not support bias; kernels that do: xla, block",
        ),
        ({"kernel": "splash", "T": 100}, "needs lengths that 128 divides, got 100 and 256"),
        ({"kernel": "cudnn"}, "kernel 'cudnn' does not support float32"),
        ({"G": 3}, "got 4 heads of queries and 3 of keys"),
        ({"S": 255, "segment_ids": np.zeros((B, 256), int)}, "got segment_ids"),
        ({"bias": np.ones((3, 1, 1))}, "expected a shape that broadcasts to"),
        ({"window": 0}, "got attention window 0, expected at least 1"),
        ({"dropout": 0.1}, "dropout without rng"),
        ({"dropout": 1.5, "rng": 0}, "got attention dropout 1.5"),
    ],
)
def test_a_mistake_is_refused_in_one_line(change, message):
    q, k, v = arrays(**{n: x for n, x in change.items() if n in "TSG"})
    with pytest.raises(UserError, match=message) as error:
        attention(q, k, v, **{n: x for n, x in change.items() if n not in "TSG"})
    assert "\n" not in str(error.value)


def compile_elsewhere(script, package):
    """Run a script beside this file in a process of its own, as compilers for other hardware register themselves."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"the package {package} is not installed")
    path = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, Path(__file__).parent / script], env=env, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(line.split(" ", 1) for line in done.stdout.splitlines() if line.startswith("case:"))


def test_splash_compiles_for_tpu_forward_and_backward_under_a_mesh():
    got = compile_elsewhere("compile_attention_tpu.py", "libtpu")
    assert len(got) >= 4 and set(got.values()) == {"splash custom_calls=3 gathers=0"}


def test_cudnn_compiles_for_an_h100_forward_and_backward_under_a_mesh():
    got = compile_elsewhere("compile_attention_gpu.py", "jax_cuda12_plugin")
    # XLA of jax 0.12 gathers where two devices need one head of keys
    shared = [case for case in got if "one_head_of_keys" in case and "gathers=1" in got[case]]
    assert len(shared) <= (jax.__version_info__ >= (0, 12))
    assert len(got) >= 4 and {got[case] for case in set(got) - set(shared)} == {"cudnn custom_calls=2 gathers=0"}
    assert all(got[case] == "cudnn custom_calls=2 gathers=1" for case in shared)
