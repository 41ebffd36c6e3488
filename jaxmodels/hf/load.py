"""From a directory in Hugging Face's format to a model and its parameters, tensor by tensor."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from jaxmodels import hf
from jaxmodels.errors import UserError
from jaxmodels.hf import files
from jaxmodels.hf.table import Format, Settings, Slot
from jaxmodels.models.functional import Model, create
from jaxmodels.parallel import rules

Leaves = dict[str, Any]
"""By path; batch statistics under stats/."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A directory whose tensors fit a model; nothing of them has been read."""

    model: Model
    format: Format
    rows: list[list[Slot]]
    found: dict[str, files.Tensor]

    @property
    def size(self) -> int:
        """Bytes of the parameters in float32."""
        return 4 * sum(tensor.size for tensor in self.found.values())


def load_pretrained(directory: Path, mesh: Mesh | None, overrides: Mapping[str, Any]) -> tuple[Model, Any]:
    """See `jaxmodels.load_pretrained`."""
    source = open_source(directory, overrides)
    model = source.model
    where: Any = None
    if mesh is not None:
        params = rules.place(mesh, model.axes(), model.shapes())
        stats = jax.tree.map(lambda _: rules.sharding(mesh, ()), jax.eval_shape(model.stats))
        where = flatten(params, stats)
    params, stats = nested(read(source, where))
    return (dataclasses.replace(model, stats=lambda: stats) if stats else model), params


def open_source(directory: Path, overrides: Mapping[str, Any] | None = None) -> Source:
    """The model of a directory, with every tensor found and checked by the files' headers.

    Raises:
        UserError: names all that does not fit.
    """
    settings = Settings.read(directory)
    form = hf.format_of(hf.family_of(settings.values["model_type"]))
    config = form.config(settings)
    settings.check()
    model = create(config, **(overrides or {}))
    rows = form.slots(model.config, {path: leaf.shape for path, leaf in leaves_of(model).items()})
    return Source(model, form, rows, match(directory, form, model, rows))


def match(directory: Path, form: Format, model: Model, rows: list[list[Slot]]) -> dict[str, files.Tensor]:
    """The tensor of a directory for each slot, by its name."""
    slots = {slot.name: slot for row in rows for slot in row}
    tensors, damaged = files.scan(directory)
    # a name -> the tensors that answer to it, with the names they have in the files
    known: dict[str, list[tuple[str, files.Tensor]]] = {}
    copies: dict[str, list[tuple[str, files.Tensor]]] = {}
    unknown, kinds = [], []
    for name, tensor in tensors:
        plain = form.canonical(name, [*slots, *form.copies])
        if plain not in slots and form.skips(plain):
            continue
        if plain not in slots and form.copies.get(plain) not in slots:
            unknown.append(name)
            continue
        if tensor.dtype not in files.DTYPES:
            kinds.append(f"{name} is {tensor.dtype}")
        if plain in slots:
            known.setdefault(plain, []).append((name, tensor))
        else:
            copies.setdefault(form.copies[plain], []).append((name, tensor))
    for original, ones in copies.items():
        known.setdefault(original, ones[:1])
    for name, other in form.spare.items():
        if name in slots and other in known:
            known.setdefault(name, known[other][:1])
    twice = [" and ".join(f"{name} ({tensor.file.name})" for name, tensor in ones)
             for ones in known.values() if len(ones) > 1]  # fmt: skip
    shapes = [
        f"{name} is {list(tensor.shape)}, expected {list(slots[plain].shape)}"
        for plain, ones in known.items()
        for name, tensor in ones
        if tensor.shape != slots[plain].shape
    ]
    missing = [name for name in slots if name not in known] if not damaged else []
    different = []
    if not (damaged or kinds or twice or shapes):
        different = [
            f"{name} differs from {known[original][0][0]}"
            for original, ones in copies.items()
            for name, tensor in ones
            if not tensor.equals(known[original][0][1])
        ]
    problems = {
        "damaged files": damaged,
        "missing": missing,
        "unknown": unknown,
        "there twice": twice,
        "of another shape": shapes,
        "of a type that is no number with a fraction": kinds,
        "tied to another, but different": different,
    }
    if any(problems.values()):
        said = "; ".join(f"{what}: {', '.join(names)}" for what, names in problems.items() if names)
        raise UserError(
            f"got weights in {directory} that do not fit {type(model.config).__name__}: {said}; expected the "
            f"{len(slots)} tensors that config.json describes, try a complete copy, with no override of a shape"
        )
    return {name: ones[0][1] for name, ones in known.items()}


