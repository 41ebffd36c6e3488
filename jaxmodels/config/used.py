"""Which options an experiment uses: one that was set and does nothing is refused, not ignored."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from jaxmodels.config.sections import Augment, Config, DataConfig, TaskConfig
from jaxmodels.errors import UserError

RECORDS = ("tfds", "images", "table", "huggingface")
"""Sources that give records with fields."""
_FILES = ("text", "tokens", "images", "table")
_TEXTS = ("stdlib", "text", *RECORDS)
_LANGUAGE = ("causal_lm", "masked_lm", "seq2seq")
_EXAMPLES = ("classification", "contrastive", "vae", "gan")


class Use(NamedTuple):
    """What a field is used with; None: all there are."""

    sources: tuple[str, ...] | None = None
    tasks: tuple[str, ...] | None = None
    kinds: tuple[str, ...] | None = None
    """Of inputs: image, array (numbers), text."""


DATA: Mapping[str, Use] = {
    "source": Use(),
    "path": Use(_FILES),
    "eval_path": Use(_FILES),
    "dir": Use(("tfds",)),
    "name": Use(("tfds", "huggingface")),
    "train_split": Use(("tfds", "huggingface")),
    "eval_split": Use(("tfds", "huggingface")),
    "input_field": Use(RECORDS),
    "label_field": Use(RECORDS, _EXAMPLES),
    "target_field": Use(RECORDS, ("seq2seq",)),
    "group_field": Use(RECORDS, _EXAMPLES),
    "class_names": Use(RECORDS, ("contrastive",)),
    "captions": Use(RECORDS, ("contrastive",)),
    "eval_fraction": Use(("stdlib", *_FILES)),
    "bad_records": Use(RECORDS),
    "balance": Use(RECORDS, _EXAMPLES),
    "tokenizer": Use((*_TEXTS, "tokens"), None, ("text",)),
    "seq_len": Use(None, None, ("text",)),
    "pack": Use(_TEXTS, _LANGUAGE),
    "mean": Use((*RECORDS, "synthetic"), ("classification", "contrastive"), ("image", "array")),
    "std": Use((*RECORDS, "synthetic"), ("classification", "contrastive"), ("image", "array")),
    "batch_size": Use(),
    "prefetch": Use(),
    "threads": Use(RECORDS, _EXAMPLES, ("image",)),
    "pixels": Use(RECORDS, _EXAMPLES, ("image",)),
}
AUGMENT: Mapping[str, Use] = {field.name: Use(RECORDS, _EXAMPLES, ("image",)) for field in dataclasses.fields(Augment)}
TASK: Mapping[str, Use] = {
    "name": Use(),
    "label_smoothing": Use(None, (*_LANGUAGE, "classification")),
    "z_loss": Use(None, (*_LANGUAGE, "classification")),
    "multi_label": Use(None, ("classification",)),
    "mixup": Use(None, ("classification",)),
    "cutmix": Use(None, ("classification",)),
    "mask_fraction": Use(None, ("masked_lm",)),
    "mask_token": Use(None, ("masked_lm",)),
    "keep": Use(None, ("masked_lm",)),
    "pixels": Use(None, ("vae",)),
    "binarise": Use(None, ("vae",)),
    "beta": Use(None, ("vae",)),
    "beta_warmup_steps": Use(None, ("vae",)),
    "critic_steps": Use(None, ("gan",)),
    "gradient_penalty": Use(None, ("gan",)),
}


def kinds(task: str, shaped: bool) -> tuple[str, ...]:
    """Kinds that a task's inputs can be; `shaped`: the model says the shape of its inputs, so they are no texts."""
    if task == "contrastive":
        return ("image", "array", "text")
    return ("image", "array") if task in _EXAMPLES and (shaped or task != "classification") else ("text",)


def check_data(data: DataConfig, augment: Augment, task: str, kinds: Iterable[str]) -> None:
    """Raises UserError where a field of data or augment was set that this source, task and kind of inputs don't use."""
    here = (data.source, task, tuple(kinds))
    _check("data", data, DATA, *here)
    _check("augment", augment, AUGMENT, *here)
    if data.eval_path and data.eval_fraction != (usual := DataConfig().eval_fraction):
        raise UserError(
            f"got data.eval_fraction {data.eval_fraction} and data.eval_path, expected one of them, "
            f"try --data.eval-fraction {usual}"
        )
    if augment.magnitude != (strength := Augment().magnitude) and not augment.randaugment:
        raise UserError(
            f"got augment.magnitude {augment.magnitude} without augment.randaugment, whose strength it is, expected "
            f"both, try --augment.randaugment 2 or --augment.magnitude {strength}"
        )


def check_task(task: TaskConfig, model: Any) -> None:
    """Raises UserError where a field of task was set that this kind of training of this model does not use."""
    _check("task", task, TASK, "", task.name, ())
    penalty = TaskConfig().gradient_penalty
    if task.gradient_penalty != penalty and getattr(model, "kind", "wgan-gp") != "wgan-gp":
        raise UserError(
            f"got task.gradient_penalty {task.gradient_penalty} for a GAN of kind {model.kind}, expected wgan-gp, "
            f"try --model.kind wgan-gp or --task.gradient-penalty {penalty}"
        )


def needed(cfg: Config, kind: str = "") -> Config:
    """The config of a run that was trained once, without the fields that it does not use, which may have been set.

    `kind` is that of its inputs, where it is known.
    """
    task, data, augment = cfg.task, cfg.data, cfg.augment
    found = kinds(task.name, hasattr(cfg.model, "input_shape"))
    here = (data.source, task.name, ((kind, "text") if task.name == "contrastive" else (kind,)) if kind else found)
    data, augment = _without(data, DATA, *here), _without(augment, AUGMENT, *here)
    task = _without(task, TASK, "", task.name, ())
    if data.eval_path:
        data = dataclasses.replace(data, eval_fraction=DataConfig().eval_fraction)
    if not augment.randaugment:
        augment = dataclasses.replace(augment, magnitude=Augment().magnitude)
    if getattr(cfg.model, "kind", "wgan-gp") != "wgan-gp":
        task = dataclasses.replace(task, gradient_penalty=TaskConfig().gradient_penalty)
    return dataclasses.replace(cfg, task=task, data=data, augment=augment)


def _without(config: Any, table: Mapping[str, Use], *here: Any) -> Any:
    usual = type(config)()
    return dataclasses.replace(config, **{name: getattr(usual, name) for name, _, _ in _unused(config, table, *here)})


def _check(section: str, config: Any, table: Mapping[str, Use], source: str, task: str, kinds: tuple[str, ...]) -> None:
    for name, who, known in _unused(config, table, source, task, kinds):
        flag = f"--{section}.{name.replace('_', '-')}"
        others = f" (it is for {', '.join(known)})" if known else ""
        raise UserError(
            f"got {section}.{name} {getattr(config, name)!r}, which {who} does not use, expected it left as it is"
            f"{others}, try without {flag}"
        )


def _unused(
    config: Any, table: Mapping[str, Use], source: str, task: str, kinds: tuple[str, ...]
) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Fields that were set and have no use here: the name, what does not use it, and what does."""
    usual = type(config)()
    for name, use in table.items():
        if getattr(config, name) == getattr(usual, name):
            continue
        if source and use.sources is not None and source not in use.sources:
            yield name, f"data.source {source}", use.sources
        elif use.tasks is not None and task not in use.tasks:
            yield name, f"task {task}", use.tasks
        elif kinds and use.kinds is not None and not set(kinds) & set(use.kinds):
            yield name, f"a model of inputs that are no {' or '.join(use.kinds)}", ()
