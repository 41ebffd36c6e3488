"""`python -m benchmarks loader`: images/s and tokens/s of the loader, of tf.data and of torch's DataLoader."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import record
from benchmarks.step import Contestant
from jaxmodels.errors import UserError

SETTINGS: dict[tuple[str, str], dict[str, Any]] = {
    ("ours", "images"): {"pixels": "opencv", "threads": 6, "prefetch": 2},
    ("ours by Pillow", "images"): {"pixels": "pillow", "threads": 4, "prefetch": 2},
    ("tf.data", "images"): {"parallel": 0},
    ("torch", "images"): {"workers": 2, "prefetch": 2},
    ("ours", "tokens"): {"prefetch": 0},
    ("tf.data", "tokens"): {"shuffle": 4096},
    ("torch", "tokens"): {"workers": 0, "prefetch": 2},
}
"""The fastest settings found for each on two cores (parallel 0 means AUTOTUNE)."""

UNITS = {"images": "images/s", "tokens": "tokens/s"}


@dataclass(frozen=True)
class Options:
    """All read the same files in turns of one epoch, each in its own process; a turn begins with nothing prefetched."""

    kinds: tuple[str, ...] = ("images", "tokens")
    """What is loaded: images (JPEG of 500 x 375, decoded, cropped at random to 224 x 224, mirrored), tokens (windows
    of 1,024 of a file of uint16)."""
    against: tuple[str, ...] = ("ours by Pillow", "tf.data", "torch")
    """What the loader is compared with; by itself with Pillow, of images."""
    tf_python: str = ""
    """Python of an environment with TensorFlow; by default, this one."""
    settings: str = ""
    """Other settings for a contestant, as JSON: {"torch": {"workers": 4}}."""
    images: int = 512
    """Number of JPEG files."""
    tokens: int = 64_000_000
    """Number of tokens in the file."""
    rounds: int = 9
    """Turns of each contestant."""
    out: Path | None = None
    """Folder for the results."""


def run(options: Options) -> None:
    """Measure, print and record the results."""
    for kind in options.kinds:
        if kind not in UNITS:
            raise UserError(f"got kind {kind!r}, expected images or tokens, try --kinds images")
    rows, size = [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        for kind in options.kinds:
            path = Path(folder) / kind
            if kind == "images":
                size = make_images(path, options.images)
            else:
                make_tokens(path, options.tokens)
            rows += compare(options, kind, path)
    notes = [
        "each turn is one epoch in shuffled order, begun with nothing made ahead; the ratio is the median over rounds "
        "of the ratio within a round",
        "all give uint8 images (64, 224, 224, 3) and int32 tokens (32, 1024) in the host's memory; ours resizes by "
        "OpenCV without antialiasing (--data.pixels opencv), as tf.data does; ours by Pillow and torch by Pillow with "
        "it; tf.data decodes only the part that is cropped (decode_and_crop_jpeg), the others all of it",
        "tf.data shuffles tokens in a buffer, the others all windows; the tokens of torch are views of one array, ours "
        "are two arrays",
        f"versions: {', '.join(dict.fromkeys(row['version'] for row in rows if row['version']))}",
    ]
    if size:
        notes.append(f"{options.images} JPEG files of 500 x 375, {size:.0f} kB each in the mean, in the page cache")
    path = record.write(
        "loader",
        "Loader throughput",
        rows,
        out=options.out,
        columns={
            "kind": "what",
            "name": "contestant",
            "settings": "settings",
            "rate": "a second (median)",
            "ratio": "ours ÷ this",
        },
        notes=notes,
        plot=plot,
    )
    print(path.read_text())


def compare(options: Options, kind: str, path: Path) -> list[dict[str, Any]]:
    """Return one row per contestant."""
    given = json.loads(options.settings) if options.settings else {}
    everyone, settings = [], []
    known = {name for name, _ in SETTINGS}
    for name in ("ours", *options.against):
        if name not in known:
            others = ", ".join(sorted(known - {"ours"}))
            raise UserError(f"got contestant {name!r}, expected one of {others}, try --against tf.data")
        if (name, kind) not in SETTINGS:
            continue
        settings.append({**SETTINGS[name, kind], **given.get(name, {})})
        env = dict(os.environ)
        if name == "tf.data" and options.tf_python:
            env["BENCHMARK_PYTHON"] = options.tf_python
        command = ["benchmarks.peers.loaders", name, kind, str(path), json.dumps(settings[-1])]
        everyone.append(Contestant(name, command, env))
    for contestant in everyone:
        contestant.ask("1")  # warm
    for number in range(options.rounds):
        # every other round backwards, so that nobody always follows the same neighbor
        for contestant in everyone if number % 2 == 0 else everyone[::-1]:
            contestant.ask("1")
    for contestant in everyone:
        contestant.end()
    rates = [[turn["count"] / turn["seconds"] for turn in contestant.turns[1:]] for contestant in everyone]
    return [
        {
            "kind": kind,
            "name": contestant.name,
            "settings": ", ".join(f"{key} {value}" for key, value in chosen.items()),
            "rate": statistics.median(rate),
            "ratio": statistics.median(a / b for a, b in zip(rates[0], rate, strict=True)),
            "version": contestant.ready["version"],
            "rates": rate,
        }
        for contestant, chosen, rate in zip(everyone, settings, rates, strict=True)
    ]


def make_images(folder: Path, count: int) -> float:
    """Write JPEG files of 500 x 375 into eight folders: blurred noise, grain and shapes. Return kB per file."""
    from PIL import Image, ImageDraw

    rng = np.random.default_rng(0)
    total = 0
    for k in range(count):
        place = folder / f"class{k % 8}"
        place.mkdir(parents=True, exist_ok=True)
        noise = rng.integers(0, 256, (12, 16, 3), np.uint8)
        smooth = np.asarray(Image.fromarray(noise).resize((500, 375), Image.Resampling.BICUBIC)).astype(np.float32)
        grain = smooth + rng.normal(0, 12, (375, 500, 3)).astype(np.float32)
        image = Image.fromarray(grain.clip(0, 255).astype(np.uint8))
        pen = ImageDraw.Draw(image)
        for _ in range(4):
            x, y = int(rng.integers(0, 400)), int(rng.integers(0, 300))
            color = "#" + rng.bytes(3).hex()
            pen.ellipse((x, y, x + 90, y + 60), fill=color)
        file = place / f"{k}.jpg"
        image.save(file, quality=88)
        total += file.stat().st_size
    return total / count / 1000


def make_tokens(path: Path, count: int) -> None:
    """Write a file of random uint16 tokens."""
    np.random.default_rng(0).integers(0, 50_257, count, np.uint16).tofile(path)


def plot(figure: Any, rows: Any) -> None:
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    for axes, kind in zip(np.atleast_1d(figure.subplots(1, len(kinds))), kinds, strict=True):
        here = [row for row in rows if row["kind"] == kind]
        axes.bar(
            [row["name"] for row in here],
            [row["rate"] for row in here],
            color=["#336699", *["#bbbbbb"] * (len(here) - 1)],
        )
        axes.set_ylabel(UNITS[kind])
