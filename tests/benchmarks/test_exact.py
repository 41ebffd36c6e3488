"""The records of `python -m benchmarks exact`: a step that is as recorded passes, any other is told by what changed."""

import json

import pytest

from benchmarks import counts, exact
from jaxmodels.errors import UserError

SMALL = ("mlp_mnist", "--data.batch-size", "16")


@pytest.fixture(scope="module")
def recorded():
    """The record of a small step on the CPU devices of this process, and a function that measures other options."""
    with pytest.MonkeyPatch.context() as patch:

        def measured(*options, old, hidden="16"):
            patch.setitem(exact.CASES, "small", exact.Case((*SMALL, "--model.hidden", hidden, *options)))
            return exact.measure("small-cpu", old)

        yield measured(old={}), measured


def test_a_step_that_has_not_changed_is_not_compiled_again(recorded, monkeypatch):
    record, measured = recorded
    monkeypatch.setattr(counts, "counts", lambda *_: pytest.fail("it was compiled"))
    assert measured(old=record) == record and exact.differences(record, record) == []


def test_counts_are_those_of_the_step(recorded):
    record, _ = recorded
    products = 3 * 2 * 16 * (784 * 16 + 16 * 10) - 2 * 16 * 784 * 16  # the images have no gradient
    assert record["flops"] == {"model": products, "program": products}
    parameters = 4 * (784 * 16 + 16 + 16 * 10 + 10)
    reduced = record["collectives"]["all-reduce data"]
    assert parameters <= reduced["bytes"] <= parameters + 64
    assert record["layers"]["MLP/hidden0 dot_general"]["flops"] == 2 * 16 * 784 * 16 / 8


def test_a_change_is_told_by_its_layer_with_the_numbers_before_and_after(recorded):
    record, measured = recorded
    said = exact.differences(record, measured(hidden="32", old=record))
    assert any(line.startswith("flops: program ") and line.endswith("(+100.00%)") for line in said)
    before, after = 2 * 16 * 784 * 16 / 8, 2 * 16 * 784 * 32 / 8
    assert f"layers: MLP/hidden0 dot_general: flops {before:.6g} -> {after:.6g} (+100.00%)" in said
    # the totals stand in front of the layers
    sections = [line.partition(":")[0] for line in said]
    assert sections.index("layers") > max(k for k, name in enumerate(sections) if name in ("flops", "instructions"))


def test_a_part_that_an_older_record_does_not_name_has_changed_only_if_there_is_some_of_it(recorded):
    record, _ = recorded
    with_part = {**record, "bytes of memory": {**record["bytes of memory"], "teacher": 0}}
    assert exact.differences(record, with_part) == [] == exact.differences(with_part, record)
    with_part["bytes of memory"]["teacher"] = 8
    assert exact.differences(record, with_part) == ["bytes of memory: teacher is new: 8"]


def test_what_has_no_record_or_does_not_compile_fails(recorded):
    record, measured = recorded
    assert exact.differences({}, record) == ["it has no record"]
    assert measured("--mesh.data", "3", old=record).startswith("got mesh")


def test_a_record_of_other_compilers_is_refused(recorded):
    record, _ = recorded
    exact.check_versions({"small-cpu": record, "none-cpu": {}})
    other = {**record, "versions": {**record["versions"], "jaxlib": "0.1"}}
    with pytest.raises(UserError, match=r"got a record of small-cpu of jax .*, jaxlib 0\.1, expected jax"):
        exact.check_versions({"small-cpu": other})


def test_code_that_reads_programs_counts_as_changed_and_its_comments_do_not(monkeypatch, tmp_path):
    for name in counts.READERS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('"""Reads."""\n\ndef f(x):\n    """Twice."""\n    return 2 * x\n')
    monkeypatch.setattr(counts.jaxmodels, "__file__", str(tmp_path / "__init__.py"))
    before = counts.reading()
    (tmp_path / counts.READERS[0]).write_text("def f(x):\n    # two of them\n    return 2 * x\n")
    assert counts.reading() == before
    (tmp_path / counts.READERS[0]).write_text("def f(x):\n    return 3 * x\n")
    assert counts.reading() != before


@pytest.mark.parametrize(
    ("label", "layer"),
    [
        ("jit(run)/jvp(GPT2)/GPT2.body/while/body/closed_call/layers/attn/q/dot_general",
         "GPT2/GPT2.body/layers/attn/q dot_general"),
        ("jit(run)/transpose(jvp(GPT2))/GPT2.body/norm/reduce_sum", "GPT2/GPT2.body/norm backward reduce_sum"),
        ("jit(run)/transpose(jvp(vmap(jit(_where))))/select_n", "_where backward select_n"),
        ("jit(run)/lt", "outside of layers lt"),
        ("loop_broadcast_fusion.16", "unnamed loop_broadcast_fusion"),
    ],
)  # fmt: skip
def test_labels_are_read_as_layers(label, layer):
    assert counts.layer(label) == layer


def test_every_case_has_a_record_of_itself():
    for name in exact.NAMES:
        found = exact.read(exact.RECORDS, name)
        assert found, f"{name} has no record, run python -m benchmarks exact --accept {name}"
        case, _, hardware = name.rpartition("-")
        config, on = f"configs/{exact.CASES[case].config[0]}.py", f"--on {exact.ON[hardware]}"
        assert found["command"].endswith(on) and config in found["command"]
        assert found["program"] and found["layers"] and found["flops"]["program"] > 0
    assert {path.stem for path in exact.RECORDS.glob("*.json")} == set(exact.NAMES)


def test_a_damaged_record_is_refused_in_one_line(tmp_path):
    (tmp_path / "mlp-cpu.json").write_text("{")
    with pytest.raises(UserError, match="expected a record"):
        exact.read(tmp_path, "mlp-cpu")
    assert exact.read(tmp_path, "mlp-h100") == {}


def test_the_table_shows_what_a_record_holds(tmp_path, recorded):
    (tmp_path / "small-cpu.json").write_text(json.dumps(recorded[0]))
    assert "| small-cpu | " in exact.table(tmp_path, ["small-cpu", "none-cpu"])
    assert exact.table(tmp_path, ["none-cpu"]) == f"there are no records in {tmp_path}"
