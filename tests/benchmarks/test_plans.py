"""What `python -m benchmarks planning` and `measured` ask for, and how the latter compares."""

import shlex

import pytest

from benchmarks import measured, planning
from benchmarks.__main__ import main
from jaxmodels import create
from jaxmodels.commands.options import NoOptions, configured
from jaxmodels.commands.plan import PlanOptions


@pytest.mark.parametrize(("shape", "preset"), [("8b", "llama3-8b"), ("70b", "llama3-70b"), ("405b", "llama3.1-405b")])
def test_planned_models_are_the_published_ones(shape, preset, monkeypatch, root):
    monkeypatch.chdir(root)
    counts = set()
    for job in planning.JOBS.values():
        if job.shape == shape:
            cfg, options = configured(job.arguments()[1:], "plan", PlanOptions)
            assert options.on == job.on
            counts.add(create(cfg.model).count())
    assert counts == {create(preset).count()}


def test_jobs_to_measure_are_configs_with_options_that_they_have(monkeypatch, root):
    monkeypatch.chdir(root)
    found = {name: configured(shlex.split(job), "train", NoOptions)[0] for name, job in measured.JOBS.items()}
    assert len(found) == 5 and len({type(cfg.model) for cfg in found.values()}) == 5
    assert all(cfg.model.dtype == "bfloat16" for cfg in found.values())
    assert 1.2e9 < create(found["llama"].model).count() < 1.3e9


def test_a_plan_is_compared_with_the_steps_between_warm_up_and_evaluation():
    plan = {"memory": {"peak": 3 * 2**30}, "step_seconds": 0.1, "binds": "memory"}
    row = {"perf/step_seconds": 0.08, "perf/memory_gib": 2.5}
    metrics = [
        {"step": 10, "perf/step_seconds": 9.0, "perf/memory_gib": 2.0},
        *({"step": step, **row} for step in (20, 30, 40)),
        {"step": 50, "perf/step_seconds": 0.3, "perf/memory_gib": 2.4},
        {"step": 60, "perf/step_seconds": 9.0, "perf/memory_gib": 7.0},
        {"step": 60, "eval/loss": 1.0},
    ]
    found = measured.compare(plan, metrics)
    assert (found["memory"], found["time"]) == (2.5, 0.08)
    assert found["memory_error"] == pytest.approx(0.2) and found["time_error"] == pytest.approx(0.25)
    assert (found["memory_percent"], found["time_percent"]) == ("+20.0%", "+25.0%")


def test_without_a_gpu_nothing_is_measured(capsys):
    assert main(["measured"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("benchmarks: got cpu") and said.count("\n") == 1
    assert said.endswith(", expected one GPU that is described, try CUDA_VISIBLE_DEVICES=0\n")
    assert main(["planning", "8b-v5"]) == 2
    assert "did you mean '8b-v5e'?" in capsys.readouterr().err
