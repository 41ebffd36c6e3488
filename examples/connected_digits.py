"""Strings of spoken digits, put together from recordings of single ones; the source of configs/ctc_digits.py."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodels.data import RecordsConfig
from jaxmodels.data.records import Bad, Field, Records, Sound
from jaxmodels.data.sounds import Unreadable, samples_of
from jaxmodels.errors import UserError
from jaxmodels.fields import Count, Natural, Positive

RATE = 8000
MOST = 7
"""Digits of the longest string."""
GAPS = (0.05, 0.3)
"""Seconds of silence before each digit and behind the last."""


class Strings(Records):
    """Strings of recordings of one speaker: those of a list, or drawn by the seed and their index."""

    def __init__(
        self,
        folder: Path,
        rows: Sequence[dict[str, Any]],
        strings: Sequence[dict[str, Any]] | int,
        seed: int = 0,
        longest: float = 0,
    ) -> None:
        """`rows`: the recordings; `strings`: the files and gaps of each string, or how many are drawn, each of at most
        `longest` seconds."""
        self.label, self._folder, self._strings, self._seed = f"{folder.name} strings", folder, strings, seed
        self._said = {row["file"]: row["text"] for row in rows}
        self._seconds, self._longest = {row["file"]: row["seconds"] for row in rows}, longest
        self._of: dict[str, list[str]] = {}
        for row in rows:
            self._of.setdefault(row["speaker"], []).append(row["file"])
        self._speakers = tuple(sorted(self._of))
        self.fields = {"audio": Field("audio"), "text": Field("text"), "speaker": Field("text")}
        self.fingerprint = hashlib.sha256(repr((rows, strings, seed, longest)).encode()).hexdigest()[:16]
        self._read, self._drawn = functools.cache(self._samples), functools.cache(self._draw)

    def __len__(self) -> int:
        return self._strings if isinstance(self._strings, int) else len(self._strings)

    def read(self, indices: Sequence[int], fields: Sequence[str]) -> list[dict[str, Any] | Bad]:
        return [self._one(index, fields) for index in indices]

    def _one(self, index: int, fields: Sequence[str]) -> dict[str, Any] | Bad:
        string = self._drawn(index) if isinstance(self._strings, int) else self._strings[index]
        found = {"text": " ".join(self._said[file] for file in string["files"]), "speaker": string["speaker"]}
        if "audio" in fields:
            parts = [np.zeros(round(gap * RATE), np.int16) for gap in string["gaps"]]
            for at, file in enumerate(string["files"]):
                try:
                    parts.insert(2 * at + 1, self._read(file))
                except (OSError, Unreadable) as error:
                    return Bad(f"{self.label}, string {index}, {file}", str(error))
            found["audio"] = Sound(np.concatenate(parts), RATE)
        return {name: found[name] for name in fields}

    def _draw(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng([self._seed, index])
        speaker = self._speakers[rng.integers(len(self._speakers))]
        count = rng.integers(2, MOST + 1)
        files = [self._of[speaker][i] for i in rng.integers(len(self._of[speaker]), size=count)]
        gaps = rng.uniform(*GAPS, count + 1).tolist()
        while len(files) > 1 and sum(gaps) + sum(self._seconds[file] for file in files) > self._longest:
            files, gaps = files[1:], gaps[1:]
        return {"speaker": speaker, "files": files, "gaps": gaps}

    def _samples(self, file: str) -> np.ndarray:
        return samples_of((self._folder / file).read_bytes(), RATE)


@dataclass(frozen=True)
class ConnectedDigits(RecordsConfig):
    """Strings of 2 to 7 spoken digits: drawn from the training recordings, and listed for evaluation."""

    path: str = "spoken_digits"
    """The folder with index.jsonl, test_strings.jsonl and audio/."""
    strings: Count = 20_000
    """Strings that an epoch draws."""
    seed: Natural = 0
    """Seed of the strings."""
    longest: Positive = 6.1
    """Seconds of the longest string that is drawn."""
    held_out: str = ""
    """A speaker none of whose recordings is trained on, and whose strings alone are evaluated on. Empty: all speakers
    are in both, with other recordings."""

    def records(self, split: str) -> Strings:
        folder = Path(self.path).expanduser()
        rows = self._lines(folder / "index.jsonl")
        if split == "train":
            rows = [row for row in rows if row["split"] == "train" and row["speaker"] != self.held_out]
            return Strings(folder, rows, self.strings, self.seed, self.longest)
        listed = self._lines(folder / "test_strings.jsonl")
        strings = [row for row in listed if self.held_out in ("", row["speaker"])]
        if not strings:
            known = ", ".join(sorted({row["speaker"] for row in listed}))
            raise UserError(f"got data.held_out {self.held_out!r}, expected one of {known}")
        return Strings(folder, [row for row in rows if row["split"] == "test"], strings)

    def _lines(self, path: Path) -> list[dict[str, Any]]:
        if not path.is_file():
            raise UserError(f"got data.path {self.path!r} without {path.name}, expected the folder that has it")
        return [json.loads(line) for line in path.read_text().splitlines()]
