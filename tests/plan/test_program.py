"""Programs read from their text: FLOPs, loops, groups of devices, and the time that a schedule takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxmodels.plan import program, roofline, topology
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


SENDING = """HloModule m, is_scheduled=true

ENTRY %main (a: bf16[8192,8192], b: bf16[8192,8192], w: bf16[1024,8192]) -> bf16[8192,8192] {{
  %a = bf16[8192,8192]{{1,0}} parameter(0)
  %w = bf16[1024,8192]{{1,0}} parameter(1)
  %start = (bf16[1024,8192], bf16[8192,8192]) all-gather-start(%w), channel_id=1, replica_groups=[1,8]<=[8]
{before}  %done = bf16[8192,8192]{{1,0}} all-gather-done(%start)
{after}}}
"""
PRODUCT = """  %c = bf16[8192,8192]{1,0} dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}
"""


def played(text, on="h100:1x8"):
    where = topology.parse(on)
    places = roofline.Places(where, {"fsdp": 8}, np.array([[0, i] for i in range(8)]))
    return roofline.estimate(program.parse(text), places, "bfloat16")


def test_a_collective_is_waited_for_only_where_nothing_covers_it():
    covered = played(SENDING.format(before=PRODUCT, after=""))
    bare = played(SENDING.format(before="", after=PRODUCT))
    (sent,) = covered.transfers
    assert (sent.kind, sent.axes, sent.link, sent.devices, sent.count) == ("all-gather", ("fsdp",), "switch", 8, 1)
    assert sent.bytes == 8192 * 8192 * 2
    assert covered.waiting == 0
    assert bare.waiting == pytest.approx(sent.seconds)
    assert bare.seconds == pytest.approx(covered.seconds + sent.seconds)
    assert covered.products == pytest.approx(2 * 8192**3 / (989e12 * roofline.OWN["h100"]["products"]))


@pytest.mark.parametrize(
    ("left", "right", "on", "peak"),
    [
        ("f8e5m2", "f8e4m3fn", "h100:1x8", "float8"),
        ("s8", "s8", "h100:1x8", "int8"),
        ("bf16", "f8e4m3fn", "h100:1x8", "bfloat16"),
        ("s8", "s8", "v5e:2x4", "int8"),
        ("f8e4m3fn", "f8e4m3fn", "v5e:2x4", "bfloat16"),
    ],
)
def test_a_product_runs_at_the_peak_of_its_own_type_where_the_hardware_has_one(left, right, on, peak):
    text = f"""HloModule m, is_scheduled=true

ENTRY %main (a: {left}[8192,8192], b: {right}[8192,8192]) -> bf16[8192,8192] {{
  %a = {left}[8192,8192]{{1,0}} parameter(0)
  %b = {right}[8192,8192]{{1,0}} parameter(1)
  ROOT %c = bf16[8192,8192]{{1,0}} dot(%a, %b), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
}}
"""
    row = topology.parse(on).hardware
    expected = 2 * 8192**3 / (row.flops[peak] * roofline.shares(row)["products"])
    assert played(text, on).products == pytest.approx(expected)


def test_a_kernel_of_attention_that_takes_its_masks_as_bytes_is_none_of_int8():
    text = """HloModule m, is_scheduled=true

ENTRY %main (m: s8[8,8], n: s8[8,8], q: bf16[8,1024,128], k: bf16[8,1024,128]) -> bf16[8,1024,128] {
  %m = s8[8,8]{1,0} parameter(0)
  %n = s8[8,8]{1,0} parameter(1)
  %q = bf16[8,1024,128]{2,1,0} parameter(2)
  %k = bf16[8,1024,128]{2,1,0} parameter(3)
  ROOT %splash_mha = bf16[8,1024,128]{2,1,0} custom-call(%m, %n, %q, %k), custom_call_target="tpu_custom_call"
}
"""
    found = program.parse(text)
    (computation,) = found.computations.values()
    assert [
        kind for each in computation.instructions.values() for kind, _ in program.products(found, computation, each)
    ] == [""]


def test_a_group_takes_the_slowest_link_that_it_crosses():
    where = topology.parse("h100:2x8")
    places = roofline.Places(where, {"data": 2, "tensor": 8}, np.array([[i // 8, i % 8] for i in range(16)]))
    node, across, all_of_them = [list(range(8))], [[0, 8]], [list(range(16))]
    assert places.link(node) == ("switch", 450e9)
    assert places.link(across) == ("network", 50e9), "one adapter of each node"
    assert places.link(all_of_them) == ("network", 8 * 50e9), "all adapters of a node together"
    assert places.axes(node) == ("tensor",)
    assert places.axes(across) == ("data",)
    assert places.axes(all_of_them) == ("data", "tensor")


def test_a_torus_sends_both_ways_along_each_dimension_that_is_closed():
    where = topology.parse("v5p:4x4x2")
    chips = where.coordinates()
    places = roofline.Places(where, {"fsdp": 8, "tensor": 4}, chips)
    line = [[i for i, chip in enumerate(chips) if chip[1] == 0 and chip[2] == 0]]
    short = [[i for i, chip in enumerate(chips) if chip[0] == 0 and chip[1] == 0]]
    plane = [[i for i, chip in enumerate(chips) if chip[2] == 0]]
    assert places.link(line) == ("torus, 1D", 2 * 100e9)
    assert places.link(short) == ("torus, 1D", 100e9), "two chips are no ring"
    assert places.link(plane) == ("torus, 2D", 4 * 100e9)


BETWEEN = """HloModule m, is_scheduled=true

