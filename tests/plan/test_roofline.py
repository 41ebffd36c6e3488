"""The time of a schedule: products, collectives over the links that they cross, and what the host holds."""

import dataclasses

import numpy as np
import pytest

from jaxmodels.plan import hlo, program, roofline, topology

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
    assert covered.launching == pytest.approx(roofline.shares(topology.parse("h100:1x8").hardware)["launch"])
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


ROUND = """HloModule m, is_scheduled=true

ENTRY %main (a: bf16[4096,4096]) -> bf16[4096,4096] {
  %a = bf16[4096,4096]{1,0} parameter(0)
  %one = (bf16[4096,4096], bf16[4096,4096], u32[], u32[]) collective-permute-start(%a), channel_id=1, source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  %two = (bf16[4096,4096], bf16[4096,4096], u32[], u32[]) collective-permute-start(%a), channel_id=2, source_target_pairs=PAIRS
  %got = bf16[4096,4096]{1,0} collective-permute-done(%one)
  ROOT %other = bf16[4096,4096]{1,0} collective-permute-done(%two)
}
"""  # noqa: E501


def test_what_goes_round_a_ring_one_way_is_not_in_the_way_of_the_other():
    once = 4096 * 4096 * 2 / (50e9 * 0.9)
    where = topology.Topology(topology.parse("v5e:4x4").hardware, (4, 1))  # one dimension of the torus
    places = roofline.Places(where, {"tensor": 4}, where.coordinates())
    for pairs, times in (("{{0,3},{3,2},{2,1},{1,0}}", 1), ("{{0,1},{1,2},{2,3},{3,0}}", 2)):
        got = roofline.estimate(program.parse(ROUND.replace("PAIRS", pairs)), places, "bfloat16")
        assert got.seconds == pytest.approx(times * once, rel=0.01)


SPARSECORE = """HloModule m, is_scheduled=true

%called_computation.7 (p0: bf16[32000,1024], p1: s32[4096]) -> bf16[4096,1024] {
  %p0 = bf16[32000,1024]{1,0} parameter(0)
  %p1 = s32[4096]{0} parameter(1)
  ROOT %rows = bf16[4096,1024]{1,0} gather(%p0, %p1), offset_dims={1}, collapsed_slice_dims={0}, slice_sizes={1,1024}
}, execution_thread="sparsecore"

%called_computation.6 (p0: bf16[32000,128]) -> bf16[32000,1024] {
  %p0 = bf16[32000,128]{1,0} parameter(0)
  ROOT %all-gather.22 = bf16[32000,1024]{1,0} all-gather(%p0), channel_id=129, replica_groups=[1,8]<=[8], dimensions={1}
}, execution_thread="sparsecore"

ENTRY %main (a: bf16[32000,128], i: s32[4096]) -> bf16[4096,1024] {
  %a = bf16[32000,128]{1,0} parameter(0)
  %i = s32[4096]{0} parameter(1)
  %all-gather.call-start = ((), (), (s32[8192]{0})) custom-call-start(), async_execution_thread="sparsecore", custom_call_target="TODO(b/522284627)", called_computations={%called_computation.6}
  %all-gather.call-update = ((bf16[32000,128]{1,0}), bf16[32000,1024]{1,0}, (s32[8192]{0})) custom-call-update(%all-gather.call-start, %a)
  %table = bf16[32000,1024]{1,0} custom-call-done(%all-gather.call-update)
  %gather.call-start = ((bf16[32000,1024], s32[4096]), bf16[4096,1024], u32[]) call-start(%table, %i), async_execution_thread="sparsecore", to_apply=%called_computation.7, frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="jit(run)/embed/gather"}
  ROOT %rows = bf16[4096,1024]{1,0} call-done(%gather.call-start)
}
"""  # noqa: E501


def test_what_a_sparsecore_gathers_and_sends_is_counted_and_waited_for():
    where = topology.parse("v5p:2x2x2")
    places = roofline.Places(where, {"fsdp": 8}, where.coordinates())
    got = roofline.estimate(program.parse(SPARSECORE), places, "bfloat16")
    (sent,) = got.transfers
    assert (sent.kind, sent.bytes, sent.axes) == ("all-gather", 32000 * 1024 * 2, ("fsdp",))
    gathered = 2 * 4096 * 1024 * 2 + 4 * 4096  # rows there and here, and which they are
    assert got.moved == gathered
    assert got.seconds == pytest.approx(sent.seconds + gathered / (2765e9 * 0.88), rel=0.01)
    assert got.waiting == pytest.approx(got.seconds, rel=0.01), "nothing else is there to do"
    assert got.memory == 0


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
    assert program.parse(text).uses_host() and not program.parse(text.replace("S(5)", "S(1)")).uses_host()
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


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[256]{0}", 1024),
        ("(f32[256]{0}, bf16[8]{0})", 1040),
        ("((f32[256]{0}), f32[256]{0})", 1024),
        ("((f32[256]{0}, bf16[8]{0}), (f32[256]{0}, bf16[8]{0}))", 1040),
    ],
    ids=["one", "several", "one with what it takes", "several with what they take"],
)
def test_a_sum_that_begins_is_counted_once_whether_its_shape_names_what_it_takes(shape, size):
    each = hlo.Instruction("all-reduce-start", shape, "all-reduce-start", ["a"], "")
    assert roofline.payload(each, 4) == size


HOSTED = "(bf16[8,4,64]{2,1,0:S(5)}, bf16[1,4,64]{2,1,0}, s32[])"


@pytest.mark.parametrize(
    ("opcode", "shape", "size"),
    [
        ("dynamic-update-slice-start", f"({HOSTED}, bf16[8,4,64]{{2,1,0:S(5)}}, u32[])", 512),  # TPUs
        ("dynamic-slice-start", "((bf16[8,4,64]{2,1,0:S(5)}, s32[]), bf16[1,4,64]{2,1,0}, u32[])", 512),
        ("fusion-start", "((bf16[8,4,64]{2,1,0:S(5)}, s32[]), bf16[1,4,64]{2,1,0}, u32[])", 512),  # GPUs
        ("copy-start", "(bf16[4,64]{1,0}, bf16[4,64]{1,0:S(5)}, u32[])", 512),
        ("copy", "bf16[4,64]{1,0:S(5)}", 512),
    ],
)
def test_a_slice_that_goes_to_the_host_or_comes_from_there_is_a_transfer_of_the_slice(opcode, shape, size):
    each = hlo.Instruction("x", shape, opcode, [], "")
    assert each.kind == hlo.HOST
    assert roofline.payload(each, 1) == size
    assert dataclasses.replace(each, shape=shape.replace("S(5)", "S(1)")).kind is None
