"""The table of logical axes, and what is refused by it."""

import ast
import math
import re

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxmodels import create
from jaxmodels.config import Mesh
from jaxmodels.errors import UserError
from jaxmodels.parallel import rules
from jaxmodels.parallel.mesh import across, make_mesh, sizes


def test_names_become_mesh_axes():
    assert rules.spec(("layers", "embed", "heads", "head_dim")) == P("stage", "fsdp", "tensor", None)
    assert rules.spec(("batch", "seq", None)) == P(("data", "fsdp", "expert"), "context", None)


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'heads'"):
        rules.spec(("haeds",))


def test_two_dimensions_on_one_mesh_axis_are_refused():
    with pytest.raises(ValueError, match="'heads' and 'mlp'.*both are on 'tensor'"):
        rules.spec(("heads", "mlp"))


def test_a_dimension_that_does_not_divide_is_refused_by_name():
    model = create("gpt2", layers=1, width=32, heads=4, vocab_size=65, context=8)
    mesh = make_mesh(Mesh(data=1, fsdp=4, tensor=2))
    with pytest.raises(UserError, match=r"embed/w with dimension vocab=65, expected a multiple of mesh axis tensor=2"):
        rules.shardings_of(mesh, model.axes(), model.shapes())


@pytest.mark.parametrize(
    ("mesh", "said"),
    [
        (Mesh(data=3), "data=3 stage=1 fsdp=1 expert=1 context=1 tensor=1 = 3 device.s., expected 8"),
        (Mesh(data=-1, fsdp=3), "expected sizes that divide 8"),
        (Mesh(data=-1, fsdp=-1), "at most one -1"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(mesh, said):
    with pytest.raises(UserError, match=said):
        sizes(mesh, 8)


def test_a_mesh_axis_of_no_device_is_refused():
    with pytest.raises(UserError, match="got mesh.data 0, expected at least 1, or -1"):
        Mesh(data=0)


def test_minus_one_takes_the_devices_that_are_left():
    rest = {"stage": 1, "fsdp": 1, "expert": 1, "context": 1}
    assert sizes(Mesh(data=-1, tensor=2), 8) == {"data": 4, **rest, "tensor": 2}


def test_a_mesh_says_itself_whether_tokens_between_products_are_cut_over_tensor():
    residual = ("batch", "residual", None)
    cuts = []
    for sequence in (False, True):
        mesh = make_mesh(Mesh(data=2, context=2, tensor=2, sequence=sequence))
        assert mesh.size == 8
        placed = jax.device_put(np.zeros((2, 8, 3)), rules.sharding(mesh, residual))
        cuts.append(placed.addressable_shards[0].data.shape)
    assert cuts == [(1, 4, 3), (1, 2, 3)]


def test_activations_are_pinned_under_a_mesh_and_left_alone_without():
    x = np.zeros((8, 4, 16), np.float32)
    assert rules.constrain(x, ("batch", "seq", None)) is x
    mesh = make_mesh(Mesh(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        pinned = jax.jit(lambda x: rules.constrain(x, ("batch", "seq", "mlp")))(x)
        odd = jax.jit(lambda x: rules.constrain(x, ("batch", "seq", "mlp")))(x[:, :, :3])
    assert pinned.addressable_shards[0].data.shape == (2, 4, 8)
    assert odd.addressable_shards[0].data.shape == (2, 4, 3), "a dimension that does not divide stays whole"


def test_nothing_but_the_table_spells_a_mesh_axis(root):
    """Mesh axes appear as strings in rules.py alone (config/sections.py names them as fields)."""
    found = []
    for path in (root / "jaxmodels").rglob("*.py"):
        if path == root / "jaxmodels" / "parallel" / "rules.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and node.value in ("fsdp", "tensor"):
                found.append(f"{path.name}:{node.lineno}")
            if isinstance(node, ast.Name) and re.fullmatch(r"PartitionSpec|NamedSharding", node.id):
                text = ast.unparse(node)
                assert "data" not in text
    assert not found, found


def test_only_models_import_flax(root):
    users = {
        str(path.relative_to(root / "jaxmodels").parts[0])
        for path in (root / "jaxmodels").rglob("*.py")
        if re.search(r"^\s*(import|from) flax", path.read_text(), re.M)
    }
    assert users == {"models"}


class Chip:
    """A TPU of one of several slices, as JAX describes it."""

    platform, device_kind, core_on_chip = "tpu", "TPU v5 lite", 0

    def __init__(self, number, place):
        self.slice_index, self.coords, self.id, self.process_index = number, (*place, 0), place, number


@pytest.mark.parametrize(
    ("cfg", "across"),
    [
        (Mesh(data=2, fsdp=4), ("data",)),
        (Mesh(data=4, fsdp=2), ("data",)),
        (Mesh(data=1, fsdp=4, tensor=2), ("fsdp",)),
        (Mesh(data=1, stage=2, fsdp=2, tensor=2), ("stage",)),
    ],
    ids=lambda x: x[0] if isinstance(x, tuple) else "",
)
def test_only_the_outermost_axis_goes_across_slices(cfg, across):
    chips = [Chip(number, place) for place in np.ndindex(2, 2) for number in (0, 1)]
    mesh = make_mesh(cfg, chips)
    numbers = np.vectorize(lambda chip: chip.slice_index)(mesh.devices)
    varies = tuple(axis for i, axis in enumerate(mesh.axis_names) if np.ptp(numbers, axis=i).any())
    assert varies == across
    assert len({(chip.slice_index, chip.coords) for chip in mesh.devices.flat}) == 8


def test_a_mesh_that_does_not_go_across_the_slices_is_refused():
    chips = [Chip(number, place) for number in range(3) for place in np.ndindex(2, 1)]
    assert make_mesh(Mesh(data=3, fsdp=2), chips).shape["data"] == 3
    chips = [Chip(number, place) for number in range(4) for place in np.ndindex(3, 1)]
    assert make_mesh(Mesh(data=2, fsdp=6), chips).size == 12, "two of four slices each"
    with pytest.raises(UserError, match="try --mesh.data 4"):
        across({"data": 3, "fsdp": 3}, 4)


@pytest.mark.parametrize("cfg", [Mesh(data=2, fsdp=2, context=2), Mesh(data=1, fsdp=4, tensor=2)])
def test_what_devices_hold_apart_is_scattered_while_it_is_added_up(cfg):
    mesh = make_mesh(cfg)
    rows, along = (rules.shards(mesh.shape, rules.RULES[name]) for name in ("batch", "seq"))
    parts = np.random.default_rng(0).normal(size=(rows, along, 16, 64)).astype(np.float32)
    with jax.set_mesh(mesh):
        add_up = jax.jit(lambda x: rules.add_up(x, ("batch", "seq"), ("vocab", "embed")))
        placed = jax.device_put(parts, rules.sharding(mesh, ("batch", "seq", "vocab", None)))
        program = add_up.lower(placed).compile()
    total = program(placed)
    np.testing.assert_allclose(total, parts.sum((0, 1)), rtol=1e-5, atol=1e-5)
    assert total.sharding.is_equivalent_to(rules.sharding(mesh, ("vocab", "embed")), 2)
    whole = 16 // cfg.tensor * 64 * 4
    sums = [line for line in program.as_text().splitlines() if re.search(r" all-reduce(-start)?\(", line)]
    sizes = [math.prod(map(int, re.search(r"f32\[([\d,]+)\]", line).group(1).split(","))) * 4 for line in sums]
    assert sizes.count(whole) == 1, "the sum over fsdp"
    pieces = {size for size in sizes if size != whole}
    assert pieces == ({whole // cfg.fsdp} if cfg.data > 1 else set()), "over data and context"
