"""`python -m benchmarks attention`."""

from __future__ import annotations

import json

import jax
import pytest

from benchmarks import attention as benchmark
from benchmarks.__main__ import main

SMALL = ["attention", "--lengths", "64", "96", "--rounds", "2", "--batch", "1", "--heads", "2", "--head-dim", "8"]


def test_a_run_measures_what_runs_here_and_lists_the_rest_with_reasons(tmp_path, capsys):
    assert main([*SMALL, "--kv-heads", "1", "--out", str(tmp_path)]) == 0
    saved = json.loads((tmp_path / "attention_cpu.json").read_text())
    rows = saved["rows"]
    assert {(row["T"], row["pass"]) for row in rows} == {
        (T, part) for T in (64, 96) for part in ("forward", "forward+backward")
    }
    assert {"xla", "blockwise"} <= {row["kernel"] for row in rows}
    for row in rows:
        assert row["ms"] > 0 and len(row["all_ms"]) == 2 and row["memory_mib"] > 0 and 0 <= row["error"] < 1e-5
    text = (tmp_path / "attention_cpu.md").read_text()
    assert "not measured: `splash` runs on TPU" in text and "half of it as causal" in text
    assert "wrote" in capsys.readouterr().out and (tmp_path / "attention_cpu.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kernels", "flash"], "got kernel 'flash', expected some of xla"),
        (["--kv-heads", "3"], "got 2 heads and 3 of keys"),
        (["--kernels", "splash"], "got no kernel that runs here, splash runs on TPU"),
    ],
)
def test_a_mistake_is_answered_in_one_line(arguments, message, tmp_path, capsys):
    assert main([*SMALL, "--out", str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_operations_are_counted_as_flash_attention_2_counts_them():
    # Its table's setting: head size 128, 2,048 wide, 16,384 tokens a batch; 4·T²·K·H forward, halved by causality.
    whole = benchmark.Options(batch=2, heads=16, head_dim=128, causal=False)
    assert benchmark.flops(whole, 8192, backward=False) == 4 * 8192**2 * 2048 * 2
    causal = benchmark.Options(batch=2, heads=16, head_dim=128, causal=True)
    assert benchmark.flops(causal, 8192, backward=True) == 3.5 * 2 * 8192**2 * 2048 * 2


def test_the_error_is_a_share_of_the_largest_value():
    expected = [jax.numpy.array([1.0, -4.0]), jax.numpy.array([100.0])]
    got = [jax.numpy.array([1.0, -3.0]), jax.numpy.array([101.0])]
    assert benchmark.error(got, expected) == 0.25
