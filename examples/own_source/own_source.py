import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxmodels.data import RecordsConfig
from jaxmodels.data.records import Bad, Field, Records


class Lines(Records):
    """Lines of three numbers and a class."""

    def __init__(self, path, lines):
        """`lines`: the number and the text of each."""
        self.label, self.lines = path, lines
        self.fingerprint = hashlib.sha256(repr(lines).encode()).hexdigest()[:16]
        self.fields = {
            "reading": Field("array", shape=(3,), dtype="float32"),
            "label": Field("label", names=("low", "high")),
        }

    def __len__(self):
        return len(self.lines)

    def read(self, indices, fields):
        return [self.record(i, fields) for i in indices]

    def record(self, index, fields):
        line, text = self.lines[index]
        *numbers, name = text.split(",")
        if len(numbers) != 3 or name not in ("low", "high"):
            return Bad(f"{self.label}, line {line}", "is not three numbers and low or high")
        values = {"reading": np.array(numbers, np.float32), "label": ("low", "high").index(name)}
        return {field: values[field] for field in fields}


@dataclass(frozen=True)
class Readings(RecordsConfig):
    """Readings of a sensor, three numbers and a class on each line."""

    path: str = "readings.txt"
    """The file. Every fifth line is held out."""

    def records(self, split):
        lines = list(enumerate(Path(self.path).read_text().splitlines(), 1))
        return Lines(self.path, [(n, text) for n, text in lines if (n % 5 == 0) == (split == "eval")])
