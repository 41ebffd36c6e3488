"""Load a model and its parameters from a directory in Hugging Face's format, tensor by tensor."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from jaxmodels.compress.codes import encoded_on_host
from jaxmodels.compress.coding import Quantized, coding
from jaxmodels.errors import UserError
from jaxmodels.hf import compressed, files, formats, processors
from jaxmodels.hf.table import Format, Settings, Slot
from jaxmodels.models.coded import Coded, is_coded
from jaxmodels.models.families import create
from jaxmodels.models.model import Model
from jaxmodels.parallel import rules

log = logging.getLogger("jaxmodels")

Leaves = dict[str, Any]
"""Leaves by path; batch statistics are under stats/."""
_AT_ONCE = 1 << 22
_NAMED = 12  # the most tensors that a message names for one problem
Found = list[tuple[str, files.Tensor]]


@dataclasses.dataclass(frozen=True)
class Source:
    """A directory whose tensors fit a model, before any of them is read."""

    model: Model
    format: Format
    rows: list[list[Slot]]
    found: dict[str, files.Tensor]

    @property
    def size(self) -> int:
        """Bytes of the parameters as float32."""
        return 4 * sum(tensor.size for tensor in self.found.values())

    @property
    def section(self) -> Quantized | None:
        """How parameters are held whose tensors are codes in the files; None: there are none."""
        return compressed.section(self.model, self.rows, self.found)


def load_pretrained(
    directory: Path, mesh: Mesh | None, overrides: Mapping[str, Any], codes: bool = False
) -> tuple[Model, Any]:
    """See `jaxmodels.load_pretrained`."""
    source = open_source(directory, overrides)
    model = source.model
    held = coding(source.section, {"model": model}) if codes else None
    shapes, axes = (model.shapes(), model.axes()) if held is None else (held.shapes()["model"], held.axes()["model"])
    where: Any = None
    if mesh is not None:
        params = rules.shardings_of(mesh, axes, shapes)
        stats = jax.tree.map(lambda _: rules.sharding(mesh, ()), jax.eval_shape(model.stats))
        where = flatten(params, stats)
        shapes = jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, params)
    coded = {path: leaf for path, leaf in flatten(shapes).items() if is_coded(leaf)}
    params, stats = nested(read(source, where, coded=coded))
    return (dataclasses.replace(model, stats=lambda: stats) if stats else model), params


def described(directory: Path) -> tuple[Format, Any]:
    """Return the format and the config of a directory's model; log settings that differ here in training alone.

    Raises:
        UserError: names all settings that are not computed here.
    """
    settings = Settings.read(directory)
    kind = settings.values["model_type"]
    form = formats.format_of(formats.family_of(kind), kind)
    compressed.check(settings)
    try:
        config = form.config(settings.renamed(form.names))
    except UserError as error:  # the files set this field, so the message must not suggest an option
        raise UserError(f"{settings.where}: {str(error).partition(', try --')[0]}") from None
    settings.check()
    processors.check_sounds(directory, form.sounds(config))
    for remark in settings.remarks:
        log.warning("%s: %s", settings.where, remark)
    return form, config


def open_source(
    directory: Path, overrides: Mapping[str, Any] | None = None, wanted: Collection[str] | None = None
) -> Source:
    """Open the model of a directory, and check every tensor by the headers of the files.

    `wanted` are the paths of the leaves to read; others may be missing or have another shape than in the model.

    Raises:
        UserError: names all that does not fit.
    """
    form, config = described(directory)
    found, damaged = files.scan(directory)
    found = compressed.joined(Settings.read(directory), found)
    check_layers(config, len(found), damaged, directory)
    model = create(config, **(overrides or {}))
    shapes = {path: leaf.shape for path, leaf in leaves_of(model).items()}
    table = form.rows(model.config, shapes)
    if wanted is not None:
        table = [row for row in table if set(row.paths) & {*wanted}]
    # before rows are expanded: each tensor must be in the files, or be tied to one that is
    count = sum(math.prod(shapes[row.paths[0]][: len(re.findall(r"\{\w+\}", row.theirs))]) for row in table)
    if not damaged and count > 2 * len(found) + 100:
        raise UserError(
            f"got {directory}/config.json of a model of {count:,} tensors, expected the {len(found):,} that are in the "
            "files, try a complete copy"
        )
    rows = form.slots(model.config, shapes)
    needed = [row for row in rows if wanted is None or set(row[0].weight.paths) & {*wanted}]
    known = {slot.name: slot for row in rows for slot in row}
    return Source(model, form, needed, match(directory, form, model, needed, known, found, damaged))


def check_layers(config: Any, tensors: int, damaged: list[str], directory: Path) -> None:
    """Refuse a config of more layers than there are tensors, before a model is made of it.

    Raises:
        UserError: it has more.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        layers = sum(value) if field.name == "depths" else value if "layers" in field.name else 0
        if not damaged and (layers or 0) > tensors:
            raise UserError(
                f"got {directory}/config.json with {field.name} {layers:,}, expected no more than the {tensors:,} "
                "tensors that are in the files, try a complete copy"
            )


