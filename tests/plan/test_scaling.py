"""How a step scales on paper: what grows, what is said of it, and the picture."""

import dataclasses
import functools
import json

import pytest
from matplotlib import image

from jaxmodels.commands.plan import PlanOptions, planned, topologies_of
from jaxmodels.config import Config, Mesh, Tokens, Train
from jaxmodels.errors import UserError
from jaxmodels.models.llama import LlamaConfig
from jaxmodels.plan import arithmetic, roofline, scaling, topology
from jaxmodels.plan import compile as compiling

CONFIG = Config(
    model=LlamaConfig(vocab_size=512, context=512, layers=4, heads=8, kv_heads=2, width=64, mlp_width=128),
    data=Tokens(seq_len=512, batch_size=64),
    mesh=Mesh(data=1, fsdp=-1),
)
ON = [topology.parse(f"h100:{shape}") for shape in ("1x8", "2x8", "8x8")]
WORK = 80.0
"""Seconds that one device would compute for 64 rows."""


@functools.cache
def judge(cfg):
    """The arithmetic of an experiment, done once for all tests."""
    return arithmetic.Arithmetic(cfg, ON[0])


@pytest.fixture
def fake(monkeypatch):
    """In the compiler's place: perfect products, and what `waits(cfg, devices)` gives of one all-reduce over data."""
    seen = []

    def install(
        waits=lambda cfg, devices: 0.0,
        memory=lambda cfg, devices: 0.0,
        peak=lambda cfg, devices: 1e9,
        compute=lambda cfg: 1.0,
    ):
        def compiled(cfg, topology):
            seen.append((cfg, topology.devices))
            n = topology.devices
            parts = {
                "compute": WORK * cfg.data.batch_size / 64 / n * compute(cfg),
                "memory": memory(cfg, n),
                "waiting for links": waits(cfg, n),
            }
            step = sum(parts.values())
            sent = roofline.Transfer("all-reduce", ("data",), "network", cfg.mesh.data, 2.0**30, 3, waits(cfg, n))
            return {
                "fits": peak(cfg, n) <= topology.hardware.memory,
                "fits_host": True,
                "memory": {"peak": peak(cfg, n), "device": topology.hardware.memory},
                "mesh": dataclasses.asdict(cfg.mesh),
                "parameters": 10**6,
                "step_seconds": step,
                "seconds": parts,
                "transfers": [dataclasses.asdict(sent)],
                "unit": "tokens",
                "per_second": cfg.data.batch_size * 512 / step,
                "per_second_device": cfg.data.batch_size * 512 / step / n,
                "mfu": 0.5,
                "binds": "compute",
            }

        monkeypatch.setattr(scaling, "Arithmetic", lambda cfg, topology: judge(cfg).on(topology))
        monkeypatch.setattr(compiling, "compiled", compiled)
        monkeypatch.setattr(scaling, "figures", lambda cfg, made: made)
        return seen

    return install


def curves(cfg=CONFIG, on=ON):
    first, points = scaling.curves(cfg, on, 2, lambda text: None)
    return first, {(each.mode, each.axis, each.topology.devices): each for each in points}


def test_weak_scaling_keeps_a_device_s_rows_and_strong_scaling_the_batch(fake):
    fake()
    first, points = curves()
    assert first.cfg.mesh == Mesh(data=1, fsdp=8)
    for mode, batch in (("weak", 512), ("strong", 64)):
        for axis in ("data", "fsdp"):
            each = points[mode, axis, 64]
            assert each.cfg.data.batch_size == batch
            assert getattr(each.cfg.mesh, axis) == 8 * getattr(first.cfg.mesh, axis)
            assert each.cfg.mesh.data * each.cfg.mesh.fsdp == 64, "all others stay"
            assert each.efficiency == pytest.approx(1)
    assert {axis for _, axis, _ in points} == {"data", "stage", "fsdp", "context", "tensor"}, "no experts to cut"


def test_what_does_not_divide_ends_an_axis_before_anything_is_compiled(fake):
    seen = fake()
    first, points = curves()
    told = points["strong", "tensor", 64].failure
    assert "kv_heads=2" in told
    assert "tensor=8" in told
    assert all(cfg.mesh.tensor <= 2 and cfg.mesh.stage <= 4 for cfg, _ in seen)
    sentence = scaling.verdict(first, list(points.values()), "strong", "tensor")
    assert sentence.startswith("strong scaling along tensor pays up to 16 devices: at 64 got parameter")


def test_what_stops_an_axis_is_named_with_its_link(fake):
    # along data a sum is waited for, which at 64 devices takes half as long again as the products
    fake(waits=lambda cfg, devices: 5.0 if cfg.mesh.data == 8 else 0.0)
    first, points = curves()
    each = points["weak", "data", 64]
    assert each.efficiency == pytest.approx(10 / 15)
    sentence = scaling.verdict(first, list(points.values()), "weak", "data")
    assert sentence.startswith("weak scaling along data pays up to 16 devices: at 64 the efficiency is 0.67")
    assert "links are waited for 5 s more of a step of 15 s: all-reduce along data over network" in sentence
    assert "(8 devices, 1 GiB, 5 s)" in sentence
    other = scaling.verdict(first, list(points.values()), "weak", "fsdp")
    assert other.startswith("weak scaling along fsdp pays up to 64 devices, the largest size")


