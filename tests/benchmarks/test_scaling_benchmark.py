"""`python -m benchmarks scaling`: points from axes, efficiency, what is kept, and collectives as planned."""

import dataclasses
import json

import jax
import pytest

from benchmarks import collectives, curves, point, scaling
from benchmarks.__main__ import main
from benchmarks.record import kept
from jaxmodels.config import Classification, Config, Mesh, Synthetic, Train
from jaxmodels.errors import UserError
from jaxmodels.models.mlp import MLPConfig
from jaxmodels.plan import program as programs
from jaxmodels.plan.groups import groups_of

CONFIG = Config(
    model=MLPConfig(input_shape=(4, 4, 1), hidden=(6,), classes=8),
    task=Classification(),
    data=Synthetic(batch_size=8),
    train=Train(accumulate=4),
)


def row(curve="weak data", devices=1, seconds=1.0, rate=100.0, **more):
    """A point as it stands in a record."""
    spread = {"low": seconds, "median": seconds, "high": seconds}
    return {
        "curve": curve, "mode": curve.split()[0], "axes": ["data"], "devices": devices, "processes": 1, "nodes": 1,
        "mesh": {"data": devices}, "batch_size": 8, "platform": "cuda", "failure": "",
        "unit": "tokens", "units": rate * seconds, "seconds": spread, "per_second": rate,
        "memory": {"peak": 2**30, "by": "allocator"}, "arguments": 4096,
        "collectives": [], "step": {"collectives": {}, "alone": 0.0, "work": seconds, "idle": 0.0}, "untold": "",
        "plan": {"failure": "no compiler"}, **more,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("growth", "axes", "sizes"),
    [
        (8, ("fsdp",), {"fsdp": 8}),
        (8, ("data", "fsdp"), {"data": 2, "fsdp": 4}),
        (2, ("fsdp", "data"), {"fsdp": 2, "data": 1}),
        (12, ("data", "tensor"), {"data": 4, "tensor": 3}),
        (8, ("data", "fsdp", "tensor"), {"data": 2, "fsdp": 2, "tensor": 2}),
        (1, ("data",), {"data": 1}),
    ],
)
def test_growth_is_divided_among_axes_and_the_rest_goes_inward(growth, axes, sizes):
    assert scaling.dealt(growth, axes) == sizes


def test_weak_points_keep_the_rows_of_a_device_and_strong_ones_the_batch():
    def points(mode, *axes, config=CONFIG, sizes=(1, 2, 4)):
        return scaling.curve(config, mode, axes, sizes, jax.devices(), {})

    weak, strong = points("weak", "data", "fsdp"), points("strong", "data")
    assert [each.config.data.batch_size for each in weak] == [8, 16, 32]
    assert [(each.config.mesh.data, each.config.mesh.fsdp) for each in weak] == [(1, 1), (1, 2), (2, 2)]
    assert [each.config.data.batch_size for each in strong] == [8, 8, 8]
    assert [each.config.train.accumulate for each in strong] == [4, 2, 1]
    assert not any(each.failure for each in weak + strong)
    # what the config fixes stays, and only the rest grows
    fixed = dataclasses.replace(CONFIG, mesh=Mesh(tensor=2))
    assert [vars(each.config.mesh)["data"] for each in points("weak", "data", config=fixed, sizes=(2, 4))] == [1, 2]
    with pytest.raises(UserError, match=r"got --devices 1, expected a multiple of 2, the config's mesh, try 2"):
        points("weak", "data", config=fixed)
    # six units cannot be on four devices: the point says so, and the others stay
    cut = points("strong", "tensor")
    assert [bool(each.failure) for each in cut] == [False, False, True] and "mlp=6" in cut[2].failure
    with pytest.raises(UserError, match="got --devices 16, expected at most the 8 that are here"):
        points("weak", "data", sizes=(16,))


def test_efficiency_is_the_throughput_of_a_device_against_the_smallest_points():
    plan = {"step_seconds": 1.0, "per_second": 100.0}
    first = row(rate=100.0, plan={**plan, "seconds": {}})
    found = curves.judged(
        [
            row(devices=8, rate=600.0, plan={**plan, "per_second": 700.0, "seconds": {}}),
            first,
            row("strong data", devices=2, rate=150.0),
            row("strong data", devices=4, rate=240.0),
            row("strong data", devices=8, failure="no rows are left"),
        ]
    )
    assert [(each["devices"], each["efficiency"]) for each in found] == [
        (1, 1.0), (8, 0.75), (2, 1.0), (4, 0.8), (8, None),
    ]  # fmt: skip
    assert [each["planned_efficiency"] for each in found] == [1.0, 0.875, None, None, None]
    assert found[2]["said"] == "no plan: no compiler" and found[-1]["said"] == "no rows are left"


