"""What a causal ring computes is known to its devices alone: its names say it, and a plan reads them."""

import importlib.util

import pytest

from jaxmodels.config import Config, Mesh, Tokens
from jaxmodels.models.kernels.blocks import Plan
from jaxmodels.models.kernels.looped import visited
from jaxmodels.models.kernels.ring import Ring, work
from jaxmodels.models.llama import LlamaConfig
from jaxmodels.plan import compile, figures, program, topology

# two compilations for TPUs take minutes on a busy machine
pytestmark = pytest.mark.timeout(900)
COMPILERS = {"h100:1x8": "jax_cuda12_plugin", "v5e:2x4": "libtpu"}
T, ROWS, HEADS, K, DEVICES, BLOCK = 2048, 8, 4, 128, 4, 128


def seen(window=None):
    """Pairs of a query and a key, in whole blocks, that a causal sequence sees."""
    n = T // BLOCK
    reach = n if window is None else -(-(window - 1) // BLOCK) + 1
    return sum(min(i + 1, reach) for i in range(n)) * BLOCK**2


@pytest.mark.parametrize("on", COMPILERS)
def test_the_blocks_that_a_ring_computes_are_counted(on, tmp_path):
    if importlib.util.find_spec(COMPILERS[on]) is None:
        pytest.skip(f"needs the compiler {COMPILERS[on]}: pip install 'jaxmodels[aot]'")
    cfg = Config(
        model=LlamaConfig(
            vocab_size=512, context=T, layers=1, heads=HEADS, kv_heads=2, width=512, mlp_width=512, dtype="bfloat16"
        ),
        data=Tokens(seq_len=T, batch_size=ROWS),
        mesh=Mesh(data=1, fsdp=2, context=DEVICES),
    )
    made = compile.compiled(cfg, topology.parse(on), tmp_path)
    plan = figures.figures(cfg, made)
    assert plan["uncounted"] == [] and plan["attention"] == ["ring"] and plan["step_seconds"] > 0
    attention = sum(flops for label, flops in program.parse(made.text).parts().items() if "attend[" in label) * 8
    # two products forward, five backward; a GPU computes a few thin sums as products too
    assert attention == pytest.approx(7 * 2 * ROWS * HEADS * K * seen(), rel=0.02)
    assert 1 <= plan["hardware_flops"] / plan["model_flops_causal"] < 1.5


@pytest.mark.parametrize("window", [None, 300, 1500])
def test_the_shares_of_a_rings_steps_add_up_to_what_is_seen(window):
    chunk = T // DEVICES // 2
    ring = Ring(Plan(True, window, 1.0, None, BLOCK, BLOCK), "context", chunk)
    whole = (chunk // BLOCK) ** 2
    steps = [range(DEVICES - 1), [DEVICES - 1]]
    done = sum(len(list(each)) * sum(work(ring, DEVICES, each).values()) * whole for each in steps)
    assert visited(ring.plan, T // BLOCK, T // BLOCK, 0) * BLOCK**2 == seen(window)
    if window is None:  # all devices do the same
        assert done * DEVICES * BLOCK**2 == pytest.approx(seen(window))
    else:  # the busiest one decides
        assert seen(window) <= done * DEVICES * BLOCK**2 < 2 * seen(window)
