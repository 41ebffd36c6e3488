"""Device groups of collectives, in all forms in which compilers write them."""

from __future__ import annotations

import math
import re

import numpy as np


def groups_of(attributes: str, devices: int) -> list[list[int]]:
    """The groups of devices that take part in a collective; a device is its position in the mesh."""
    pairs = re.search(r"source_target_pairs=\{(\{[^=]*?\})\}", attributes)
    if pairs:
        return [[int(n) for n in pair.split(",")] for pair in re.findall(r"\{([\d,]+)\}", pairs.group(1))]
    named = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))?\s*\{([^}]*)\}", attributes)
    if named:
        sizes = {key: int(value) for key, value in re.findall(r"'([^']+)'=(\d+)", named.group(1))}
        taken = re.findall(r"'([^']+)'", named.group(3))
        order = [axis for axis in sizes if axis not in taken] + taken
        ids = _numbers(named.group(2) or f"[{devices}]").reshape(tuple(sizes.values()))
        ids = ids.transpose([list(sizes).index(axis) for axis in order])
        return ids.reshape(-1, math.prod(sizes[axis] for axis in taken)).tolist()
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes)
    if iota:
        return _numbers(iota.group(2)).reshape([int(n) for n in iota.group(1).split(",")]).tolist()
    listed = re.search(r"replica_groups=\{(\{[\d,{} ]*\})\}", attributes)
    if listed:
        return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed.group(1))]
    return [list(range(devices))]


def _numbers(text: str) -> np.ndarray:
    """Parse a list of numbers: 3,1,2, or [2,4]T(1,0), which is 0 to 7 in the shape 2 x 4, transposed."""
    iota = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    given, order = iota.groups() if iota else (text, None)
    numbers = [int(n) for n in given.split(",")]
    if iota is None:
        return np.array(numbers)
    ids = np.arange(math.prod(numbers)).reshape(numbers)
    return ids.transpose([int(n) for n in order.split(",")]) if order else ids


def slices_of(attributes: str) -> list[int]:
    """The TPU slices that take part in a collective between slices; empty for all other collectives."""
    among = re.search(r'megascale_target="\{([\d,]+)\}x', attributes)
    if among:
        return [int(number) - 1 for number in among.group(1).split(",")]
    listed = re.search(r"megascale_target=\{\{([^}]*)\}", attributes)  # device ids, which start at 200000 in slice 2
    return sorted({int(number) // 100000 - 1 for number in re.findall(r"\d+", listed.group(1))}) if listed else []