def test_the_reason_for_a_gap_to_the_plan_is_what_takes_most_of_it():
    expected = {"compute": 0.5, "memory": 0.2, "waiting for links": 0.1, "launches": 0.0}
    plan = {"step_seconds": 0.8, "seconds": expected, "per_second": 125.0}
    took = {"collectives": {"fsdp": 0.5}, "alone": 0.4, "work": 0.75, "idle": 0.05}
    (slow,) = curves.judged([row(seconds=1.2, step=took, plan=plan)])
    assert slow["said"] == "+50% to the plan, most by collectives beside which nothing runs: 400, planned 100 ms"
    (near,) = curves.judged([row(seconds=0.9, step=took, plan=plan)])
    assert near["said"] == "+12% to the plan"
    parts = {**took, "alone": 0.1, "work": 0.7, "idle": 0.0}
    (other,) = curves.judged([row(seconds=1.2, step=parts, plan=plan)])
    assert other["said"] == "+50% to the plan, and no part of the trace is"
    first = row(seconds=1.0, step={"collectives": {}, "alone": 0.0, "work": 1.0, "idle": 0.0})
    behind = row(devices=8, seconds=1.2, step={**took, "work": 1.0, "alone": 0.2, "idle": 0.0}, efficiency=5 / 6)
    assert curves.lost(first, behind) == (
        "weak data: efficiency 0.83 at 8 devices, a step takes 200 ms more than ideal; 200 ms more are collectives, "
        "most along fsdp"
    )


def test_on_hardware_that_is_known_the_plan_is_beside_each_point(tmp_path):
    sent = {"kind": "all-gather", "axes": "data", "count": 4.0, "bytes": 2.0**20}
    took = {"collectives": {"data": 0.2}, "alone": 0.1, "work": 0.85, "idle": 0.05}
    expected = {"compute": 0.8, "memory": 0.0, "waiting for links": 0.1, "launches": 0.0}
    plan = {"memory": 2**29, "step_seconds": 0.9, "per_second": 111.0, "seconds": expected}
    first = row(plan={**plan, "collectives": []})
    second = row(devices=2, rate=180.0, step=took, collectives=[sent])
    second["plan"] = {**plan, "per_second": 222.0, "collectives": [{**sent, "seconds": 0.1}]}
    text = curves.write(tmp_path, "h100", "Scaling", [first, second], "--data synthetic", draw=True).read_text()
    for cell in ("| 0.9 | 900 | 1 |", "4 all-gather data, 1 MiB | data 200 (planned 100) | 1 GiB | 0.5 GiB | +11% to"):
        assert cell in text, text
    assert "the config with --data synthetic" in text and "MEAN NOTHING" not in text
    assert "weak data: efficiency 0.90 at 2 devices" in text and (tmp_path / "h100.png").stat().st_size > 10_000


def test_time_in_collectives_is_told_from_the_work_beside_them():
    seen = collectives.Seen()
    seen.spans = {"data": [(0, 4e9), (2e9, 6e9)], "fsdp": [(20e9, 22e9)]}
    seen.others = [(3e9, 5e9), (10e9, 14e9)]
    found = collectives.times(seen, steps=2)
    assert found == {"collectives": {"data": 3.0, "fsdp": 1.0}, "alone": 3.0, "work": 3.0}


def test_what_ran_otherwise_than_planned_is_named():
    ran = [{"kind": "all-reduce", "axes": "data", "count": 2.0, "bytes": 2048.0}]
    plan = [{"kind": "all-reduce", "axes": "data", "count": 3.0, "bytes": 3072.0}]
    assert curves.difference(row(collectives=ran, plan={"collectives": ran, "arguments": 4096})) == ""
    assert curves.difference(row(collectives=ran, plan={"collectives": plan, "arguments": 1024})) == (
        "all-reduce data: 2 of 2 KiB ran, 3 of 3 KiB were planned; state and batch have 4 KiB a device, planned were "
        "1 KiB"
    )
    assert "0 of 0 KiB were planned" in curves.difference(row(collectives=ran, plan={"collectives": []}))


