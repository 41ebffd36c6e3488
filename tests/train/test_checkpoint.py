"""Checkpoints: the same bits back, on any mesh, and the newest and the best are kept."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.errors import UserError
from jaxmodels.train.checkpoint import Checkpointer
from tests.quick import own_lines
from tests.train.checkpoints import (
    State,
    abstract_of,
    bits,
    make_mesh,
    make_state,
    save,
)


@pytest.mark.parametrize("shape", [(4, 2), (8,), (2, 2), (1,)], ids=str)
def test_the_same_bits_come_back_on_any_mesh(tmp_path: Path, state: State, shape: tuple[int, ...]) -> None:
    save(Checkpointer(tmp_path), 7, state)
    abstract = abstract_of(state, make_mesh(*shape))
    found = Checkpointer(tmp_path).restore(abstract)
    assert found is not None
    got, meta, step = found
    assert (step, meta["step"]) == (7, 7)
    assert jax.tree.structure(got) == jax.tree.structure(state)
    assert bits(got) == bits(state)
    assert got.rng["layers"].dtype == state.rng["layers"].dtype
    for leaf, expected in zip(jax.tree.leaves(got), jax.tree.leaves(abstract), strict=True):
        assert leaf.sharding.is_equivalent_to(expected.sharding, leaf.ndim)


def test_leaves_without_a_sharding_come_back_on_the_host(tmp_path: Path) -> None:
    host = {"a": np.arange(6, dtype=np.int64).reshape(2, 3), "b": 2.5}
    save(Checkpointer(tmp_path), 1, host)  # type: ignore[arg-type]
    found = Checkpointer(tmp_path).restore(host)
    assert found is not None and bits(found[0]) == bits({"a": host["a"], "b": np.float64(2.5)})
    assert isinstance(found[0]["a"], np.ndarray)


def test_donated_and_changed_arrays_do_not_change_what_is_saved(tmp_path: Path) -> None:
    mesh = make_mesh(8)
    sharding = jax.sharding.NamedSharding(mesh, jax.P("data"))
    clear = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    tree = {"device": jax.device_put(np.arange(2**20, dtype=np.float32), sharding), "host": np.arange(3.0)}
    expected = bits(tree)
    clear(jnp.copy(tree["device"]))
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, tree, {})
    tree["device"] = clear(tree["device"]).block_until_ready()
    tree["host"] *= 0
    checkpointer.wait()
    found = checkpointer.restore({"device": jax.ShapeDtypeStruct((2**20,), np.float32), "host": tree["host"]})
    assert found is not None and bits(found[0]) == expected


def test_no_checkpoint_is_none_and_costs_no_orbax(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom jaxmodels.train.checkpoint import Checkpointer\n"
        f"c = Checkpointer({str(tmp_path / 'none')!r}); assert c.steps() == [] and c.restore({{}}) is None\n"
        "c.wait(); assert c.best() is None and 'orbax' not in sys.modules, 'orbax was imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
    assert not (tmp_path / "none").exists()


def test_params_are_read_without_the_rest(tmp_path: Path, state: State) -> None:
    checkpointer = Checkpointer(tmp_path)
    save(checkpointer, 1, state, best=True)
    save(checkpointer, 2, make_state(make_mesh(4, 2), 2))
    params, meta, step = Checkpointer(tmp_path).restore_params("best")
    assert (step, meta["step"]) == (1, 1)
    assert isinstance(params["embed"]["w"], np.ndarray)
    assert bits(params["embed"]) == bits(state.params["embed"])
    assert params["layers"]["0"]["w"].dtype == jnp.bfloat16
    mesh = make_mesh(8)
    again, _, _ = Checkpointer(tmp_path).restore_params(1, abstract=abstract_of(state, mesh).params)
    assert bits(again) == bits(state.params)
    assert len(again["embed"]["w"].sharding.device_set) == 8
    assert Checkpointer(tmp_path).restore_params()[2] == 2
    with pytest.raises(UserError, match="got no 'ema'.*expected one of step, params, opt_state, rng"):
        Checkpointer(tmp_path).restore_params(subtree="ema")
    with pytest.raises(UserError, match=r"got step 5, expected one of \[1, 2\]"):
        Checkpointer(tmp_path).restore_params(5)
    with pytest.raises(UserError, match="got no checkpoint"):
        Checkpointer(tmp_path / "none").restore_params()


def test_another_structure_is_refused_in_one_line(tmp_path: Path, state: State) -> None:
    save(Checkpointer(tmp_path), 1, state)
    abstract = abstract_of(state, make_mesh(8))
    params = dict(abstract.params) | {"embed": {"w": jax.ShapeDtypeStruct((16, 9), jnp.bfloat16)}}
    params["new"] = jax.ShapeDtypeStruct((), np.int32)
    del params["counts"]
    for path in (tmp_path / "1" / "state").rglob("*"):
        if path.is_file():
            path.unlink()  # the answer comes before any array is read
    with pytest.raises(UserError) as caught:
        Checkpointer(tmp_path).restore(abstract._replace(params=params))
    message = str(caught.value)
    assert "params/embed/w is float32[16,8], expected bfloat16[16,9]" in message
    assert "params/new is missing, expected int32[]" in message
    assert "params/counts/i is int8[2], expected none of that name" in message
    assert "\n" not in message


def test_the_newest_and_the_best_are_kept(tmp_path: Path, state: State) -> None:
    checkpointer = Checkpointer(tmp_path, keep=2)
    for step in range(6):
        save(checkpointer, step, state, best=step in (0, 1))
    assert checkpointer.steps() == [1, 4, 5]
    assert json.loads((tmp_path / "best.json").read_text()) == {"step": 1, "metric": 0.5}
    save(checkpointer, 6, state, best=True)
    assert checkpointer.steps() == [5, 6]
    assert checkpointer.best() == json.loads((tmp_path / "best.json").read_text()) == {"step": 6, "metric": 1 / 7}


def test_the_same_step_can_be_saved_again(tmp_path: Path, state: State) -> None:
    checkpointer = Checkpointer(tmp_path)
    save(checkpointer, 3, make_state(make_mesh(1), 9))
    save(checkpointer, 3, state)
    assert checkpointer.steps() == [3]
    found = checkpointer.restore(abstract_of(state, make_mesh(1)))
    assert found is not None and bits(found[0]) == bits(state)


def test_paths_are_readable_in_what_is_written(tmp_path: Path, state: State) -> None:
    save(Checkpointer(tmp_path), 1, state)
    tree = json.loads((tmp_path / "1" / "manifest.json").read_text())["tree"]
    assert tree["params/layers/0/w"] == "bfloat16[8,8]"
    assert tree["opt_state/1/0/mu/w"] == "float32[16,8]"
    assert tree["rng/loop"] == "key<fry>[]"
    orbax = json.loads((tmp_path / "1" / "state" / "_METADATA").read_text())["tree_metadata"]
    assert "('params', 'layers', '0', 'w')" in orbax
    assert len([path for path in (tmp_path / "1").rglob("*") if path.is_file()]) < 20


def test_a_users_terminal_stays_quiet(tmp_path: Path) -> None:
    code = (
        "import sys, logging, jax, numpy as np\nlogging.basicConfig(level=logging.INFO)\n"
        "from jaxmodels.train.checkpoint import Checkpointer\n"
        "c = Checkpointer(sys.argv[1]); c.warm(); tree = {'w': jax.numpy.ones((8, 8)), 'n': np.ones(3)}\n"
        "c.save(1, tree, {}); c.wait(); c.restore(tree); c.restore_params(subtree='w'); c.save(2, tree, {}); c.wait()"
    )
    command = [sys.executable, "-W", "default", "-c", code, str(tmp_path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    said = re.sub(r".*site-packages/(?!orbax).*Warning.*\n.*\n", "", done.stderr)
    assert (done.stdout, own_lines(said)) == ("", [])
