"""Windows of sounds as whole numbers: µ-law codes of 8 bits, each to be predicted from those before it."""

from __future__ import annotations

import io
import logging
import wave
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxmodels.data import sounds
from jaxmodels.data.contract import IGNORED
from jaxmodels.data.examples import open_records
from jaxmodels.data.fields import input_field, named_field, named_groups, numbered
from jaxmodels.data.opening import Opening
from jaxmodels.data.records import Field, Reader
from jaxmodels.data.source import Source, Split, fingerprint
from jaxmodels.data.transforms import draws
from jaxmodels.errors import UserError

LEVELS = 256
SILENCE = LEVELS // 2
"""The code of 0, which stands for what is before a sound."""
LARGEST = 1 << 32
"""Most bytes of codes that are held in memory: 37 hours at 16,000 samples a second."""

_log = logging.getLogger("jaxmodels")


def encode(samples: np.ndarray) -> np.ndarray:
    """Quantize samples in [-1, 1] to 256 levels that are finer near 0, uint8.

    Source: ITU-T G.711's µ-law in its continuous form, with µ = 255.
    """
    x = np.clip(samples.astype(np.float32), -1, 1)
    y = np.sign(x) * np.log1p((LEVELS - 1) * np.abs(x)) / np.log(LEVELS)
    return np.floor((y + 1) / 2 * (LEVELS - 1) + 0.5).astype(np.uint8)


def decode(codes: np.ndarray) -> np.ndarray:
    """Return the samples that codes stand for, float32 in [-1, 1]."""
    y = 2 * codes.astype(np.float32) / (LEVELS - 1) - 1
    return np.sign(y) * np.expm1(np.abs(y) * np.log(LEVELS)) / (LEVELS - 1)


