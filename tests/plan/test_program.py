"""Programs read from their text: FLOPs, loops, groups of devices, and the bytes that are moved."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxmodels.models.kernels import kernel
from jaxmodels.plan import program
from jaxmodels.plan.groups import groups_of

# the forms in which XLA writes eight devices as four groups, of devices that differ in the last of two axes
PAIRS = [[0, 1], [2, 3], [4, 5], [6, 7]]
ACROSS = [[0, 4], [1, 5], [2, 6], [3, 7]]


def summed(text, computed=program.flops):
    """A sum over all instructions that are issued, as often as they are."""
    found = program.parse(text)
    return sum(times * computed(found, where, each) for where, each, times in found.walk())


def test_flops_of_a_compiled_gradient_are_those_of_its_formula_on_each_device():
    def loss(w, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0].sum()

    mesh = jax.make_mesh((2, 4), ("rows", "columns"), axis_types=(AxisType.Auto,) * 2)
    x = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("rows")))
    w = jax.ShapeDtypeStruct((3, 64, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(None, "columns")))
    with jax.set_mesh(mesh):
        text = jax.jit(jax.grad(loss)).lower(w, x).compile().as_text()
    assert summed(text) == 3 * 3 * 2 * 16 * 64 * 64 / 8
    found = program.parse(text)
    sent = [(each.kind, times, groups_of(each.attributes, 8)) for _, each, times in found.walk() if each.kind]
    assert ("all-reduce", 3, ACROSS) in sent, "the weights' gradient, over the rows' devices, in each iteration"


def test_of_branches_the_dearest_counts():
    def choose(go, x):
        return jax.lax.cond(go, lambda x: x @ x @ x, lambda x: x @ x, x)

    text = jax.jit(choose).lower(jax.ShapeDtypeStruct((), bool), jnp.zeros((64, 64))).compile().as_text()
    assert summed(text) == 2 * 2 * 64**3


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}, x=1", PAIRS),
        ("replica_groups=[4,2]<=[8], x=1", PAIRS),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x=1", ACROSS),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}, x=1", PAIRS),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}, x=1", ACROSS),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_1'}, x=1", ACROSS),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=(0,4,1,5,2,6,3,7) {'axis_1'}, x=1", ACROSS),
        ("source_target_pairs={{0,4},{1,5},{2,6},{3,7}}, x=1", ACROSS),
        ("channel_id=1", [list(range(8))]),
    ],
)
def test_groups_of_devices_are_read_in_all_forms(attributes, expected):
    assert groups_of(attributes, 8) == expected


def test_a_product_written_as_a_convolution_counts_what_meets_no_padding():
    # TPU programs write x (2, 4096, 2048) · w (2048, 4, 64) so, the heads as a window that slides over padding
    text = """HloModule m, is_scheduled=true

ENTRY %main (p0: bf16[2,4096,2048], p1: bf16[2048,4,64]) -> bf16[2,4096,4,64] {
  %a = bf16[2,1,4096,2048]{3,2,1,0} parameter(0)
  %b = bf16[2048,4,64,1]{2,1,0,3} parameter(1)
  ROOT %c = bf16[2,4096,4,64]{3,1,2,0} convolution(%a, %b), WINDOW, dim_labels=01bf_i1o0->0b1f
}
""".replace("WINDOW", "window={size=1x4 pad=0_0x3_3 rhs_reversal=0x1}")
    assert summed(text) == 2 * 2 * 4096 * 2048 * 4 * 64


def test_of_an_array_that_is_cut_only_the_piece_is_moved():
    text = """HloModule m, is_scheduled=true

%cut (p0: f32[32,1024], p1: s32[]) -> f32[1024] {
  %p0 = f32[32,1024]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = f32[1,1024]{1,0} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={1,1024}
  ROOT %out = f32[1024]{0} bitcast(%slice)
}

