"""`jaxmodels data inspect CONFIG.py`: what a run trains on, as the model sees it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jaxmodels.commands.options import Configured
from jaxmodels.config import Config
from jaxmodels.errors import UserError, check_place
from jaxmodels.fields import Section


@dataclass(frozen=True)
class InspectOptions(Section):
    """Where the picture of training images goes, and the fields of the experiment."""

    out: Path = Path("inspect.png")
    """PNG file for training images, if the data has images."""


def inspect(given: Configured, options: InspectOptions) -> None:
    """Print what a run would train and evaluate on, and a few examples as the model will see them."""
    if options.out != InspectOptions.out:  # the one that is not asked for is needed for images alone
        check_place(options.out, "--out")
    show(given.config, out=options.out)


def show(cfg: Config, n: int = 3, out: Path = Path("inspect.png")) -> None:
    """Print what a run would train and evaluate on, and the first n examples as the model will see them.

    Images are drawn into `out`, each as several epochs augment it.
    """
    import numpy as np

    from jaxmodels import tasks
    from jaxmodels.data import Loader, Order, contract, open_for, preview
    from jaxmodels.data.source import Source, Split, Windows, unigram_loss

    fields = tasks.build(cfg.task, cfg.model, cfg.data).fields
    if out != InspectOptions.out and not contract.images(fields):
        raise UserError(f"got --out {out} for a model that reads no images, expected one that does, try it without")
    sources: dict[Split, Source] = {}
    for split in ("train", "eval"):
        source = sources[split] = open_for(cfg, split, fields)
        size = cfg.data.batch_size if split == "train" else cfg.eval.batch_size or cfg.data.batch_size
        print(f"{split}: {source.describe()}")
        print(f"    {-(-len(source) // size):,} batches of {size}, fingerprint {source.fingerprint}")
    train, held_out = sources["train"], sources["eval"]
    if isinstance(train, Windows) and isinstance(held_out, Windows):
        loss = unigram_loss(train, held_out)
        print(f"A unigram model of the training tokens has a loss of {loss:.3f} nats per token on the held-out ones.")

    order = Order(len(train), cfg.data.batch_size, cfg.train.seed)
    loader = Loader(train, order)
    print("A batch: " + ", ".join(f"{name} {x.shape} {x.dtype}" for name, x in loader.spec.items()))
    for k in range(n):
        step, row = divmod(k, order.batch_size)
        example = {name: x[row] for name, x in loader.local(step).items()}
        print(f"\nBatch {step}, row {row}: example {order.indices(step)[row]} of epoch {order.epochs(step)[row]}")
        print(preview.show(example, train, fields))
    first = np.concatenate([order.indices(k) for k in range(-(-preview.IMAGES // order.batch_size))])
    if preview.grid(train, first[: preview.IMAGES], out, fields):
        print(f"\n{out}: training images with their labels, each as several epochs augment it")
