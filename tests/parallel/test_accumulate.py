"""Microbatches, and a pipeline's ticks: each replica adds up its own gradients, which are summed over data once."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from jaxmodels.config import Mesh
from jaxmodels.plan import program, roofline, topology
from jaxmodels.train import step
from tests.parallel import steps, test_zoo_steps

MODELS = {**steps.MODELS, "deep": dataclasses.replace(steps.MODELS["llama"], layers=4)}


@pytest.mark.parametrize(
    ("name", "cfg", "alone"),
    [
        ("llama", Mesh(data=2, context=2, tensor=2, sequence=True), {}),  # of the whole batch
        ("mixtral", Mesh(data=2, expert=2), {"accumulate": 2}),  # whose auxiliary losses are of a microbatch
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_microbatches_give_the_steps_of_one_device(name, cfg, alone):
    """A pipeline's steps of several replicas are in test_pipeline.py."""
    got = steps.measure(MODELS[name], cfg, accumulate=2)
    np.testing.assert_allclose(got, steps.alone(MODELS[name], **alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet", "clip"])
def test_batch_statistics_and_pairs_are_those_of_a_microbatch_on_all_replicas(name):
    (params, stats), metrics, before, _ = test_zoo_steps.train(name, Mesh(), 1, accumulate=2)
    (params2, stats2), metrics2, _, _ = test_zoo_steps.train(name, Mesh(data=2), 2, accumulate=2)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5)
    jax.tree.map(close, jax.device_get((params2, stats2, metrics2)), jax.device_get((params, stats, metrics)))
    assert any(
        np.abs(np.asarray(a) - b).max() > 1e-4 for a, b in zip(*map(jax.tree.leaves, (params, before)), strict=True)
    )


def collectives(name, cfg, accumulate, monkeypatch):
    """(kind, mesh axes) of a step's collectives, with how often each is made and its bytes."""
    lowered, lower = [], step.lower
    monkeypatch.setattr(step, "lower", lambda *given, **options: lowered.append(lower(*given, **options)) or lowered[0])
    _, _, mesh = steps.prepare(MODELS[name], cfg, accumulate=accumulate)
    where = topology.parse(f"h100:1x{mesh.size}")
    places = roofline.Places(where, dict(mesh.shape), where.coordinates())
    for _, each, times in program.parse(lowered[0].compile().as_text()).walk():
        if each.kind:
            yield each.kind, places.axes(places.groups(each.attributes)), times, program.size(each.shape)


@pytest.mark.parametrize(
    ("name", "cfg", "accumulate"),
    [("llama", Mesh(data=2, fsdp=2), 2), ("deep", Mesh(data=2, stage=2, fsdp=2), 1)],
    ids=["microbatches", "ticks"],
)
def test_gradients_go_over_data_once(name, cfg, accumulate, monkeypatch):
    found = list(collectives(name, cfg, accumulate, monkeypatch))
    over = [(times, size) for _, axes, times, size in found if "data" in axes]
    assert {times for times, _ in over} == {1}
    assert any(times > 1 for _, axes, times, _ in found if axes == ("fsdp",)), "fsdp's come with each pass"
    model = MODELS[name]
    blocks = model.layers * (16 * 16 * 3 + 3 * 16 * 32)
    pieces = 4 * (2 * steps.V * 16 + blocks / cfg.stage) / cfg.fsdp
    assert pieces <= sum(size for _, size in over) < 1.1 * pieces, "what a device holds"