ENTRY %main (a: f32[32,1024], i: s32[]) -> f32[1024] {
  %a = f32[32,1024]{1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %f = f32[1024]{0} fusion(%a, %i), kind=kLoop, calls=%cut
}
"""
    assert summed(text, program.moved) == 1024 * 4 * 2 + 4


STACKED = """HloModule m, is_scheduled=true

%nested (n0: f32[32,1024], n1: s32[]) -> f32[1,1024] {
  %n0 = f32[32,1024]{1,0} parameter(0)
  %n1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %piece = f32[1,1024]{1,0} dynamic-slice(%n0, %n1, %zero), dynamic_slice_sizes={1,1024}
}

%update (p0: f32[1,32,1024], p1: s32[], p2: f32[1024]) -> f32[1,32,1024] {
  %p0 = f32[1,32,1024]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %flat = f32[32,1024]{1,0} bitcast(%p0)
  %old = f32[1,1024]{1,0} fusion(%flat, %p1), kind=kLoop, calls=%nested
  %p2 = f32[1024]{0} parameter(2)
  %more = f32[1,1024]{1,0} bitcast(%p2)
  %sum = f32[1,1024]{1,0} add(%old, %more)
  %begin = s32[] constant(0)
  %written = f32[32,1024]{1,0} dynamic-update-slice(%flat, %sum, %p1, %begin)
  ROOT %out = f32[1,32,1024]{2,1,0} bitcast(%written)
}

ENTRY %main (b: f32[1024], i: s32[]) -> f32[1,32,1024] {
  %b = f32[1024]{0} parameter(0)
  %i = s32[] parameter(1)
  %a = f32[1,32,1024]{2,1,0} custom-call(), custom_call_target="AllocateBuffer"
  ROOT %f = f32[1,32,1024]{2,1,0} fusion(%a, %i, %b), kind=kLoop, calls=%update
}
"""


def test_behind_a_bitcast_and_in_a_nested_fusion_a_piece_is_a_piece_and_a_buffer_that_is_only_named_moves_nothing():
    assert summed(STACKED, program.moved) == 3 * 1024 * 4 + 4, "read, added to, written in its place, and the index"


LOOP = """HloModule m, is_scheduled=true

%body (b: (s32[], s32[], f32[64,64])) -> (s32[], s32[], f32[64,64]) {
  %b = (s32[], s32[], f32[64,64]{1,0}) parameter(0)
  %x = f32[64,64]{1,0} get-tuple-element(%b), index=2
  %y = f32[64,64]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %i = s32[] get-tuple-element(%b), index=0
  %n = s32[] get-tuple-element(%b), index=1
  ROOT %t = (s32[], s32[], f32[64,64]{1,0}) tuple(%i, %n, %y)
}

%condition (c: (s32[], s32[], f32[64,64])) -> pred[] {
  %c = (s32[], s32[], f32[64,64]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %n = s32[] get-tuple-element(%c), index=1
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (a: (s32[], s32[], f32[64,64])) -> (s32[], s32[], f32[64,64]) {
  %a = (s32[], s32[], f32[64,64]{1,0}) parameter(0)
  ROOT %while.1 = (s32[], s32[], f32[64,64]{1,0}) while(%a), condition=%condition, body=%body, metadata={op_name="jit(run)/moe/NAMEwhile"}
}
"""  # noqa: E501


def test_a_loop_of_unknown_length_runs_as_often_as_its_name_expects_or_is_named():
    named = LOOP.replace("NAME", kernel.loop(36.5) + "/")
    assert summed(named) == 36.5 * 2 * 64**3
    assert program.parse(named).uncounted() == []
    assert program.parse(LOOP.replace("NAME", "")).uncounted() == ["the loop jit(run)/moe/while"]


CHOICE = """\
HloModule choice, entry_computation_layout={(pred[])->f32[64,64]{1,0}}

%dear (x: f32[64,64]) -> f32[64,64] {
  %x = f32[64,64]{1,0} parameter(0)
  ROOT %product = f32[64,64]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%cheap (x: f32[64,64]) -> f32[64,64] {
  ROOT %x = f32[64,64]{1,0} parameter(0)
}

ENTRY %main (p: pred[], x: f32[64,64]) -> f32[64,64] {
  %p = pred[] parameter(0)
  %x = f32[64,64]{1,0} parameter(1)
  ROOT %c = f32[64,64]{1,0} conditional(%p, %x, %x), true_computation=%dear, false_computation=%cheap, metadata={op_name="jit(run)/NAMEcond"}
}
"""  # noqa: E501


def test_a_conditions_dearest_branch_runs_each_time_or_as_often_as_its_name_expects():
    assert summed(CHOICE.replace("NAME", kernel.branch(0.375) + "/")) == 0.375 * 2 * 64**3
    assert summed(CHOICE.replace("NAME", "")) == 2 * 64**3
