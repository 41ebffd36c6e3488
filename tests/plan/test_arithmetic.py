"""Guesses by arithmetic: over odd meshes, refused in one line, or within what any step must keep and take."""

import dataclasses
import itertools
import math

import pytest

from jaxmodels.config import Config, Mesh, Metrics
from jaxmodels.errors import UserError
from jaxmodels.models import families
from jaxmodels.models.config import ModelConfig
from jaxmodels.models.inputs import token_inputs
from jaxmodels.models.mixtral import MixtralConfig
from jaxmodels.plan import topology
from jaxmodels.plan.arithmetic import Arithmetic
from tests.sections import data_of, task_of
from tests.zoo import ZOO

AXES = ("data", "fsdp", "tensor", "context", "expert", "stage")
ODD = ("h100:1x1", "h100:1x2", "h100:1x3", "h100:1x6", "v5e:2x4", "v5p:2x2x3", "h100:5x8")
"""One device, numbers that nothing divides, and more devices than rows, layers, heads or tokens."""


def meshes(devices: int) -> list[Mesh]:
    """Every way to give the devices to one or two of the axes."""
    sizes = [size for size in range(1, devices + 1) if devices % size == 0]
    found = []
    for each in itertools.product(sizes, repeat=len(AXES)):
        if math.prod(each) == devices and sum(size > 1 for size in each) < 3:
            mesh = Mesh(**dict(zip(AXES, each, strict=True)))
            found += [mesh, dataclasses.replace(mesh, sequence=True)] if mesh.tensor > 1 else [mesh]
    return found


@pytest.fixture(scope="module", params=["mixtral", "t5", "resnet"])
def judged(request):
    """The guess of each odd mesh that is not refused, by topology; and the arithmetic itself."""
    task, model = ZOO[request.param]
    data = data_of("synthetic", seq_len=16, batch_size=24)
    cfg = Config(model, task_of(task), data, mesh=Mesh(), metrics=Metrics(loggers=()))
    whole, found, refused = Arithmetic(cfg, topology.parse(ODD[0])), {}, []
    for on in map(topology.parse, ODD):
        here = whole.on(on)
        for mesh in meshes(on.devices):
            try:
                found[on.name, mesh] = here.guess(dataclasses.replace(cfg, mesh=mesh))
            except UserError as error:
                refused.append(str(error))
    return whole, found, refused


def test_an_odd_mesh_is_refused_in_one_line_or_holds_the_state_and_takes_time(judged):
    whole, found, refused = judged
    assert len(found) > 20 and len(refused) > 20
    assert all(said.startswith("got ") and ", expected " in said and "\n" not in said for said in refused)
    state = 4 * sum(math.prod(shape) for shape, _ in whole.parameters) * (1 + whole.copies)
    for (on, mesh), guess in found.items():
        where = on, mesh, guess
        assert guess.arguments * topology.parse(on).devices >= 0.999 * state, where
        assert guess.peak > guess.kept >= guess.arguments > 0 and guess.activations > 0, where
        assert guess.seconds >= guess.least > 0, where


def test_more_devices_along_an_axis_never_need_more_memory_each_nor_are_faster_than_in_proportion(judged):
    _, found, _ = judged
    compared = 0
    for (on, mesh), guess in found.items():
        for (_, other), more in found.items():
            grown = [axis for axis in AXES if getattr(other, axis) != getattr(mesh, axis)]
            # more stages make more microbatches in flight
            if on.startswith("h100") and len(grown) == 1 and grown != ["stage"]:
                (axis,) = grown
                same = dataclasses.replace(mesh, **{axis: getattr(other, axis)}) == other
                if same and getattr(other, axis) % getattr(mesh, axis) == 0:
                    times = getattr(other, axis) / getattr(mesh, axis)
                    assert more.peak <= guess.peak * 1.001, (mesh, other)
                    assert more.seconds * times >= guess.seconds * 0.999, (mesh, other)
                    compared += 1
    assert compared > 20


@dataclasses.dataclass(frozen=True)
class OwnMixture(ModelConfig):
    """A mixture from outside the tree, whose fields have other names than ours."""

    context: int = 256
    vocab_size: int = 512
    sent: float = 1.0

    def dispatched(self):
        return self.sent


def test_a_mixture_from_outside_says_how_many_rows_its_tokens_send(monkeypatch):
    monkeypatch.setattr(families, "_registered", dict(families._registered))
    monkeypatch.setattr(families.FAMILIES, "_registered", {})
    inner = MixtralConfig(
        vocab_size=512, context=256, layers=1, heads=4, kv_heads=4, width=64, mlp_width=32, experts=4
    )  # fmt: skip
    ours = families.family("mixtral")
    families.register(
        families.Family(
            "own-mixture",
            OwnMixture,
            lambda c: ours.network(inner),
            token_inputs,
            unembedding=lambda c, params: ours.unembedding(inner, params),
        )
    )
    data = data_of("synthetic", seq_len=256, batch_size=64)
    cfg = Config(OwnMixture(), data=data, mesh=Mesh(data=1, fsdp=8, expert=4))
    judged = Arithmetic(cfg, topology.parse("h100:4x8"))

    def seconds(sent):
        judged.cfg = dataclasses.replace(cfg, model=OwnMixture(sent=sent))
        return judged.guess(cfg).seconds

    first, twice, thrice = (seconds(sent) for sent in (1.0, 2.0, 3.0))
    assert twice > first and thrice - twice == pytest.approx(twice - first, rel=1e-6)