def test_fused_and_unnamed_collectives_are_told():
    held = {name: collectives.Collective("all-reduce", "data", 4.0, 1.0) for name in "ab"}
    seen = {"counts": {"a": 3, "b": 3}}
    assert point.untold(held, [seen, seen], 2) == ""
    assert point.untold(held, [seen], 2) == "the trace shows 1 of 2 devices"
    assert point.untold(held, [{"counts": {"a": 3}}], 1) == "the trace does not name 1 of 2 collectives"
    assert "other collectives" in point.untold(held, [seen, {"counts": {"a": 3}}], 2)
    fused = {"a": dataclasses.replace(held["a"], fused=True)}
    assert point.untold(fused, [{"counts": {"a": 3}}], 1).startswith("1 collectives run inside fusions")


class Device:
    """What a device says of itself."""

    def __init__(self, kind, process=0, coords=(0, 0, 0), slice_index=0):
        self.device_kind, self.process_index = kind, process
        self.coords, self.slice_index = coords, slice_index


def test_devices_of_known_hardware_have_a_topology():
    gpus = [Device("NVIDIA H100 80GB HBM3", process) for process in range(8)]
    assert point.topology(gpus, ["a"] * 4 + ["b"] * 4) == "h100:2x4"
    assert point.topology(gpus[:1], ["a"]) == "h100:1x1"
    with pytest.raises(UserError, match="as many on each node"):
        point.topology(gpus, ["a"] * 3 + ["b"] * 5)
    chips = [Device("TPU v5 lite", 0, (x, y, 0), s) for s in range(2) for x in range(4) for y in range(2)]
    assert point.topology(chips[:8], []) == "v5e:4x2" and point.topology(chips, []) == "v5e:2x4x2"
    with pytest.raises(UserError, match="no box"):
        point.topology(chips[:3], [])


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """The command of a user on two points, its exit code, and what it left."""
    folder = tmp_path_factory.mktemp("scaling")
    file = folder / "tiny.py"
    file.write_text(
        "from jaxmodels.config import Classification, Config, Synthetic, Train\n"
        "from jaxmodels.models.mlp import MLPConfig\n\n\n"
        "def get_config():\n"
        "    model = MLPConfig(input_shape=(8, 8, 1), hidden=(32, 32), classes=8)\n"
        "    data, train = Synthetic(batch_size=16), Train(accumulate=2)\n"
        "    return Config(model=model, task=Classification(), data=data, train=train)\n"
    )
    command = ["scaling", str(file), "--axes", "fsdp", "--devices", "2", "4", "--modes", "weak", "--steps", "2"]
    command += ["--name", "tiny", "--out", str(folder)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(point, "TRACED", 1)
        code = main(command)
    return command, code, json.loads((folder / "tiny.json").read_text()), folder


def test_what_ran_on_virtual_devices_is_what_was_planned(recorded):
    _, code, record, folder = recorded
    assert code == 0 and [each["said"] for each in record["rows"]] == ["counts and bytes as planned"] * 2
    for each in record["rows"]:
        assert each["collectives"] == each["plan"]["collectives"] and each["arguments"] == each["plan"]["arguments"]
        # gradients are summed in the loop over two microbatches, which the program has once and the trace twice
        sums = [sent for sent in each["collectives"] if sent["kind"] in ("all-reduce", "reduce-scatter")]
        assert {sent["axes"] for sent in sums} == {"fsdp"} and sum(sent["count"] for sent in sums) >= 2 * 2
        assert each["seconds"]["low"] <= each["seconds"]["median"] <= each["seconds"]["high"]
        assert len(each["times"]) == 2 and each["step"]["collectives"]["fsdp"] > 0 and each["untold"] == ""
    half, quarter = (each["arguments"] for each in record["rows"])
    assert quarter < half
    text = (folder / "tiny.md").read_text()
    assert "MEAN NOTHING HERE" in text and "as planned at 2 of 2 points" in text
    assert (folder / "tiny.png").stat().st_size > 10_000


def test_points_that_are_done_are_not_run_again(recorded, monkeypatch, capsys):
    command, _, record, folder = recorded
    monkeypatch.setattr(point, "measure", lambda *_: pytest.fail("it was run again"))
    assert main(command) == 0
    again = json.loads((folder / "tiny.json").read_text())
    assert [each["times"] for each in again["rows"]] == [each["times"] for each in record["rows"]]
    asked = []
    monkeypatch.setattr(point, "measure", lambda name, cfg, *_: asked.append(cfg.mesh.fsdp) or record["rows"][0])
    changed = folder / "other.json"
    rows = [{**each, "base": {**each["base"], "code": "older"}} for each in record["rows"]]
    changed.write_text(json.dumps({"rows": [rows[0], record["rows"][1]]}))
    assert main([*command, "--name", "other"]) == 2  # an option that is given twice
    command = [*command[:-4], "--name", "other", "--out", str(folder)]
    assert main(command) == 0 and asked == [2]
    assert "measured anew what had another code" in capsys.readouterr().out


def test_a_step_that_is_not_as_planned_is_an_error(recorded, monkeypatch, capsys):
    command, _, record, folder = recorded
    sent = [{**each, "count": each["count"] + 1} for each in record["rows"][0]["plan"]["collectives"]]
    found = {**record["rows"][0], "plan": {**record["rows"][0]["plan"], "collectives": sent}}
    monkeypatch.setattr(point, "measure", lambda *_: found)
    assert main([*command[:-4], "--name", "wrong", "--out", str(folder)]) == 1
    assert "2 of 2 points were not as planned" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--axes", "dat"], "got mesh axis 'dat', expected one of data, stage"),
        (["--axes", "data,data"], "got --axes data,data, expected each axis once, try --axes data"),
        (["--modes", "week"], "got mode 'week', expected one of weak, strong"),
        (["--devices", "2", "3"], "got --devices 3, expected a multiple of 2, the smallest number, try 4"),
        (["--devices", "0"], "at least 1"),
        (["--steps", "1"], "at least 2"),
        (["--axis", "data"], "did you mean '--axes'?"),
        (["--override=--train.strategy pmap"], "got train.strategy pmap, expected jit"),
        (["--override=--data.batch-size 3", "--devices", "2"], "got data.batch_size 3, expected a multiple of 2"),
        (["--out", "/dev/null"], "got --out /dev/null, which is a file"),
    ],
)
def test_a_mistake_is_one_line_before_any_work(arguments, expected, capsys):
    assert main(["scaling", "configs/gpt_peers.py", *arguments]) == 2
    said = capsys.readouterr().err.strip()
    assert expected in said and "\n" not in said