def match(
    directory: Path,
    form: Format,
    model: Model,
    rows: list[list[Slot]],
    every: Mapping[str, Slot],
    tensors: Found,
    damaged: list[str],
) -> dict[str, files.Tensor]:
    """Find the tensor of each slot of the rows by its name; names in `every` are known, whether or not they are needed.

    Raises:
        UserError: names all tensors that are missing, unknown, repeated or of another shape or type.
    """
    slots = {slot.name: slot for row in rows for slot in row}
    # for each name: the tensors that answer to it, with their names in the files
    known: dict[str, list[tuple[str, files.Tensor]]] = {}
    copies: dict[str, list[tuple[str, files.Tensor]]] = {}
    unknown, kinds = [], []
    zeros = form.zeros(model.config)
    names = {*every, *form.copies, *zeros}
    for name, tensor in tensors:
        plain = form.canonical(name, names)
        if plain not in slots and (plain in every or plain in zeros or form.skips(plain)):
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
    filled = [
        name
        for name, tensor in tensors
        if form.canonical(name, names) in zeros and tensor.dtype in files.DTYPES and np.any(tensor.read())
    ]
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
        "not zero, and not computed here": filled,
    }
    if any(problems.values()):
        message = "; ".join(f"{what}: {listed(names)}" for what, names in problems.items() if names)
        raise UserError(
            f"got weights in {directory} that do not fit {type(model.config).__name__}: {message}; expected the "
            f"{len(slots)} tensors that config.json describes, try a complete copy, with no override of a shape"
        )
    return {name: ones[0][1] for name, ones in known.items()}


def listed(names: list[str]) -> str:
    """List the first names, and count the others."""
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def read(
    source: Source,
    where: Mapping[str, Sharding] | None = None,
    done: Callable[[int], Any] = lambda n: None,
    coded: Mapping[str, Coded] | None = None,
) -> Leaves:
    """Read the leaves, each moved to its devices once it is complete; call `done` with the bytes of each tensor.

    `coded` are the shapes and shardings of those that are quantized as they are read; codes in the files stay as they
    are where they are codes of that kind.
    """
    shapes = {path: leaf.shape for path, leaf in leaves_of(source.model).items()}
    device = SingleDeviceSharding(jax.config.jax_default_device or jax.local_devices()[0])  # pyright: ignore
    out: Leaves = {}
    for row in source.rows:
        parts: dict[str, Any] = {
            path: CodedParts(coded[path], device)
            if coded and path in coded
            else Parts(shapes[path], where[path] if where else device)
            for path in row[0].weight.paths
        }
        for slot in row:
            put(slot, source.found[slot.name], parts)
            done(4 * source.found[slot.name].size)
        for path in list(parts):
            out[path] = parts.pop(path).array()
    return out


def put(slot: Slot, tensor: files.Tensor, parts: Mapping[str, Parts | CodedParts]) -> None:
    """Read a tensor into the leaves that it is a part of."""
    first = parts[slot.weight.paths[0]]
    if isinstance(first, CodedParts) and isinstance(tensor, compressed.Quantized) and tensor.fits(slot, first.like):
        leaf = tensor.coded(slot, first.like)
        check_finite(slot.name, leaf.scales)
        first.keep(slot.index, leaf)
        return
    if not slot.weight.pattern and tensor.dtype == "F32":
        target = parts[slot.weight.paths[0]].whole(slot.index)
        if target is not None:
            tensor.read_into(target)
            check_finite(slot.name, target)
            return
    found = tensor.read()
    check_finite(slot.name, found)
    for path, view in zip(slot.weight.paths, slot.ours(found), strict=True):
        parts[path].put(slot.index, view)