def test_memory_that_does_not_shrink_and_steps_too_large_are_told(fake):
    fake(
        memory=lambda cfg, devices: 4.0,
        peak=lambda cfg, devices: 100e9 if cfg.mesh.context > 2 and cfg.data.batch_size > 64 else 1e9,
    )
    first, points = curves()
    sentence = scaling.verdict(first, list(points.values()), "strong", "fsdp")
    assert "strong scaling along fsdp pays up to 16 devices" not in sentence
    assert "bytes between memory and compute take 2 s more" in sentence
    sentence = scaling.verdict(first, list(points.values()), "weak", "context")
    assert sentence == "weak scaling along context pays up to 16 devices: at 64 needs 93 of 79 GiB"


def test_products_that_take_longer_are_a_bubble_or_what_is_not_cut(fake):
    fake(compute=lambda cfg: 1.5 if cfg.mesh.stage > 1 or cfg.mesh.context > 1 else 1.0)
    first, points = curves()
    stage, context = (scaling.verdict(first, list(points.values()), "strong", axis) for axis in ("stage", "context"))
    assert "does not pay: at 16 the efficiency is 0.67, since products take 2.5 s more of a step of 7.5 s" in stage
    assert stage.endswith("stages wait for the first and the last microbatch")
    assert context.endswith("what the axis does not cut is computed by all its devices")


def test_microbatches_shrink_with_the_rows_that_are_left_and_grow_where_memory_is_short(fake):
    fake()
    accumulating = dataclasses.replace(CONFIG, train=Train(accumulate=8))
    _, points = curves(accumulating, ON[:2])
    assert points["strong", "data", 16].cfg.train.accumulate == 4, "so many rows as before at a time"
    assert points["weak", "data", 16].cfg.train.accumulate == 8
    wide = dataclasses.replace(CONFIG.model, width=8192, mlp_width=16384)
    data = dataclasses.replace(CONFIG.data, batch_size=512, seq_len=4096)
    _, points = curves(dataclasses.replace(CONFIG, model=wide, data=data), ON[:2])
    tensor, fsdp = (points["weak", axis, 16].cfg.train.accumulate for axis in ("tensor", "fsdp"))
    assert tensor > 1, "a device has twice the rows"
    assert tensor >= fsdp


def test_the_command_prints_the_curves_and_draws_them(fake, tmp_path, capsys):
    fake(waits=lambda cfg, devices: 0.1 * cfg.mesh.data)
    options = PlanOptions(
        on="h100:1x8,2x8,8x8", scaling=True, out=tmp_path / "curves.png", json=tmp_path / "curves.json"
    )
    planned(CONFIG, options)
    printed = capsys.readouterr().out
    assert "weak scaling from h100:1x8" in printed
    assert "strong scaling along fsdp pays up to 64 devices" in printed
    height, width, _ = image.imread(tmp_path / "curves.png").shape
    assert width > 800 < height + 200
    first, *points, last = json.loads((tmp_path / "curves.json").read_text())
    assert (first["devices"], first["efficiency"]) == (8, 1)
    assert {each["devices"] for each in points} == {16, 64}
    assert len(last["verdicts"]) == 10


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ("h100:1x8", "expected several sizes"),
        ("h100:1x8,v5p:4x4x4", "expected one kind of hardware"),
        ("h100:2x8,1x8", "expected sizes that grow"),
        ("h100:2x8,3x8", "in multiples of 16 devices"),
    ],
)
def test_sizes_that_make_no_curve_are_refused(names, told):
    with pytest.raises(UserError, match="got --scaling on") as refused:
        scaling.check_sizes(topologies_of(names))
    assert told in str(refused.value)


def test_a_first_size_on_which_nothing_runs_is_told(fake):
    fake(peak=lambda cfg, devices: 1e12)
    with pytest.raises(UserError, match=r"got h100:1x8, expected a first size .*needs 931 of 79 GiB.*try a larger"):
        curves()


def test_a_first_size_without_a_time_is_told(fake, monkeypatch):
    fake()
    untimed = {"fits": True, "fits_host": True, "uncounted": ["the kernel mine"]}
    untimed["memory"] = {"peak": 1e9, "device": 1e10}
    monkeypatch.setattr(scaling, "figures", lambda cfg, made: untimed)
    with pytest.raises(UserError, match=r"got h100:1x8, expected a first size .*no time is given for the kernel mine"):
        curves()


def test_all_axes_that_cut_something_are_offered():
    assert scaling.offered(judge(CONFIG)) == ["data", "stage", "fsdp", "context", "tensor"]
