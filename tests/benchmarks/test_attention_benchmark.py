"""`python -m benchmarks attention`: the table, what is kept of it, and that `auto` takes the fastest kernel."""

from __future__ import annotations

import importlib.util
import json
import re

import jax
import pytest

from benchmarks import cells, record
from benchmarks.__main__ import main
from benchmarks.cells import Cell
from jaxmodels.errors import UserError
from jaxmodels.models.kernels.kernel import Kernel

SIZES = ["--head-dims", "8", "--tokens", "128", "--width", "64", "--rounds", "2"]
SMALL = ["attention", "--calls", "causal", "decode", "--lengths", "64", *SIZES]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A small record, and its folder."""
    folder = tmp_path_factory.mktemp("attention")
    assert main([*SMALL, "--name", "small", "--out", str(folder)]) == 0
    return json.loads((folder / "small.json").read_text()), folder


def test_a_run_measures_what_runs_here_and_lists_the_rest_with_reasons(recorded):
    saved, folder = recorded
    measured = [row for row in saved["rows"] if "ms" in row]
    assert {(row["kind"], row["pass"], row["kernel"]) for row in measured} == {
        (kind, part, kernel)
        for kind, parts in (("causal", ("forward", "backward")), ("decode", ("decode",)))
        for part in parts
        for kernel in ("xla", "blockwise")
    }
    for row in measured:
        assert len(row["all_ms"]) == 2 and row["memory_mib"] >= 0 and 0 <= row["error"] < 1e-5
        if row["pass"] != "backward":  # less than nothing where a busy machine slowed the forward pass alone
            assert row["tflops" if row["kind"] == "causal" else "gb_s"] > 0
    assert {row["kernel"] for row in measured if row["auto"]} <= {"xla", "blockwise"}
    text = (folder / "small.md").read_text()
    assert "not measured: `splash` runs on TPU" in text and "4·B·H·K operations forward" in text
    assert (folder / "small.png").exists()


def test_what_a_record_has_is_not_measured_again(recorded, monkeypatch, capsys):
    saved, folder = recorded
    asked = []
    monkeypatch.setattr(cells, "measure", lambda cell, kernels, rounds: asked.append(cell.key) or [])
    again = [each if each != "decode" else "full" for each in SMALL]
    assert main([*again, "--name", "small", "--out", str(folder)]) == 0
    assert asked == ["full K=8 T=64 tokens=128 width=64 float32"]
    assert json.loads((folder / "small.json").read_text())["rows"] == saved["rows"]
    capsys.readouterr()


def test_a_kernel_that_fails_or_needs_too_much_memory_says_so_and_the_others_are_measured(monkeypatch):
    cell = Cell("causal", 8, 64, 64, 16, "float32")
    real = Cell.program

    def program(self, kernel, part):
        if kernel == "blockwise":
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 1 TiB")
        return real(self, kernel, part)

    monkeypatch.setattr(Cell, "program", program)
    rows = cells.measure(cell, ("xla", "blockwise"), 1)
    assert ["ms" in row for row in rows] == [True, True, False, False]
    assert rows[2]["why"] == "out of memory"
    monkeypatch.setattr(cells, "_room", lambda: 0.0)
    assert cells.measure(cell, ("xla",), 1)[0]["why"].startswith("needs ")


@pytest.mark.parametrize("kind", cells.KINDS)
def test_every_kind_of_call_equals_the_reference(kind):
    rows = cells.parity(Cell(kind, 8, 64, 64, 64, "float32"), ("xla", "blockwise"))
    assert all(row["error"] < 1e-5 for row in rows) and len(rows) == (2 if kind.startswith("decode") else 4)
    (features,) = {tuple(row["call"]["features"]) for row in rows}
    expected = {
        "grouped": "grouped heads", "window": "window", "segments": "segment_ids", "softcap": "softcap",
        "decode": "q_offset array", "decode grouped": "grouped heads",
    }  # fmt: skip
    assert expected.get(kind, "float32") in features


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kernels", "flash"], "got kernel 'flash', expected one of xla"),
        (["--calls", "causl"], "did you mean 'causal'?"),
        (["--head-dims", "48"], "got head size 48 and width 64, expected a divisor, try --width 96"),
        (["--lengths", "100"], "got length 100, expected a multiple of 8, try --lengths 104"),
        (["--on", "v5x"], "got hardware 'v5x'"),
        (["--on", "v5e", "h100", "--name", "x"], "got --name and 2 kinds of hardware"),
        (["--out", "/dev/null"], "got --out /dev/null, which is a file"),
    ],
)
def test_a_mistake_is_answered_in_one_line_before_any_work(arguments, message, capsys):
    assert main(["attention", "--width", "64", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_operations_are_counted_as_flash_attention_2_counts_them():
    # its table's setting: head size 128, 2,048 wide, 16,384 tokens a batch; 4·T²·K·H forward, halved by causality
    full = Cell("full", 128, 8192, 16384, 2048, "bfloat16")
    assert full.flops("forward") == 4 * 8192**2 * 2048 * 2 and (full.B, full.H, full.G) == (2, 16, 16)
    causal = Cell("grouped", 128, 8192, 16384, 2048, "bfloat16")
    assert causal.flops("backward") == 2.5 * 2 * 8192**2 * 2048 * 2 and causal.G == 2
    window = Cell("window", 64, 4096, 4096, 64, "bfloat16")  # 1,024 queries see up to 1,024 keys, the others 1,024
    assert window.flops("forward") == 4 * 64 * (1024**2 / 2 + 3072 * 1024)
    documents = Cell("segments", 64, 512, 512, 64, "bfloat16")
    assert documents.flops("forward") == 4 * 64 * (256**2 + 128**2 + 64**2 + 64**2) / 2
    decode = Cell("decode grouped", 128, 32768, 32768, 2048, "bfloat16")
    assert decode.bytes() == 2 * 32768 * 2 * 128 * 2  # keys and values of two heads


def test_the_error_is_a_share_of_the_largest_value():
    expected = [jax.numpy.array([1.0, -4.0]), jax.numpy.array([100.0])]
    got = [jax.numpy.array([1.0, -3.0]), jax.numpy.array([101.0])]
    assert cells.error(got, expected) == 0.25


def test_calls_are_compiled_for_hardware_that_is_not_here(tmp_path):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("the package libtpu is not installed")
    sizes = ["--calls", "causal", "--lengths", "512", "--head-dims", "128", "--tokens", "512", "--width", "128"]
    assert main(["attention", "--on", "v5e", *sizes, "--kernels", "xla", "splash", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "attention_v5e_compiled.json").read_text())["rows"]
    splash = {row["pass"]: row for row in rows if row["kernel"] == "splash"}
    assert [bool(row["auto"]) for row in rows] == [False, False, True, True]
    assert all(row["memory_mib"] >= 0 and "ms" not in row for row in rows)
    for part, flops in (("forward", 4 * 128 * 512**2 / 2), ("backward", 10 * 128 * 512**2 / 2)):
        assert splash[part]["planned_ms"] > 1e3 * flops / 197e12  # below the peak
    assert "nothing was run" in (tmp_path / "attention_v5e_compiled.md").read_text()


RECORDS = sorted(path for path in record.RESULTS.glob("attention_*.json") if not path.stem.endswith("_compiled"))


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_no_kernel_is_faster_than_the_one_that_auto_takes_by_more_than_5_percent(path, monkeypatch):
    monkeypatch.setattr(Kernel, "absence", lambda self, place: None)  # a record's hardware need not be here
    assert cells.overtaken(json.loads(path.read_text())["rows"]) == []


def test_a_record_in_which_another_kernel_is_faster_is_noticed(recorded, monkeypatch):
    saved, _ = recorded
    rows = [{**row, "ms": 1.0} for row in saved["rows"] if row["pass"] == "forward" and "ms" in row]
    assert cells.overtaken(rows) == []
    taken = next(row for row in rows if row["auto"])
    taken["ms"] = 1.04
    assert cells.overtaken(rows) == []
    taken["ms"] = 1.06
    (line,) = cells.overtaken(rows)
    assert re.search(r"causal K=8 T=64 .*, forward: auto takes (\w+), 1.06 ms, and \w+ takes 1 ms", line)
    with pytest.raises(UserError, match="got a row without its call"):
        cells.overtaken([{"ms": 1.0, "T": 1, "pass": "forward"}])
