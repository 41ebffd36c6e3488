"""Loaders that read the same files: ours, tf.data and torch's DataLoader; run by `benchmarks.loader`.

A process of its own for each: `python -m benchmarks.peers.loaders NAME KIND PATH SETTINGS`. A line of the input asks
for so many epochs; none works ahead between two turns.
"""

from __future__ import annotations

import io
import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

SIDE, CROP, IMAGES = 224, 0.08, 64
"""Pixels of an image, the smallest area of a crop, and images a batch."""
WINDOW, ROWS = 1024, 32
"""Tokens a window, and windows a batch."""

Epoch = Callable[[int], Iterator[Any]]
"""From the number of an epoch to its batches, as arrays in the host's memory."""


def ours_images(path: str, settings: dict[str, Any]) -> Epoch:
    from jaxmodels.config import Augment, Classification, Images
    from jaxmodels.data import Loader, Order, open_source

    cfg = Images(path=(path,), eval_fraction=0.0, threads=settings["threads"], pixels=settings["pixels"])
    augment = Augment(crop=CROP, flip=True)
    shape = (SIDE, SIDE, 3)
    source = open_source(cfg, "train", Classification(), inputs_shape=shape, num_classes=8, augment=augment)
    loader = Loader(source, Order(len(source), IMAGES, 0), prefetch=settings["prefetch"])
    steps = len(source) // IMAGES
    return lambda epoch: loader.iterate(epoch * steps, (epoch + 1) * steps)


def ours_tokens(path: str, settings: dict[str, Any]) -> Epoch:
    from jaxmodels.config import CausalLM, Tokens
    from jaxmodels.data import Loader, Order, open_source

    cfg = Tokens(path=(path,), eval_path=(path,), seq_len=WINDOW)
    source = open_source(cfg, "train", CausalLM(), vocab_size=50_257)
    loader = Loader(source, Order(len(source), ROWS, 0), prefetch=settings["prefetch"])
    steps = len(source) // ROWS
    return lambda epoch: loader.iterate(epoch * steps, (epoch + 1) * steps)


def tf_images(path: str, settings: dict[str, Any]) -> Epoch:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow as tf  # type: ignore[import-not-found]

    files = sorted(map(str, Path(path).glob("*/*.jpg")))
    folders = sorted({Path(file).parent.name for file in files})
    labels = [folders.index(Path(file).parent.name) for file in files]

    def read(file: Any, label: Any) -> Any:
        data = tf.io.read_file(file)
        shape = tf.image.extract_jpeg_shape(data)
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            shape,
            tf.zeros([1, 0, 4]),
            min_object_covered=0.0,
            aspect_ratio_range=(3 / 4, 4 / 3),
            area_range=(CROP, 1.0),
            max_attempts=10,
            use_image_if_no_bounding_boxes=True,
        )
        window = tf.concat([begin[:2], size[:2]], 0)
        image = tf.image.decode_and_crop_jpeg(data, window, channels=3)
        image = tf.image.resize(image, (SIDE, SIDE))
        image = tf.image.random_flip_left_right(tf.cast(image, tf.uint8))
        return image, label

    data = tf.data.Dataset.from_tensor_slices((files, labels)).shuffle(len(files))
    data = data.map(read, num_parallel_calls=settings["parallel"] or tf.data.AUTOTUNE)
    data = data.batch(IMAGES, drop_remainder=True).prefetch(tf.data.AUTOTUNE)
    return lambda epoch: data.as_numpy_iterator()


def tf_tokens(path: str, settings: dict[str, Any]) -> Epoch:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow as tf  # type: ignore[import-not-found]

    def split(rows: Any) -> Any:
        ids = tf.cast(tf.io.decode_raw(rows, tf.uint16), tf.int32)
        return ids[:, :-1], ids[:, 1:]

    # windows in the file's order, mixed in a buffer: what tf.data has for files of fixed records
    size = 2 * (WINDOW + 1)
    data = tf.data.FixedLengthRecordDataset(
        [path], size, footer_bytes=os.path.getsize(path) % size, buffer_size=1 << 22
    )
    data = (
        data.shuffle(settings["shuffle"])
        .batch(ROWS, drop_remainder=True)
        .map(split, num_parallel_calls=tf.data.AUTOTUNE)
    )
    data = data.prefetch(tf.data.AUTOTUNE)
    return lambda epoch: data.as_numpy_iterator()