def wav(samples: np.ndarray, rate: int) -> bytes:
    """Return a WAV file of 16 bits with samples (N,) in [-1, 1]."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((np.clip(samples, -1, 1) * 32767).round().astype("<i2").tobytes())
    return buffer.getvalue()


class Waves(Source):
    """Windows of T samples: `codes` (B, T), each one sample behind `targets` (B, T), and each condition (B,).

    In training, each epoch draws the windows anew, as many of a sound as cover it once. In evaluation every sample is a
    target exactly once: windows follow each other, each begins with `context` samples that do not count, except the
    first of a sound, and the last one is filled up with targets that do not count.
    """

    kind = "audio"

    def __init__(
        self, codes: Sequence[np.ndarray], seq_len: int, *, split: Split, label: str, context: int, seed: int,
        conditions: Mapping[str, np.ndarray], rate: int,
    ) -> None:  # fmt: skip
        """`codes`: those of each sound; `conditions`: theirs by name, each (N,)."""
        self.split, self.label, self.seq_len, self._rate = split, label, seq_len, rate
        self._context = 0 if split == "train" else context
        if self._context >= seq_len:
            raise UserError(
                f"got task.context {context}, expected less than data.seq_len {seq_len}, the samples of a window, "
                f"try --data.seq-len {4 * context}"
            )
        self._seed, self._conditions = seed, conditions
        self._lengths = np.array([len(each) for each in codes], np.int64)
        self._starts = np.cumsum(self._lengths) - self._lengths
        self._codes = np.concatenate([np.zeros(0, np.uint8), *codes])
        rest = np.maximum(self._lengths - seq_len, 0)
        self._counts = 1 + -(-rest // (seq_len - self._context))
        self._ends = np.cumsum(self._counts)
        facts = ("waves", split, seq_len, self._context, rate, seed if split == "train" else 0)
        self.fingerprint = fingerprint([self._codes, self._lengths, *conditions.values()], *facts)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def batch(self, indices: np.ndarray, epochs: np.ndarray) -> dict[str, np.ndarray]:
        which = np.searchsorted(self._ends, indices, side="right")
        lengths, T = self._lengths[which], self.seq_len
        if self.split == "train":
            drawn = draws(self._seed, epochs, indices, 1)[:, 0]
            begins = (drawn * np.maximum(lengths - T + 1, 1)).astype(np.int64)
        else:
            begins = (indices - (self._ends - self._counts)[which]) * (T - self._context)
        at = begins[:, None] + np.arange(-1, T)  # one more sample, before the first target
        inside = (at >= 0) & (at < lengths[:, None])
        found = self._codes[np.where(inside, at + self._starts[which][:, None], 0)].astype(np.int32)
        rows = np.where(inside, found, SILENCE)
        counts = inside[:, 1:] & ((np.arange(T) >= self._context) | (begins == 0)[:, None])
        batch = {"codes": rows[:, :-1], "targets": np.where(counts, rows[:, 1:], IGNORED)}
        return batch | {f"{name}_condition": values[which] for name, values in self._conditions.items()}

    def describe(self) -> str:
        seconds = self._lengths.sum() / self._rate
        return (
            f"{self.label}: {len(self._lengths):,} sounds, {seconds / 60:.1f} minutes at {self._rate:,} samples a "
            f"second, {len(self):,} windows of {self.seq_len} ({self.split})"
        )


def open_waves(opening: Opening, rate: int, conditions: Sequence[str], context: int) -> Waves:
    """Open a split's sounds as windows of codes; `conditions` are of "label" and "group".

    Raises: UserError if there are no sounds, or no such fields.
    """
    cfg: Any = opening.data
    opening.check(("input_field", "bad_records", "seq_len", *(f"{each}_field" for each in conditions)), "sounds")
    train = open_records(cfg, "train", opening.classes)
    field = input_field(train, cfg, ("audio",))
    named = []
    for each in conditions:
        own = getattr(cfg, f"{each}_field")
        kinds = ("label",) if each == "label" else ("label", "text")
        named.append(named_field(train, f"{each}_field", own, kinds, [field]))

    def values(name: str) -> list[Any]:
        return [row[name] for rows in Reader(train, (name,), cfg.bad_records).all() for row in rows]

    numbers: list[tuple[tuple[str, ...], Callable[[Any], int]]] = []
    for each, name in zip(conditions, named, strict=True):
        if each == "group" and opening.groups:
            names = tuple(opening.groups)
            number = _numbers(names, train.fields[name])
        else:
            names, number = named_groups(train.fields[name], lambda name=name: values(name))
        if not names:
            names = tuple(map(str, range(numbered(train, name, values(name)))))
        most = (opening.fields or {}).get(f"{each}_condition")
        if most is not None and most.below is not None and len(names) > most.below:
            raise UserError(
                f"got {len(names)} values of {name} ({', '.join(names[:5])}{', ...' * (len(names) > 5)}) for a model "
                f"of {most.below}, expected at most as many, try --model.conditions with {len(names)} for the {each}"
            )
        numbers.append((names, number))
    records = train if opening.split == "train" else open_records(cfg, opening.split, opening.classes)
    reader = Reader(records, (field, *named), cfg.bad_records)
    codes, chosen, size = [], [], 0
    for rows in reader.all():
        for row in rows:
            try:
                own = [number(row[name]) for (_, number), name in zip(numbers, named, strict=True)]
                made = encode(sounds.floats(sounds.samples_of(row[field], rate)))
            except sounds.Unreadable as error:
                reader.bad(row.index, f"{field} {error}")
                continue
            except KeyError as error:
                reader.bad(row.index, f"has the group {error}, which is not in training")
                continue
            codes.append(made)
            chosen.append(own)
            size += len(made)
            if size > LARGEST:
                raise UserError(
                    f"got over {size / rate / 3600:.0f} hours of {records.label}, expected fewer, which fit in memory"
                )
    if not codes:
        raise UserError(f"got {records.label} without a sound that can be read, expected some")
    columns = np.array(chosen, np.int32).reshape(len(codes), len(named)).T
    found = Waves(
        codes, cfg.seq_len, split=opening.split, label=f"{records.label} {field}", context=context, seed=opening.seed,
        conditions=dict(zip(conditions, columns, strict=True)), rate=rate,
    )  # fmt: skip
    found.field = field
    for each, (names, _) in zip(conditions, numbers, strict=True):
        if each == "label":
            found.class_names = names
        else:
            found.groups = names
    return found


def _numbers(names: Sequence[str], field: Field) -> Callable[[Any], int]:
    """Return the function that numbers a value of a field by these names; one that is none of them is a KeyError."""
    places, own = {name: at for at, name in enumerate(names)}, field.names

    def number(value: Any) -> int:
        return places[own[value] if own else value.strip() if isinstance(value, str) else str(value)]

    return number
