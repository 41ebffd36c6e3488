"""Runs on the disk, opened again: without their data, or with data to evaluate them on."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxmodels import config as configs
from jaxmodels import data, tasks
from jaxmodels.config import Config, Mesh
from jaxmodels.data import special
from jaxmodels.data.contract import check_batch
from jaxmodels.data.section import DataConfig
from jaxmodels.data.tokenizer import FILE as TOKENIZER
from jaxmodels.errors import UserError
from jaxmodels.fields import KVCache
from jaxmodels.hf import beside, format_for
from jaxmodels.models.adapted import merge
from jaxmodels.models.coded import plain
from jaxmodels.models.families import create
from jaxmodels.models.model import Model, with_kv_cache
from jaxmodels.parallel import mesh, progress
from jaxmodels.tasks.task import Task, normalized
from jaxmodels.train import bases, evaluate, metrics
from jaxmodels.train.checkpoint import Checkpointer
from jaxmodels.train.manifest import atomic_write
from jaxmodels.train.state import adapted, coded

log = logging.getLogger("jaxmodels")

KEPT = "data.json"


@dataclass(frozen=True)
class Kept:
    """Facts about a run's data that the run keeps, so that it can be used without the data."""

    field: str = ""
    """The record field that is the model's input, if the records have fields."""
    kind: str = ""
    """What that field holds: image, text or array."""
    classes: tuple[str, ...] = ()
    """Names of the classes, if they have names."""
    groups: tuple[str, ...] = ()
    """Names of the groups, if the data have any."""
    train: str = ""
    """What the run was trained on, in one line."""
    eval: str = ""
    """What the run was evaluated on, in one line."""


def keep_facts(run: Path, train: data.Source, held_out: data.Source) -> None:
    """Write the facts about a run's data beside its config, and its tokenizer."""
    names = (tuple(train.class_names), tuple(train.groups))
    kept = Kept(held_out.field, held_out.kind, *names, train.describe(), held_out.describe())
    write_kept(run, kept)
    if train.tokenizer is not None:
        with tempfile.TemporaryDirectory(suffix=".part", dir=run) as folder:
            train.tokenizer.save(Path(folder))
            for path in Path(folder).iterdir():
                path.replace(run / path.name)


def read_kept(run: Path) -> Kept:
    """Read the facts about a run's data; empty if the run is too old to have kept them."""
    path = run / KEPT
    if not os.path.lexists(path):
        return Kept()
    values = special.objects(path, "facts about a run's data")
    found = {field.name: values.get(field.name, field.default) for field in dataclasses.fields(Kept)}
    lists = [found.pop(name) for name in ("classes", "groups")]
    named = all(isinstance(each, list | tuple) and all(isinstance(x, str | int) for x in each) for each in lists)
    if not named or not all(isinstance(value, str) for value in found.values()):
        raise UserError(f"got {path} with values of another kind, expected facts about a run's data, try another copy")
    classes, groups = (tuple(map(str, each)) for each in lists)
    return Kept(classes=classes, groups=groups, **found)


def write_kept(run: Path, kept: Kept) -> None:
    """Write the facts about a run's data."""
    text = json.dumps(dataclasses.asdict(kept), indent=1) + "\n"
    with atomic_write(run / KEPT) as part:
        part.write_text(text, encoding="utf-8", errors="backslashreplace")