class Photos:
    """A torch dataset of a folder of images, by Pillow."""

    def __init__(self, path: str) -> None:
        self.files = sorted(Path(path).glob("*/*.jpg"))
        folders = sorted({file.parent.name for file in self.files})
        self.labels = [folders.index(file.parent.name) for file in self.files]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        import torch
        from PIL import Image

        image = Image.open(io.BytesIO(self.files[index].read_bytes())).convert("RGB")
        box = random_box(image.width, image.height, torch.rand)
        image = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=box)
        if float(torch.rand(())) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.array(image)), self.labels[index]


def random_box(width: int, height: int, rand: Callable[..., Any]) -> tuple[float, float, float, float]:
    """A random crop as torchvision draws it: up to ten tries, else the whole."""
    for _ in range(10):
        u = rand(4).tolist()
        area = width * height * (CROP + (1 - CROP) * u[0])
        ratio = math.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * u[1])
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(u[2] * (width - w + 1)), int(u[3] * (height - h + 1))
            return left, top, left + w, top + h
    return 0, 0, width, height


class Cut:
    """A torch dataset of the windows of a file of tokens."""

    def __init__(self, path: str) -> None:
        self.tokens = np.memmap(path, np.uint16, "r")

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // WINDOW

    def __getitems__(self, indices: list[int]) -> Any:
        import torch

        starts = np.array(indices) * WINDOW
        rows = np.lib.stride_tricks.sliding_window_view(self.tokens, WINDOW + 1)[starts].astype(np.int32)
        rows = torch.from_numpy(rows)
        return rows[:, :-1], rows[:, 1:]


def torch_loader(dataset: Any, batch: int, settings: dict[str, Any], collate: Any = None) -> Epoch:
    import torch
    from torch.utils.data import DataLoader

    torch.set_num_threads(1)
    workers = settings["workers"]
    more = {"prefetch_factor": settings["prefetch"], "persistent_workers": True} if workers else {}
    loader = DataLoader(dataset, batch, shuffle=True, drop_last=True, num_workers=workers, collate_fn=collate, **more)

    def epoch(number: int) -> Iterator[Any]:
        return ([x.numpy() for x in arrays] for arrays in loader)

    return epoch


def as_it_is(batch: Any) -> Any:
    """What `__getitems__` gives is a batch already."""
    return batch


def torch_images(path: str, settings: dict[str, Any]) -> Epoch:
    return torch_loader(Photos(path), IMAGES, settings)


def torch_tokens(path: str, settings: dict[str, Any]) -> Epoch:
    return torch_loader(Cut(path), ROWS, settings, collate=as_it_is)


CONTESTANTS = {
    ("ours", "images"): ours_images,
    ("ours by Pillow", "images"): ours_images,
    ("ours", "tokens"): ours_tokens,
    ("tf.data", "images"): tf_images,
    ("tf.data", "tokens"): tf_tokens,
    ("torch", "images"): torch_images,
    ("torch", "tokens"): torch_tokens,
}


def main(name: str, kind: str, path: str, settings: str) -> None:
    epoch = CONTESTANTS[name, kind](path, json.loads(settings))
    done = 0
    print(json.dumps({"version": version()}), flush=True)
    for line in sys.stdin:
        before, start = used(), time.perf_counter()
        count = 0
        for _ in range(int(line)):
            for batch in epoch(done):
                first = next(iter(batch.values())) if isinstance(batch, dict) else batch[0]
                count += first.size if kind == "tokens" else len(first)
            done += 1
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "cpu": used() - before, "count": count}), flush=True)


def version() -> str:
    """Of the libraries that this contestant has loaded."""
    known = {"tensorflow": "TensorFlow", "torch": "torch", "PIL": "Pillow", "cv2": "OpenCV", "simplejpeg": "simplejpeg"}
    return ", ".join(f"{title} {sys.modules[name].__version__}" for name, title in known.items() if name in sys.modules)


def used() -> float:
    """CPU seconds of this process; those of its workers are known only once they have ended."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    # a contestant may live in an environment of its own
    if python := os.environ.pop("BENCHMARK_PYTHON", ""):
        os.execv(python, [python, "-m", "benchmarks.peers.loaders", *sys.argv[1:]])
    main(*sys.argv[1:])
