"""Checkpoints: the same bits back, complete or absent, and never a silent fresh start."""

from __future__ import annotations

import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmodels.errors import UserError
from jaxmodels.train import arrays, checkpoint
from jaxmodels.train.checkpoint import Checkpointer, CheckpointError
from jaxmodels.train.manifest import render
from tests.quick import FLAGS, own_lines


class State(NamedTuple):
    step: Any
    params: Any
    stats: Any
    opt_state: Any
    ema: Any
    rng: Any


def make_mesh(*shape: int) -> jax.sharding.Mesh:
    auto = (jax.sharding.AxisType.Auto,) * len(shape)
    return jax.make_mesh(
        shape, ("data", "fsdp")[: len(shape)], axis_types=auto, devices=jax.devices()[: np.prod(shape)]
    )


def shardings(tree, mesh: jax.sharding.Mesh):
    def rule(leaf):
        fits = leaf.ndim == 2 and leaf.shape[0] % mesh.devices.size == 0 and leaf.size
        return jax.sharding.NamedSharding(mesh, jax.P(mesh.axis_names) if fits else jax.P())

    return jax.tree.map(rule, tree)


def make_state(mesh: jax.sharding.Mesh, seed: int = 0) -> State:
    rng = np.random.default_rng(seed)
    params = {
        "embed": {"w": rng.normal(size=(16, 8)).astype(np.float32)},
        "layers": [
            {"w": jnp.asarray(rng.normal(size=(8, 8)), jnp.bfloat16), "b": np.array([seed, np.inf, -0.0], np.float16)}
        ],
        "counts": {
            "i": np.array([seed, -1], np.int8),
            "mask": np.array([True, False]),
            "none": None,
            "empty": {},
            "tuple": (),
        },
        "nothing": np.zeros((0, 8), np.float32),
    }
    params = jax.tree.map(jnp.asarray, params)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    keys = {"loop": jax.random.key(seed), "layers": jax.random.split(jax.random.key(seed, impl="rbg"), 3)}
    state = State(jnp.int32(seed), params, {}, tx.init(params["embed"]), None, keys)
    return jax.device_put(state, shardings(state, mesh))


def abstract_of(state: State, mesh: jax.sharding.Mesh) -> State:
    shapes = jax.eval_shape(lambda: state)
    return jax.tree.map(lambda s, sharding: s.update(sharding=sharding), shapes, shardings(shapes, mesh))