def read(
    source: Source, where: Mapping[str, Sharding] | None = None, done: Callable[[int], Any] = lambda n: None
) -> Leaves:
    """The leaves, each put onto its devices as soon as it is complete; `done` is told the bytes of each tensor."""
    shapes = {path: leaf.shape for path, leaf in leaves_of(source.model).items()}
    device = SingleDeviceSharding(jax.config.jax_default_device or jax.local_devices()[0])  # pyright: ignore
    out: Leaves = {}
    for row in source.rows:
        parts = {path: Parts(shapes[path], where[path] if where else device) for path in row[0].weight.paths}
        for slot in row:
            put(slot, source.found[slot.name], parts)
            done(4 * source.found[slot.name].size)
        for path in list(parts):
            out[path] = parts.pop(path).array()
    return out


def put(slot: Slot, tensor: files.Tensor, parts: Mapping[str, Parts]) -> None:
    """Read one tensor into the leaves it is part of."""
    if not slot.weight.pattern and tensor.dtype == "F32":
        target = parts[slot.weight.paths[0]].whole(slot.index)
        if target is not None:
            tensor.read_into(target)
            return
    for path, view in zip(slot.weight.paths, slot.ours(tensor.read()), strict=True):
        parts[path].put(slot.index, view)


class Parts:
    """The parts of a leaf that the devices of this process hold, while they are filled."""

    def __init__(self, shape: tuple[int, ...], sharding: Sharding):
        self.shape, self.sharding = shape, sharding
        self.pieces: dict[tuple[tuple[int, int], ...], np.ndarray] = {}
        for index in sharding.addressable_devices_indices_map(shape).values():
            key = self._key(index)
            if key not in self.pieces:
                self.pieces[key] = aligned(tuple(stop - start for start, stop in key))

    def _key(self, index: Any) -> tuple[tuple[int, int], ...]:
        return tuple(part.indices(size)[:2] for part, size in zip(index, self.shape, strict=True))

    def whole(self, at: tuple[int, ...]) -> np.ndarray | None:
        """What one tensor fills, where that is all in one piece."""
        (key, piece), *more = self.pieces.items()
        return None if more or key != tuple((0, size) for size in self.shape) else piece[(*at, ...)]

    def put(self, at: tuple[int, ...], view: np.ndarray) -> None:
        """A tensor at its place along the leading axes, cut as the pieces are."""
        for key, piece in self.pieces.items():
            if all(start <= i < stop for i, (start, stop) in zip(at, key, strict=False)):
                place = tuple(i - start for i, (start, _) in zip(at, key, strict=False))
                piece[(*place, ...)] = view[tuple(slice(*bounds) for bounds in key[len(at) :])]

    def array(self) -> jax.Array:
        """The leaf."""
        return jax.make_array_from_callback(self.shape, self.sharding, lambda index: self.pieces[self._key(index)])


def aligned(shape: tuple[int, ...]) -> np.ndarray:
    """Memory for float32 that starts where a CPU device can use it as it is, so that the leaf is not copied."""
    count = int(np.prod(shape, dtype=np.int64))
    raw = np.empty(4 * count + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + 4 * count].view(np.float32).reshape(shape)


def leaves_of(model: Model) -> Leaves:
    """Shapes and types of a model's leaves by path."""
    return flatten(model.shapes(), jax.eval_shape(model.stats))


def flatten(params: Any, stats: Any = None) -> Leaves:
    """Leaves by path."""
    found: Leaves = {}
    for prefix, tree in (("", params), ("stats/", stats or {})):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            found[prefix + jax.tree_util.keystr(path, simple=True, separator="/")] = leaf
    return found


def nested(leaves: Leaves) -> tuple[Any, Any]:
    """Parameters and statistics as trees."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        functools.reduce(lambda node, key: node.setdefault(key, {}), parents, tree)[last] = leaf
    return {name: part for name, part in tree.items() if name != "stats"}, tree.get("stats", {})