@dataclass(frozen=True)
class Run:
    """A run on the disk: its config and what one of its checkpoints holds. Its data need not be present."""

    directory: Path
    config: Config
    networks: Mapping[str, Model]
    """Networks by name; if there is only one, it is `model`."""
    params: dict[str, Any]
    """Parameters of each network, as evaluation uses them: the moving averages if the run keeps them. Some are codes
    (`models.coded.Coded`) if its config has a section `compress`; `models.coded.plain` gives arrays."""
    stats: dict[str, Any]
    """Batch statistics of the networks that have them."""
    step: int
    meta: Mapping[str, Any] = field(default_factory=dict)
    """What was saved with the checkpoint besides its arrays."""

    @property
    def model(self) -> Model:
        """The network, for a task that has only one."""
        return self.networks["model"]

    @cached_property
    def task(self) -> Task:
        """The run's task, with its losses and metrics.

        Raises:
            UserError: the run was imported, and no task trains such a model.
        """
        if _without_task(self.directory, self.config):
            kind = type(self.config.model).__name__
            raise UserError(
                f"got {self.directory}, which was imported with a {kind} that no task trains, expected a model with a "
                f"head, try jaxmodels export {self.directory} DIR"
            )
        return _task(self.config)

    @cached_property
    def metrics(self) -> list[dict[str, float]]:
        """The lines of metrics.jsonl by step, up to the newest; a warning says if lines are missing."""
        rows = metrics.read(self.directory)
        metrics.check_lines(self.directory, rows, self.step, self.meta.get("lines"))
        return rows

    @cached_property
    def tokenizer(self) -> data.Tokenizer | None:
        """The run's own tokenizer, None if it reads no text."""
        return data.load_tokenizer(self.directory) if (self.directory / TOKENIZER).is_file() else None

    @cached_property
    def kept(self) -> Kept:
        """Facts about the run's data; empty, with a warning, if the run lost them or is too old to have kept them."""
        named = self.config.task.answers in ("class", "classes") and self.config.data.real
        if named and self.step and not os.path.lexists(self.directory / KEPT):
            log.warning("%s has no %s, which names its classes: they are numbers here", self.directory, KEPT)
        return read_kept(self.directory)

    def class_name(self, index: int) -> str:
        """The name of a class in the data, or its number."""
        names = self.kept.classes
        return names[index] if index < len(names) else str(index)

    def apply(self, *args: Any, network: str = "model", params: Any = None, **kwargs: Any) -> Any:
        """Return a network's outputs in evaluation mode; `params` replaces its own parameters."""
        model, params = self.networks[network], self.params[network] if params is None else params
        if network not in self.stats:
            return model.apply(params, *args, **kwargs)
        return model.apply(params, *args, stats=self.stats[network], **kwargs)[0]

    def numbers(self) -> Run:
        """Return the run with all parameters as arrays: codes dequantized, and factors beside them merged."""
        axes = {name: network.axes() for name, network in self.networks.items()}
        return dataclasses.replace(self, params=plain(merge(self.params, axes)))

    def inputs(self, batch: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Return a classifier's inputs in a batch: the first argument, and the keyword arguments."""
        named = {name: batch[name] for name in ("segment_ids", "types") if name in batch}
        return normalized(jax.numpy.asarray(batch["inputs"]), self.config.data), named

    def evaluation(self, data: Mapping[str, Any] | None = None, *, kind: str | None = None) -> Evaluation:
        """Open the data that the run was evaluated on, or other data: `data` gives the fields of the section to change,
        and `kind` names another kind of section.

        Classes are always those that the run was trained on, and text is read by the run's own tokenizer.

        Raises:
            UserError: the data are not here or do not fit the run.
        """
        return _evaluation(self, data or {}, kind)


def load_run(directory: str | Path, *, best: bool = False, kv_cache: KVCache | None = None) -> Run:
    """Open a run at its newest checkpoint, or its best one, on the default device; a mesh may take it from there.

    With `kv_cache` its model decodes with a key-value cache that is held so, as `with_kv_cache` says.

    Raises:
        UserError: there is no run or no checkpoint there, or the checkpoint does not fit its config.
    """
    run = read_run(directory, best=best)
    if kv_cache is not None:
        run = dataclasses.replace(run, networks={**run.networks, "model": with_kv_cache(run.model, kv_cache)})
    return dataclasses.replace(run, params=jax.device_put(run.params), stats=jax.device_put(run.stats))


def read_run(directory: str | Path, *, best: bool = False) -> Run:
    """Open a run as `load_run` does, with arrays in host memory.

    Raises:
        UserError: there is no run or no checkpoint there, or the checkpoint does not fit its config.
    """
    directory = Path(directory)
    cfg, _ = configs.read(directory)
    # the result does not depend on how the work was distributed
    cfg = dataclasses.replace(cfg, mesh=Mesh(), train=dataclasses.replace(cfg.train, strategy="jit", accumulate=1))
    networks = {"model": create(cfg.model)} if _without_task(directory, cfg) else _task(cfg).networks
    checkpointer = Checkpointer(directory / "checkpoints")
    held = coded(cfg, networks) if cfg.adapter is None else None
    shapes = {name: model.shapes() for name, model in networks.items()} if held is None else held.shapes()
    kind, step = "params" if cfg.train.ema is None else "ema", "best" if best else None
    if cfg.adapter is None:
        params, meta, at = checkpointer.restore_params(step, subtree=kind, abstract=shapes)
    else:
        task = _task(cfg)
        adapter = adapted(cfg, task)
        assert adapter is not None
        base, trained, meta, at = bases.restore(directory, cfg, adapter, step, kind)
        params = bases.merged(base, trained, task.axes())
    stats = {name: tree for name, model in networks.items() if (tree := jax.eval_shape(model.stats))}
    if stats:
        stats, _, _ = checkpointer.restore_params(at, subtree="stats", abstract=stats)
    return Run(directory, cfg, networks, params, stats, at, meta=meta)


def _without_task(directory: Path, cfg: Config) -> bool:
    """Whether a run was imported with a model that no task trains (such as one without a head), only to be exported."""
    return (directory / "pretrained").is_dir() and not format_for(cfg.model).task(cfg.model)


def _task(cfg: Config) -> Task:
    return tasks.build(cfg.task, cfg.model, cfg.data, cfg.train, cfg.eval.metrics)


@dataclass(frozen=True)
class Evaluation:
    """A run beside the examples to evaluate it on; see `Run.evaluation`."""

    run: Run
    """The run, whose config names these data."""
    source: data.Source

    def measure(self) -> dict[str, float]:
        """Compute the metrics of the whole evaluation set."""
        where = mesh.make_mesh(Mesh())
        everywhere = NamedSharding(where, PartitionSpec())
        params, stats = jax.device_put((self.run.params, self.run.stats), everywhere)
        task, source = self.run.task, self.source
        named: dict[str, Any] = {"classes": source.class_names, "groups": source.groups, "source": source}
        found = evaluate.build_evaluate(task, where, **named)
        progress.phase("evaluation", self.run.step)
        try:
            return found(params, stats, self.loader(where).once()) or {}
        finally:
            progress.phase("idle")

    def loader(self, where: jax.sharding.Mesh) -> data.Loader:
        """Return the loader of its batches, placed on a mesh."""
        size = self.run.config.eval.batch_size or self.run.config.data.batch_size
        if self.run.task.whole is None:  # otherwise pairs are compared, including those with padding rows
            size = -(-size // where.size) * where.size
        shardings = self.run.task.shardings(where, data.spec(self.source, size))
        order = data.Order(len(self.source), size, self.run.config.train.seed)
        return data.Loader(self.source, order, shardings, prefetch=self.run.config.data.prefetch)

    def examples(self, first: int, last: int) -> dict[str, np.ndarray]:
        """Return the examples from `first` to `last`, or to the end of the data, as a batch."""
        indices = np.arange(first, min(last, len(self.source)))
        return self.source.batch(indices, np.zeros_like(indices))

    def batches(self) -> Iterator[dict[str, np.ndarray]]:
        """Yield all examples in order; the last batch may be smaller."""
        size = self.run.config.eval.batch_size or self.run.config.data.batch_size
        last = len(self.source)
        if self.run.config.eval.batches is not None:
            last = min(last, self.run.config.eval.batches * size)
        for first in range(0, last, size):
            yield self.examples(first, min(first + size, last))

    def class_name(self, index: int) -> str:
        """The name of a class in these data, or its number."""
        names = self.source.class_names
        return names[index] if index < len(names) else str(index)


def _evaluation(run: Run, given: Mapping[str, Any], kind: str | None) -> Evaluation:
    task, section = run.task, evaluation_data(run, given, kind)
    cfg = dataclasses.replace(run.config, data=section)
    try:
        source = data.open_for(cfg, "eval", task.fields, run.kept.classes, run.kept.groups)
    except UserError as error:
        if given or kind:
            raise
        raise UserError(f"{error}, or other data than the run's own with {section.instead}") from error
    check_batch(task.fields, data.spec(source, section.batch_size))
    names = source.class_names
    if (given or kind) and names and not run.kept.classes and names != tuple(map(str, range(len(names)))):
        log.warning(
            "%s does not name its classes, so those of %s are taken for 0 to %s in this order: %s",
            run.directory,
            section.kind,
            len(names) - 1,
            ", ".join(names[:10]) + (", ..." if len(names) > 10 else ""),
        )
    return Evaluation(dataclasses.replace(run, config=cfg), source)


def evaluation_data(run: Run, given: Mapping[str, Any], kind: str | None = None) -> DataConfig:
    """Return a run's section `data`, changed to evaluate on other data, or on data of another kind.

    Raises:
        UserError: such data have no such field.
    """
    own, answers = run.config.data, run.config.task.answers
    fields = dict(given)
    section = own if kind in (None, own.kind) else own.of_kind(kind)
    known = {field.name for field in dataclasses.fields(section)}
    if wrong := [name for name in fields if name not in known]:
        raise UserError(
            f"got {_flag(wrong[0])} {_shown(fields[wrong[0]])} for data {section.kind}, which has no such field, "
            f"expected a field of that kind of data, try {section.instead}"
        )
    if not own.real and not (given or kind) and imported(run.directory, run.kept):
        wanted = "table" if answers in ("class", "classes", "translation") else "text"
        reads = run.tokenizer is not None and answers != "caption"
        texts = reads or answers in ("translation", "continuation", "gaps")
        captions = " --data.captions 'a photo of a {label}'" if answers == "caption" else ""
        raise UserError(
            f"got {run.directory}, an imported model without data of its own, expected data to evaluate on, "
            f"try --data {f'{wanted} --data.path FILE' if texts else f'images --data.path FOLDER{captions}'}"
        )
    if run.tokenizer is not None and "tokenizer" in known:
        fields["tokenizer"] = str(run.directory)
    elif given and section.tokenizer not in ("", "bytes") and not Path(section.tokenizer).expanduser().exists():
        # it would be learned anew, from other texts
        raise UserError(
            f"got {run.directory} without {TOKENIZER}, by which it reads texts, expected it there, try another copy"
        )
    return section.evaluated_on(fields)


def imported(directory: Path, kept: Kept) -> bool:
    """Whether a run is of published weights alone: it was never trained, and its config's data are none of its own."""
    return (directory / beside.KEPT).is_dir() and not kept.train


def _flag(name: str) -> str:
    return {"eval_split": "--split", "dir": "--data-dir"}.get(name, f"--data.{name.replace('_', '-')}")


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else repr(value)
