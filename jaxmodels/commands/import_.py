"""`jaxmodels import DIR --out RUN`: a run from weights in Hugging Face's format."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxmodels import config as configs
from jaxmodels import data, tasks
from jaxmodels.commands.progress import progress
from jaxmodels.compress.coding import coding
from jaxmodels.config import Config
from jaxmodels.data import special
from jaxmodels.data.corpus import Stdlib
from jaxmodels.data.section import DataConfig
from jaxmodels.data.special import text_of
from jaxmodels.data.synthetic import Synthetic
from jaxmodels.data.tokenizer import FILE
from jaxmodels.errors import UserError
from jaxmodels.hf import beside, load, pixels, save
from jaxmodels.hf import tokenizer as tokenizers
from jaxmodels.models.coded import is_coded
from jaxmodels.models.families import family_of
from jaxmodels.tasks import TaskConfig

log = logging.getLogger("jaxmodels")


def import_run(directory: Path, /, out: Path) -> None:
    """Make a run directory from weights in Hugging Face's format, to sample from, evaluate, or start training from.

    Args:
        directory: a folder with config.json and model.safetensors (or its index and shards).
        out: the run directory to create.
    """
    from jaxmodels.train import run as runs
    from jaxmodels.train import saved
    from jaxmodels.train.checkpoint import Checkpointer

    with save.complete(out) as part:
        source = load.open_source(directory)
        config = source.model.config
        # before the weights, because a file may be damaged, or be a link to elsewhere
        beside.keep(directory, part)
        tokenizer = tokenizers.load(directory)
        if tokenizer is not None:
            tokenizer.save(part)
        with progress("reading", source.size) as done:
            held = coding(source.section, {"model": source.model})
            shapes = {} if held is None else load.flatten(held.shapes()["model"])
            coded = {path: leaf for path, leaf in shapes.items() if is_coded(leaf)}
            params, stats = load.nested(load.read(source, done=done, coded=coded))
        state = {"params": {"model": params}, "stats": {"model": stats}}
        cfg = experiment(config, source.format.task(config), out if tokenizer else None)
        cfg = replace(cfg, compress=source.section)
        if cfg.task.answers == "class":
            cfg = classifying(cfg, directory)
        if pixels.known(source.format.family):
            seen = pixels.read(directory, source.format.family, config.input_shape)
            for remark in seen.remarks:
                log.warning("%s: %s", directory, remark)
            cfg = replace(
                cfg,
                data=replace(cfg.data, mean=seen.mean, std=seen.std),
                augment=replace(cfg.augment, crop=seen.crop),
            )
        if names := pixels.names(directory, getattr(config, "classes", 0) or 0):
            saved.write_kept(part, saved.Kept(classes=names))
        if tokenizer is not None and cfg.task.answers == "gaps":
            cfg = replace(cfg, task=masking(cfg.task, directory, tokenizer))
        if hasattr(cfg.task, "blank"):
            cfg = replace(cfg, task=recognizing(cfg.task, directory, tokenizer))
        meta = {"config": configs.to_json(cfg), "versions": runs.versions(), "metric": None}
        checkpointer = Checkpointer(part / "checkpoints")
        checkpointer.save(0, state, meta)
        checkpointer.wait()
        origin = {"file": str(directory), "overrides": [], "versions": runs.versions(), "commit": runs.commit()}
        configs.save(cfg, part / "config.json", origin)  # last, because without it this is not a run
    what = family_of(config).name
    print(f"{out}: {what}, {source.model.count():,} parameters from {len(source.found)} tensors of {directory}")


def experiment(model: Any, task: str, tokenizer: Path | None) -> Config:
    """Build the config of an imported run: its model, and data that the model can take."""
    if task not in tasks.TASKS.names():
        return Config(model=model)  # it can only be exported again, because no task trains it
    made = tasks.TASKS.find(task)()
    if hasattr(model, "longest_sound"):
        made = replace(made, seconds=model.longest_sound / model.sample_rate)
    data: DataConfig = Synthetic()
    if made.answers == "continuation" or (made.answers == "gaps" and tokenizer):
        data = Stdlib(tokenizer=str(tokenizer / FILE)) if tokenizer else Stdlib()
    length = min(data.seq_len, getattr(model, "context", data.seq_len))
    return Config(model=model, task=made, data=replace(data, seq_len=length))


def classifying(cfg: Config, directory: Path) -> Config:
    """Set whether the classes of an imported classifier exclude each other.

    Raises:
        UserError: its outputs are numbers, and not the logits of classes.
    """
    problem = special.objects(directory / "config.json").get(beside.PROBLEM)
    if problem == "regression":
        raise UserError(
            f"got {directory / 'config.json'} with {beside.PROBLEM} {problem!r}, expected a classifier, "
            "try another model, or jaxmodels.load_pretrained for its outputs in Python"
        )
    return replace(cfg, task=replace(cfg.task, multi_label=True)) if problem == beside.SEVERAL else cfg


def masking(task: TaskConfig, directory: Path, tokenizer: data.Tokenizer) -> TaskConfig:
    """Set the task's mask token, and the ids that are never masked."""
    token = text_of(directory, "mask_token")
    ids = tokenizer.ids((token or "[MASK]", text_of(directory, "pad_token") or "[PAD]"))
    kept = {i for i in (ids[1], *tokenizer.before, *tokenizer.after) if i is not None}
    return replace(task, mask_token=ids[0], keep=tuple(sorted(kept)))


def recognizing(task: TaskConfig, directory: Path, tokenizer: data.Tokenizer | None) -> TaskConfig:
    """Set the ids of the blank, which pads texts in transformers, and of what stands between words."""
    blank = special.objects(directory / "config.json").get("pad_token_id", 0)
    space = None if tokenizer is None else tokenizer.ids([tokenizers.delimiter(directory)])[0]
    return replace(task, blank=blank, space=space)
