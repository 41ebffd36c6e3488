"""A split of a source, opened for a task: the request, and the check that every option set has an effect."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxmodels.data.contract import Contract
from jaxmodels.data.files import shown
from jaxmodels.data.section import SHARED, Augment, DataConfig, default
from jaxmodels.data.source import Source, Split
from jaxmodels.errors import UserError


@dataclass(frozen=True)
class Opening:
    """What a task's examples are made from, and what is known about the model that they are for."""

    data: DataConfig
    split: Split
    task: str
    """The task's name, for messages."""
    reads: tuple[str, ...] = ()
    """Fields of `data` that the task itself reads, such as the mean that it subtracts from pixels."""
    vocab_size: int | None = None
    inputs_shape: tuple[int, ...] | None = None
    num_classes: int | None = None
    augment: Augment = field(default_factory=Augment)
    """How images of the training split are augmented."""
    seed: int = 0
    classes: Sequence[str] = ()
    """Names of the classes that a model was trained on, if labels are to use these instead of the data's own."""
    fields: Contract | None = None
    """The fields of the task's batches."""
    groups: Sequence[str] = ()
    """Names of the groups that a model was trained on, which number them where they are among its inputs."""

    def check(self, used: Sequence[str], kinds: str) -> None:
        """Refuse options that have no effect: `used` names the shared fields of `data` that these examples depend on.

        "augment" among them stands for the whole section; `kinds` says what the examples are, for the message.

        Raises:
            UserError: an option was set that has no effect here.
        """
        here = {item.name for item in dataclasses.fields(self.data)}
        unused = [("data", self.data, name) for name in SHARED if name in here and name not in used]
        if "augment" not in used:
            unused += [("augment", self.augment, item.name) for item in dataclasses.fields(self.augment)]
        for section, owner, name in unused:
            if (value := getattr(owner, name)) != default(owner, name):
                raise UserError(
                    f"got {section}.{name} {value!r}, which {self.task} of {kinds} from {self.data.kind} does not use, "
                    f"expected it left as it is, try without --{section}.{name.replace('_', '-')}"
                )


def open_source(
    data: DataConfig,
    split: Split,
    task: Any,
    *,
    vocab_size: int | None = None,
    inputs_shape: tuple[int, ...] | None = None,
    num_classes: int | None = None,
    augment: Augment | None = None,
    seed: int = 0,
    classes: Sequence[str] = (),
    fields: Contract | None = None,
    groups: Sequence[str] = (),
) -> Source:
    """Open the examples of a split for a task, given as its config section.

    `vocab_size`, `inputs_shape` and `num_classes` are the model's, and the data are checked against them. Synthetic
    data are drawn from `fields`, the contract of the task's batches. See `Opening` for the others.

    Raises: UserError.
    """
    opening = Opening(
        data,
        split,
        task.kind,
        task.reads,
        vocab_size,
        inputs_shape,
        num_classes,
        augment or Augment(),
        seed,
        tuple(classes),
        fields,
        tuple(groups),
    )
    found = data.examples(opening, task)
    if not isinstance(found, Source):
        what = f"task {task.kind}" if type(data).examples is DataConfig.examples else f"data {data.kind}"
        raise UserError(f"got {what}, whose examples gives {shown(found)}, expected a Source, try one of data.examples")
    return found


def open_for(
    cfg: Any, split: Split, fields: Contract | None = None, classes: Sequence[str] = (), groups: Sequence[str] = ()
) -> Source:
    """Open the examples of a whole experiment; `fields` are its task's contract, the others are as in `Opening`."""
    return open_source(
        cfg.data,
        split,
        cfg.task,
        vocab_size=getattr(cfg.model, "vocab_size", None),
        inputs_shape=getattr(cfg.model, "input_shape", None),
        num_classes=getattr(cfg.model, "classes", None),
        augment=cfg.augment,
        seed=cfg.train.seed,
        classes=classes,
        fields=fields,
        groups=groups,
    )