def bits(tree) -> dict[str, tuple]:
    def raw(leaf):
        leaf = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        return str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes()

    return {jax.tree_util.keystr(path): raw(leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def save(checkpointer: Checkpointer, step: int, state: State, *, best: bool = False) -> None:
    checkpointer.save(step, state, {"step": step, "metric": 1 / (step + 1)}, best=best)
    checkpointer.wait()


def restored_step(folder: Path, state: State) -> int:
    found = Checkpointer(folder).restore(abstract_of(state, make_mesh(1)))
    assert found is not None
    return found[2]


def some_file(folder: Path, name: str) -> Path:
    return max((path for path in folder.rglob(name) if path.is_file()), key=lambda path: path.stat().st_size)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.fixture
def state() -> State:
    return make_state(make_mesh(4, 2), 1)


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


def test_what_killed_runs_left_is_removed_and_a_replaced_one_is_put_back(tmp_path: Path, state: State) -> None:
    save(Checkpointer(tmp_path), 1, state)
    (tmp_path / "1").rename(tmp_path / "1.replaced")
    for name in ("2.saving", "3.retired"):
        (tmp_path / name / "state").mkdir(parents=True)
    assert Checkpointer(tmp_path).steps() == []  # only looking changes nothing
    assert (tmp_path / "2.saving").exists()
    assert restored_step(tmp_path, state) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1"]


FILES = ["manifest.json", "meta.json", "_METADATA", "manifest.ocdbt", "*"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["flipped", "truncated", "gone"])
def test_a_damaged_file_is_named_and_the_one_before_used(
    tmp_path: Path, saved_pair: Path, caplog: pytest.LogCaptureFixture, name: str, how: str
) -> None:
    shutil.copytree(saved_pair, tmp_path, dirs_exist_ok=True)
    path = some_file(tmp_path / "2", name)
    if how == "flipped":
        flip(path)
    elif how == "truncated":
        os.truncate(path, path.stat().st_size - 1)
    else:
        path.unlink()
    with caplog.at_level(logging.WARNING):
        assert restored_step(tmp_path, make_state(make_mesh(1))) == 1
    assert "CHECKPOINT DAMAGED" in caplog.text and str(path) in caplog.text and "step 1 instead" in caplog.text


@pytest.fixture(scope="module")
def saved_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    for step in (1, 2):
        save(Checkpointer(folder), step, make_state(make_mesh(8), step))
    return folder


def rewritten(manifest: dict, name: str) -> str:
    """A manifest of another kind that has the right hash of itself, or none at all."""
    if name == "deep":
        return "[" * 100_000
    if name == "not an object":
        return "[]"
    changed = {key: value for key, value in manifest.items() if key not in ("sha256", name)}
    changes = {
        "no files": {"files": {}},
        "only some files": {"files": {"meta.json": manifest["files"]["meta.json"]}},
        "files outside": {"files": {**manifest["files"], "state/../../secret": {"sha256": "", "size": 0}}},
        "files as a list": {"files": list(manifest["files"])},
        "no hash": {"files": {name: {} for name in manifest["files"]}},
        "tree of numbers": {"tree": {"w": 5}},
    }
    return render({**changed, **changes.get(name, {})})


@pytest.mark.parametrize(
    "name",
    ["deep", "not an object", "best", "tree", "files", "no files", "only some files", "files outside",
     "files as a list", "no hash", "tree of numbers"],
)  # fmt: skip
def test_a_manifest_that_lacks_something_is_damage(
    tmp_path: Path, saved_pair: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    shutil.copytree(saved_pair, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "2" / "manifest.json"
    path.write_text(rewritten(json.loads(path.read_text()), name))
    assert restored_step(tmp_path, make_state(make_mesh(1))) == 1
    assert caplog.text.count("CHECKPOINT DAMAGED: step 2: file ") == 1 and caplog.text.count("\n") == 1
    assert Checkpointer(tmp_path).best() is None


@pytest.mark.parametrize("name", ["²", "٣", "007", "+7", "1_0", "7 "])
def test_a_folder_that_no_save_has_named_is_no_checkpoint(tmp_path: Path, saved_pair: Path, name: str) -> None:
    shutil.copytree(saved_pair, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).mkdir()
    assert Checkpointer(tmp_path).steps() == [1, 2]
    assert restored_step(tmp_path, make_state(make_mesh(1))) == 2


@pytest.mark.parametrize("left", ["3.saving", "3.replaced", "3.retired"])
@pytest.mark.parametrize("kind", ["file", "link", "folder", "folder that stays"])
def test_what_was_left_behind_gives_way_to_the_next_save(
    tmp_path: Path, state: State, monkeypatch: pytest.MonkeyPatch, left: str, kind: str
) -> None:
    save(Checkpointer(tmp_path), 3, make_state(make_mesh(1), 9))
    if kind == "file":
        (tmp_path / left).write_text("")
    elif kind == "link":
        (tmp_path / left).symlink_to("nowhere")
    else:
        (tmp_path / left / "state").mkdir(parents=True)
        (tmp_path / left / "state" / "x").write_text("")
    if kind == "folder that stays":
        monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # as where it is another user's
    checkpointer = Checkpointer(tmp_path)
    save(checkpointer, 3, state)
    assert checkpointer.steps() == [3]
    assert bits(checkpointer.restore(abstract_of(state, make_mesh(1)))[0]) == bits(state)  # type: ignore[index]


def test_a_reader_follows_a_run_that_removes_what_is_being_read(
    tmp_path: Path, saved_pair: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(saved_pair, tmp_path, dirs_exist_ok=True)
    load = checkpoint.load

    def overtaken(folder: Path, leaves: dict) -> dict:
        if folder.parent.name == "2":
            (tmp_path / "2").rename(tmp_path / "3")
            shutil.rmtree(tmp_path / "1")
        return load(folder, leaves)

    monkeypatch.setattr(checkpoint, "load", overtaken)
    assert Checkpointer(tmp_path).restore_params()[2] == 3
    assert caplog.text == ""


def test_a_run_that_was_removed_does_not_come_back(tmp_path: Path, state: State) -> None:
    checkpointer = Checkpointer(tmp_path / "run" / "checkpoints")
    checkpointer.save(1, state, {})
    with pytest.raises(CheckpointError, match="step 1 NOT saved: .*No such file"):
        checkpointer.wait()
    assert not (tmp_path / "run").exists()


def test_all_damaged_is_an_error_and_stays_one(tmp_path: Path, saved_pair: Path) -> None:
    shutil.copytree(saved_pair, tmp_path, dirs_exist_ok=True)
    for step in ("1", "2"):
        flip(some_file(tmp_path / step, "*"))
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"got no readable checkpoint.*step 2: file .*; step 1: file "):
            restored_step(tmp_path, make_state(make_mesh(1)))


def test_a_damaged_one_gives_way_to_the_next_save_not_the_good_one(tmp_path: Path, saved_pair: Path) -> None:
    shutil.copytree(saved_pair, tmp_path, dirs_exist_ok=True)
    flip(some_file(tmp_path / "2", "*"))
    state = make_state(make_mesh(1))
    checkpointer = Checkpointer(tmp_path, keep=2)
    assert checkpointer.restore(abstract_of(state, make_mesh(1)))[2] == 1  # type: ignore[index]
    save(checkpointer, 4, state)
    assert checkpointer.steps() == [1, 4]
    flip(some_file(tmp_path / "4", "*"))
    checkpointer = Checkpointer(tmp_path, keep=2)
    assert checkpointer.restore(abstract_of(state, make_mesh(1)))[2] == 1  # type: ignore[index]
    save(checkpointer, 4, state)
    assert checkpointer.steps() == [1, 4] and restored_step(tmp_path, state) == 4


SAVE_FOR_EVER = """
import sys, itertools, numpy as np, jax
from jaxmodels.train.checkpoint import Checkpointer
checkpointer = Checkpointer(sys.argv[1])
first = max(checkpointer.steps(), default=0)
for step in itertools.count(first + 1):
    tree = {"w": jax.numpy.full((128, 128), step), "b": np.arange(9)}
    checkpointer.save(step - step % 2, tree, {}, best=step % 3 == 0)
    print("saving", flush=True)
"""


def test_kill_9_at_any_moment_leaves_only_complete_checkpoints(tmp_path: Path) -> None:
    chance = random.Random(0)
    newest = []
    for _ in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVE_FOR_EVER, str(tmp_path)],
            cwd=Path(__file__).parents[2],
            env=os.environ | {"XLA_FLAGS": FLAGS},
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        for _ in range(chance.randint(3, 5)):
            assert process.stdout.readline() == b"saving\n"
        time.sleep(chance.uniform(0.0, 0.4))
        process.send_signal(signal.SIGKILL)
        process.wait()
        for step in Checkpointer(tmp_path).steps():
            found, _, _ = Checkpointer(tmp_path).restore_params(step, subtree="w")
            assert found.shape == (128, 128) and int(found[0, 0]) - step in (0, 1) and (found == found[0, 0]).all()
        newest.append(max(Checkpointer(tmp_path).steps(), default=0))
    assert newest == sorted(set(newest)), "each run goes on from the last one and gets further"


@pytest.fixture
def small_disk(tmp_path: Path):
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder]).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_that_nobody_foresaw_is_one_line(small_disk: Path) -> None:
    code = (
        "import sys, numpy as np; from jaxmodels.train import checkpoint; checkpoint.needed_bytes = lambda leaves: 0\n"
        "tree = {f'q{i}': np.random.default_rng(i).normal(size=2**14) for i in range(60)}\n"
        "checkpointer = checkpoint.Checkpointer(sys.argv[1]); checkpointer.save(1, tree, {}); checkpointer._join()"
    )
    command = [sys.executable, "-c", code, str(small_disk / "checkpoints")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True)
    said = own_lines(done.stderr)
    assert len(said) == 1 and "step 1 NOT saved: No space left on device" in said[0]


@pytest.mark.parametrize(("leaves", "size"), [(1, 10), (100, 10), (10, 10_000)])
def test_the_room_that_is_asked_for_is_what_a_checkpoint_takes(tmp_path: Path, leaves: int, size: int) -> None:
    tree = {f"layers/attention/q{i}": np.random.default_rng(i).normal(size=size) for i in range(leaves)}
    save(Checkpointer(tmp_path), 1, tree)  # type: ignore[arg-type]
    taken = sum(path.stat().st_blocks * 512 for path in tmp_path.rglob("*"))
    needed = arrays.needed_bytes(arrays.named_leaves(tree))
    assert taken <= needed <= taken + 300_000


# TensorStore's remaining writes end after the event loop of the failed save is gone.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_is_said_and_the_last_good_one_survives(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = small_disk / "checkpoints"
    tree = {"w": np.random.default_rng(0).normal(size=2**17), "b": np.arange(3)}  # 1 MB
    checkpointer = Checkpointer(folder)
    checkpointer.save(1, tree, {})
    checkpointer.wait()
    (small_disk / "ballast").write_bytes(bytes(2_300_000))
    checkpointer.save(2, tree, {})
    checkpointer.save(3, tree, {})  # reports the failure of 2 and tries again
    assert "checkpoint of step 2 NOT saved" in caplog.text
    with pytest.raises(
        CheckpointError, match=r"step 3 NOT saved: No space left on device; .* MB free.*last good checkpoint: 1;"
    ):
        checkpointer.wait()
    assert sorted(path.name for path in folder.iterdir()) == ["1"]
    (small_disk / "ballast").unlink()
    checkpointer.save(4, tree, {})
    checkpointer.wait()
    found = Checkpointer(folder).restore(tree)
    assert found is not None and found[2] == 4 and bits(found[0]) == bits(tree)


def test_a_disk_with_no_room_for_the_folder_itself_is_said_too(tmp_path: Path, state: State) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    checkpointer = Checkpointer(tmp_path / "checkpoints")
    checkpointer.save(1, state, {})
    with pytest.raises(CheckpointError, match="step 1 NOT saved: .*last good checkpoint: None"):
        checkpointer.wait()


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
