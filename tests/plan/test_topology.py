"""Hardware and its shapes, by name."""

import pytest

from jaxmodels.errors import UserError
from jaxmodels.parallel import hardware
from jaxmodels.plan import topology


def test_each_row_says_where_its_numbers_come_from_and_is_found_by_what_jax_calls_it():
    for row in hardware.TABLE:
        assert row.source
        assert row.flops["bfloat16"] > 0
        assert bool(row.cores and row.target) == (row.platform == "cuda")
        assert bool(row.dimensions and row.wraps) == (row.platform == "tpu")

        class Device:
            device_kind = row.kinds[0]

        assert hardware.peak(Device, "bfloat16") == row.flops["bfloat16"], row.name


@pytest.mark.parametrize(
    ("text", "devices"),
    [
        ("h100:4x8", 32),
        ("v5e:16x16", 256),
        ("v5e:1x1", 1),
        ("v5e:2x1x1", 2),
        ("v5p:8x8x16", 1024),
        ("gb200:2x72", 144),
        ("v7:4x4x4", 128),
        ("v5e:2x16x16", 512),
        ("v5p:4x4x4x8", 512),
    ],
)
def test_a_topology_has_so_many_devices(text, devices):
    found = topology.parse(text)
    assert found.devices == devices
    assert found.name == text


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("H100:1x8", "did you mean 'h100'"),
        ("h100", "try h100:4x8"),
        ("h100:8", "nodes x GPUs"),
        ("h100:1x16", "try h100:2x8"),
        ("v5p:8x8", "3 dimensions"),
        ("v5e:0x4", "at least 1"),
        ("h100:0x8", "at least 1, and not 0"),
        ("h100:-1x8", "hardware and shape"),
        ("h100:٣x8", "hardware and shape"),
        (f"h100:{'9' * 5000}x8", "hardware and shape"),
        ("h100:999999999x8", "at most 131,072 devices"),
        ("v5e:3x5", "1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16, or others of whole hosts"),
        ("v5e:32x32", "the 256 chips of a pod"),
        ("v5p:1x1x2", "1x1x1, 2x2x1, 2x2x2, 2x2x4, 2x4x4, 4x4x4"),
        ("h100:1x2x4", "nodes x GPUs"),
    ],
)
def test_what_is_not_hardware_is_refused_with_what_would_be(text, told):
    with pytest.raises(UserError, match="got ") as refused:
        topology.parse(text)
    assert told in str(refused.value)


def test_devices_lie_slice_by_slice():
    assert topology.Topology(hardware.find("v7"), (1, 1, 2), 2).coordinates().tolist() == [
        [0, 0, z, core, number] for number in (0, 1) for z in (0, 1) for core in (0, 1)
    ]
    assert topology.parse("h100:2x2").coordinates().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
