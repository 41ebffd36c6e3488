"""Questions about a written and a spoken digit; the source of configs/llava_digits_fusion.py."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodels.data import RecordsConfig
from jaxmodels.data.records import Bad, Field, Records
from jaxmodels.errors import UserError

SIDE = 28
_HEAD = 16
"""Bytes before the pixels of a file in MNIST's format."""


class Pairs(Records):
    """Pictures and recordings with a question about both; the answer is computed from what they show and say."""

    def __init__(self, rows: Sequence[dict[str, Any]], pixels: np.ndarray, recordings: Path, label: str) -> None:
        self.label, self._rows, self._pixels, self._recordings = label, rows, pixels, recordings
        self.fields = {"image": Field("image", shape=(SIDE, SIDE, 1)), "audio": Field("audio")}
        self.fields |= {name: Field("text") for name in ("question", "answer")}
        self.fingerprint = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, indices: Sequence[int], fields: Sequence[str]) -> list[dict[str, Any] | Bad]:
        return [self._one(index, fields) for index in indices]

    def _one(self, index: int, fields: Sequence[str]) -> dict[str, Any] | Bad:
        row = self._rows[index]
        found = {name: row[name] for name in ("question", "answer")}
        if "image" in fields:
            found["image"] = self._pixels[row["image"]]
        if "audio" in fields:
            try:
                found["audio"] = (self._recordings / row["audio"]).read_bytes()
            except OSError as error:
                return Bad(f"{self.label}, row {index}", str(error))
        return {name: found[name] for name in fields}


@dataclass(frozen=True)
class DigitsFusion(RecordsConfig):
    """Pairs of a digit of MNIST's test set and a recording of one, with a question of five and its answer."""

    path: str = "."
    """The folder that has digits_fusion, spoken_digits and raw/mnist."""

    def records(self, split: str) -> Pairs:
        folder = Path(self.path).expanduser()
        lines = folder / "digits_fusion" / ("train.jsonl" if split == "train" else "test.jsonl")
        images = folder / "raw" / "mnist" / "t10k-images-idx3-ubyte.gz"
        for path in (lines, images):
            if not path.is_file():
                raise UserError(f"got data.path {self.path!r} without {path.relative_to(folder)}, expected it there")
        pixels = np.frombuffer(gzip.decompress(images.read_bytes()), np.uint8, offset=_HEAD)
        rows = [json.loads(line) for line in lines.read_text().splitlines()]
        return Pairs(rows, pixels.reshape(-1, SIDE, SIDE, 1), folder / "spoken_digits", f"{split} pairs of digits")