def test_a_record_of_other_hardware_and_what_is_no_record_are_refused(recorded):
    _, _, record, folder = recorded
    base = record["rows"][0]["base"]
    with pytest.raises(UserError, match=r"of NVIDIA H100, expected .*, which is here, try another --name"):
        other = [{**record["rows"][0], "base": {**base, "hardware": "NVIDIA H100"}}]
        (folder / "h100.json").write_text(json.dumps({"rows": other}))
        kept(folder / "h100.json", base, "scaling")
    (folder / "none.json").write_text("[]")
    with pytest.raises(UserError, match="expected a record of scaling"):
        kept(folder / "none.json", base, "scaling")
    assert kept(folder / "absent.json", base, "scaling") == []


PROGRAM = """HloModule step

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

ENTRY %main (x: f32[8]) -> f32[16] {
  %x = f32[8]{0} parameter(0)
  %start = f32[8]{0} all-reduce-start(%x), channel_id=1, replica_groups=[2,2]<=[4], to_apply=%add
  %done = f32[8]{0} all-reduce-done(%start)
  ROOT %gathered = f32[16]{0} all-gather(%done), channel_id=2, replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}
}
"""


def test_axes_of_collectives_follow_from_their_groups_and_a_done_counts_for_its_start():
    program = programs.parse(PROGRAM)
    held = collectives.held(program, {"data": 2, "fsdp": 2}, lambda text: groups_of(text, 4))
    assert {name: (each.kind, each.axes, each.bytes) for name, each in held.items()} == {
        "start": ("all-reduce", "fsdp", 32.0),
        "gathered": ("all-gather", "data", 64.0),
    }
    main = program.computations[program.entry]
    assert collectives._begun(main.instructions["done"], main) == "start"
