"""The arrays of a checkpoint: a tree as named leaves, written and read by Orbax."""

from __future__ import annotations

import asyncio
import functools
import logging
import operator
import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.errors import UserError
from jaxmodels.models.coded import is_coded

PyTree = Any


def orbax() -> Any:
    """Import Orbax when it is first needed (it takes a second), and silence its logging."""
    import orbax.checkpoint

    logging.getLogger("absl").addFilter(_not_from_orbax)
    if not isinstance(sys.unraisablehook, _Unraisable):
        sys.unraisablehook = _Unraisable(sys.unraisablehook)
    return orbax.checkpoint


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname


class _Unraisable:
    """Silences the aftermath of a failed write: TensorStore ends other writes after Orbax's event loop is closed."""

    def __init__(self, before: Callable[[Any], Any]) -> None:
        self.before = before

    def __call__(self, unraisable: Any) -> None:
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            self.before(unraisable)


@functools.cache
def _handler() -> Any:
    # OCDBT puts all arrays into a few files. Weights hardly compress: 8 % smaller for four times the CPU time.
    return orbax().PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=False, use_compression=False)


def start_writing(folder: Path, leaves: Mapping[str, Any]) -> list[Any]:
    """Copy the arrays to the host and start writing them; return the futures to await."""
    from etils import epath

    data = {name: jax.random.key_data(leaf) if _is_key(leaf) else leaf for name, leaf in leaves.items()}
    tree = nest({name: leaf for name, leaf in data.items() if leaf.size})  # Orbax refuses arrays without elements
    # The handler itself rather than Orbax's AsyncCheckpointer, which renames before our manifest is written and
    # leaves the other processes waiting for minutes when one of them fails.
    save = _handler().async_save(epath.Path(folder), args=orbax().args.PyTreeSave(tree))
    with ThreadPoolExecutor(1) as pool:  # a separate thread, because a notebook already runs an event loop
        return pool.submit(asyncio.run, save).result() or []


def await_all(futures: Iterable[Any]) -> None:
    failures = []
    for future in futures:  # all of them, so that none is still writing when the folder is removed
        try:
            future.result()
        except Exception as error:
            failures.append(error)
    if failures:
        raise failures[0]


def merge(folder: Path) -> None:
    if jax.process_index() == 0:
        from etils import epath

        _handler().finalize(epath.Path(folder))


def load(folder: Path, leaves: Mapping[str, Any]) -> dict[str, Any]:
    from etils import epath

    ocp = orbax()
    loaded: dict[str, Any] = {}
    items, arguments = {}, {}
    for name, leaf in leaves.items():
        sharding = getattr(leaf, "sharding", None)
        data = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
        if not data.size:
            empty = np.zeros(data.shape, data.dtype)
            loaded[name] = empty if sharding is None else jax.device_put(empty, sharding)
            continue
        items[name] = jax.ShapeDtypeStruct(data.shape, data.dtype)
        on_host = ocp.RestoreArgs(restore_type=np.ndarray)
        arguments[name] = on_host if sharding is None else ocp.ArrayRestoreArgs(sharding=sharding)
    if items:
        args = ocp.args.PyTreeRestore(item=nest(items), restore_args=nest(arguments), partial_restore=True)
        tree = _handler().restore(epath.Path(folder), args=args)
        loaded |= {name: functools.reduce(operator.getitem, name.split("/"), tree) for name in items}
    for name, leaf in leaves.items():
        if _is_key(leaf):
            loaded[name] = jax.random.wrap_key_data(loaded[name], impl=_key_impl(leaf))
    return loaded


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """Return the leaves by path, such as opt_state/0/mu/layers/attn/q/w."""
    leaves: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        leaves[name] = leaf if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) else np.asarray(leaf)
    if len({name.replace("/", ".") for name in leaves}) != len(jax.tree.leaves(tree)):
        raise UserError("got two leaves of the state with the same path, expected different ones, try other names")
    return leaves


def named_parameters(tree: PyTree) -> dict[str, Any]:
    """Return parameters by path, such as model/layers/attn/q/w; a coded one is one."""
    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_coded)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in found}


def nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        functools.reduce(lambda node, key: node.setdefault(key, {}), parents, tree)[last] = leaf
    return tree


def select(tree: Mapping[str, str], subtree: str) -> dict[str, str]:
    return {name: spec for name, spec in tree.items() if name == subtree or name.startswith(subtree + "/")}


def spec_of(leaf: Any) -> str:
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def parse_spec(spec: str) -> jax.ShapeDtypeStruct:
    dtype, _, shape = spec.rstrip("]").partition("[")
    return jax.ShapeDtypeStruct(tuple(int(size) for size in shape.split(",") if size), jnp.dtype(dtype))


def check_structure(saved: Mapping[str, str], leaves: Mapping[str, Any], hint: str | None = None) -> None:
    expected = {name: spec_of(leaf) for name, leaf in leaves.items()}
    differences = [
        f"{name} is {saved.get(name, 'missing')}, expected {expected.get(name, 'none of that name')}"
        for name in [*expected, *(name for name in saved if name not in expected)]
        if saved.get(name) != expected.get(name)
    ]
    if differences:
        more = f" (and {len(differences) - 4} more)" if len(differences) > 4 else ""
        raise UserError(
            f"got a checkpoint of another structure: {'; '.join(differences[:4])}{more}; "
            + (hint or "try the model and optimizer settings it was saved with, or another run directory")
        )


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_impl(leaf: Any) -> Any:
    impls: list[Any] = []
    jax.eval_shape(lambda key: impls.append(jax.random.key_impl(key)), leaf)  # key_impl takes no ShapeDtypeStruct
    return impls[0]


def needed_bytes(leaves: Mapping[str, Any]) -> int:
    """Disk space for these arrays and everything written with them; an upper bound, measured with 1 to 300 leaves."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves.values()) + 2_000 * len(leaves) + 100_000