ENTRY %main (a: bf16[512,1024]) -> bf16[1024,1024] {
  %a = bf16[512,1024]{1,0} parameter(0)
  %begin = token[] after-all()
  %send = (bf16[512,1024]{1,0}, u32[], token[]) send(%a, %begin), channel_id=2, is_host_transfer=true, AMONG
  %recv = (bf16[1024,1024]{1,0}, u32[], token[]) recv(%begin), channel_id=1, is_host_transfer=true, AMONG
  %sent = token[] send-done(%send), channel_id=2
  %got = (bf16[1024,1024]{1,0}, token[]) recv-done(%recv), channel_id=1
  %whole = bf16[1024,1024]{1,0} get-tuple-element(%got), index=0
  ROOT %sum = bf16[1024,1024]{1,0} all-reduce(%whole), channel_id=1, replica_groups={{0,1},{2,3}}, to_apply=%add
}
"""


@pytest.mark.parametrize("target", ['"{1,2}x{0:3}"', "{{100000,200000},{100001,200001},{100003,200003}}"])
def test_what_slices_send_each_other_goes_over_the_network(target):
    among = f'frontend_attributes={{_xla_megascale_target={target},_xla_megascale_transfer_type="ALL_GATHER"}}'
    where = topology.parse("v5e:2x2x2")
    places = roofline.Places(where, {"data": 2, "fsdp": 2, "tensor": 2}, where.coordinates())
    got = roofline.estimate(program.parse(BETWEEN.replace("AMONG", among)), places, "bfloat16")
    between, inside = sorted(got.transfers, key=lambda each: each.kind)
    assert (between.kind, between.axes, between.link, between.devices) == ("all-gather", ("data",), "network", 2)
    assert between.bytes == pytest.approx(1024 * 1024 * 2, abs=4)
    assert (inside.kind, inside.axes, inside.link) == ("all-reduce", ("tensor",), "torus, 1D")
    assert got.waiting == pytest.approx(between.seconds + inside.seconds), "both are waited for"


SCATTERED = """HloModule m, is_scheduled=true

%all-reduce-scatter (input: f32[1024,1024]) -> f32[1024,128] {
  %input = f32[1024,1024]{1,0} parameter(0)
  %sum = f32[1024,1024]{1,0} all-reduce(%input), channel_id=3, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  %zero = u32[] constant(0)
  ROOT %own = f32[1024,128]{1,0} dynamic-slice(%sum, %zero, %zero), dynamic_slice_sizes={1024,128}
}

ENTRY %main (a: f32[1024,1024]) -> f32[1024,128] {
  %a = f32[1024,1024]{1,0} parameter(0)
  ROOT %f = f32[1024,128]{1,0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter
}
"""


def test_a_sum_of_which_a_tpu_keeps_a_piece_is_a_reduce_scatter():
    (sent,) = played(SCATTERED).transfers
    assert (sent.kind, sent.bytes, sent.devices) == ("reduce-scatter", 4 * 1024**2, 8)


def test_what_a_kernel_reads_of_the_host_s_memory_takes_that_link_s_time():
    text = """HloModule m, is_scheduled=true

ENTRY %main (a: f32[1024,1024], b: f32[1024,1024]) -> f32[1024,1024] {
  %a = f32[1024,1024]{1,0:S(5)} parameter(0)
  %b = f32[1024,1024]{1,0} parameter(1)
  %c = f32[1024,1024]{1,0} bitcast(%a)
  %start = (f32[1024,1024]{1,0:S(5)}, f32[1024,1024]{1,0}, u32[]) copy-start(%b)
  %done = f32[1024,1024]{1,0:S(5)} copy-done(%start)
  ROOT %sum = f32[1024,1024]{1,0} add(%b, %c)
}
"""
    got = played(text)
    (copied,) = got.transfers
    assert (copied.kind, copied.link, copied.bytes) == ("host copy", "host", pytest.approx(4 * 1024**2, abs=4))
    assert got.memory == pytest.approx(4 * 1024**2 * (3 / (3352e9 * 0.88) + 1 / (64e9 * 0.8)))


def test_collectives_of_a_gpu_are_told_apart_though_they_share_a_channel():
    text = """HloModule m, is_scheduled=true

ENTRY %main (a: f32[1024,1024]) -> f32[1024,1024] {
  %a = f32[1024,1024]{1,0} parameter(0)
  %x = f32[1024,1024]{1,0} all-reduce(%a), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %y = f32[1024,1024]{1,0} all-reduce(%x), channel_id=1, replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%add
}
"""
    assert sorted((each.devices, each.count) for each in played(text).transfers) == [(2, 1), (4, 1)]