def check_finite(name: str, tensor: np.ndarray) -> None:
    """Refuse a tensor with a NaN, or with a number that is infinite as float32.

    Raises:
        UserError: names the first such number.
    """
    flat = tensor.reshape(-1)
    for at in range(0, len(flat), _AT_ONCE):
        with np.errstate(over="ignore"):  # numbers that are too large become infinite, and are found
            piece = flat[at : at + _AT_ONCE].astype(np.float32, copy=False)
        if not (right := np.isfinite(piece)).all():
            first = int(np.argmin(right))
            raise UserError(
                f"got {piece[first]} in {name} (number {at + first:,} of {len(flat):,}), expected weights that are "
                "finite, try another copy"
            )


class Parts:
    """The parts of a leaf that this process's devices hold, while they are being filled."""

    def __init__(self, shape: tuple[int, ...], sharding: Sharding, dtype: Any = np.float32):
        self.shape, self.sharding = shape, sharding
        self.pieces: dict[tuple[tuple[int, int], ...], np.ndarray] = {}
        for index in sharding.addressable_devices_indices_map(shape).values():
            key = self._key(index)
            if key not in self.pieces:
                self.pieces[key] = aligned(tuple(stop - start for start, stop in key), dtype)

    def _key(self, index: Any) -> tuple[tuple[int, int], ...]:
        return tuple(part.indices(size)[:2] for part, size in zip(index, self.shape, strict=True))

    def whole(self, at: tuple[int, ...]) -> np.ndarray | None:
        """Return the memory that one tensor fills, where it is in one piece."""
        (key, piece), *more = self.pieces.items()
        return None if more or key != tuple((0, size) for size in self.shape) else piece[(*at, ...)]

    def put(self, at: tuple[int, ...], view: np.ndarray) -> None:
        """Copy a tensor to its place along the leading axes, cut in the same way as the pieces."""
        for key, piece in self.pieces.items():
            if all(start <= i < stop for i, (start, stop) in zip(at, key, strict=False)):
                place = tuple(i - start for i, (start, _) in zip(at, key, strict=False))
                piece[(*place, ...)] = view[tuple(slice(*bounds) for bounds in key[len(at) :])]

    def array(self) -> jax.Array:
        """Return the leaf on its devices."""
        return jax.make_array_from_callback(self.shape, self.sharding, lambda index: self.pieces[self._key(index)])


class CodedParts:
    """The parts of a coded leaf, whose tensors are quantized as they come."""

    def __init__(self, like: Coded, device: Sharding):
        self.like = like
        self.parts = jax.tree.map(lambda x: Parts(x.shape, x.sharding or device, x.dtype), like)

    def whole(self, at: tuple[int, ...]) -> None:
        """There is no memory that numbers fill."""

    def put(self, at: tuple[int, ...], view: np.ndarray) -> None:
        """Quantize a tensor, and put its codes and scales in their places along the leading axes."""
        self.keep(at, encoded_on_host(view, self.like))

    def keep(self, at: tuple[int, ...], leaf: Coded) -> None:
        """Put codes and scales in their places along the leading axes."""
        jax.tree.map(lambda part, x: part.put(at, np.asarray(x)), self.parts, leaf)

    def array(self) -> Coded:
        """Return the leaf on its devices."""
        return jax.tree.map(lambda part: part.array(), self.parts)


def aligned(shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    """Allocate memory that is aligned so that a CPU device can use it without a copy."""
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def leaves_of(model: Model) -> Leaves:
    """Return the shapes and types of a model's leaves by path."""
    return flatten(model.shapes(), jax.eval_shape(model.stats))


def flatten(params: Any, stats: Any = None) -> Leaves:
    """Return the leaves by path."""
    found: Leaves = {}
    for prefix, tree in (("", params), ("stats/", stats or {})):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_coded):
            found[prefix + jax.tree_util.keystr(path, simple=True, separator="/")] = leaf
    return found


def nested(leaves: Leaves) -> tuple[Any, Any]:
    """Return parameters and statistics as trees."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        functools.reduce(lambda node, key: node.setdefault(key, {}), parents, tree)[last] = leaf
    return {name: part for name, part in tree.items() if name != "stats"}, tree.get("stats", {})
