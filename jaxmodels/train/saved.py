"""Runs on the disk, opened again: without their data, or with what they are to be evaluated on."""

from __future__ import annotations

import dataclasses
import json
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
from jaxmodels.hf import format_of
from jaxmodels.models.families import create, family_of
from jaxmodels.models.model import Model
from jaxmodels.parallel import mesh
from jaxmodels.tasks.task import Task, normalized
from jaxmodels.train import evaluate, metrics
from jaxmodels.train.checkpoint import Checkpointer
from jaxmodels.train.manifest import whole

KEPT = "data.json"


@dataclass(frozen=True)
class Kept:
    """What a run keeps of its data, so that it can be used without them."""

    field: str = ""
    """The records' field that is the model's input, where they have fields."""
    kind: str = ""
    """What that field holds: image, text or array."""
    classes: tuple[str, ...] = ()
    """Names of the classes, as far as they have names."""
    train: str = ""
    """What it was trained on, in one line."""
    eval: str = ""
    """What it was evaluated on."""


def keep(run: Path, train: data.Source, held_out: data.Source) -> None:
    """Write what a run keeps of its data beside its config."""
    kept = Kept(held_out.field, held_out.kind, tuple(train.class_names), train.describe(), held_out.describe())
    write(run, kept)
    if train.tokenizer is not None:
        with tempfile.TemporaryDirectory(suffix=".part", dir=run) as folder:
            train.tokenizer.save(Path(folder))
            for path in Path(folder).iterdir():
                path.replace(run / path.name)


def kept(run: Path) -> Kept:
    """What a run keeps of its data; nothing where it was made before runs did."""
    path = run / KEPT
    if not path.is_file():
        return Kept()
    values = special.objects(path, "what a run keeps of its data")
    found = {field.name: values.get(field.name, field.default) for field in dataclasses.fields(Kept)}
    classes = found.pop("classes")
    named = isinstance(classes, list | tuple) and all(isinstance(name, str | int) for name in classes)
    if not named or not all(isinstance(value, str) for value in found.values()):
        raise UserError(
            f"got {path} with values of another kind, expected what a run keeps of its data, try another copy"
        )
    return Kept(classes=tuple(map(str, classes)), **found)


def write(run: Path, kept: Kept) -> None:
    """Write what a run keeps of its data."""
    text = json.dumps(dataclasses.asdict(kept), indent=1) + "\n"
    with whole(run / KEPT) as part:
        part.write_text(text, encoding="utf-8", errors="backslashreplace")


@dataclass(frozen=True)
class Run:
    """A run as it lies on the disk: what it was, and what one of its checkpoints holds. Its data need not be here."""

    directory: Path
    config: Config
    networks: Mapping[str, Model]
    """By name; that of a task with one is `model`."""
    params: dict[str, Any]
    """Of each network, those that evaluation uses: the moving averages where the run keeps them."""
    stats: dict[str, Any]
    """Batch statistics of the networks that have them."""
    step: int
    meta: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    """What was saved with the checkpoint beside its arrays."""

    @property
    def model(self) -> Model:
        """The network of a task that has one."""
        return self.networks["model"]

    @cached_property
    def task(self) -> Task:
        """Its losses and metrics.

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
        """The lines of metrics.jsonl by step, up to the newest; a warning says where lines are missing."""
        rows = metrics.read(self.directory)
        metrics.check_lines(self.directory, rows, self.step, self.meta.get("lines"))
        return rows

    @cached_property
    def tokenizer(self) -> data.Tokenizer | None:
        """The run's own, None where it reads no texts."""
        return data.load_tokenizer(self.directory) if (self.directory / TOKENIZER).is_file() else None

    @cached_property
    def kept(self) -> Kept:
        """What it keeps of its data; nothing where it was made before runs did."""
        return kept(self.directory)

    def class_name(self, index: int) -> str:
        """A class's name in the data, or its number."""
        names = self.kept.classes
        return names[index] if index < len(names) else str(index)

    def apply(self, *args: Any, network: str = "model", params: Any = None, **kwargs: Any) -> Any:
        """A network's outputs, in evaluation, of inputs as it takes them; `params` in the place of its own."""
        model, params = self.networks[network], self.params[network] if params is None else params
        if network not in self.stats:
            return model.apply(params, *args, **kwargs)
        return model.apply(params, *args, stats=self.stats[network], **kwargs)[0]

    def inputs(self, batch: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """What a classifier is given of a batch of the data: the first argument, and those with names."""
        named = {name: batch[name] for name in ("segment_ids", "types") if name in batch}
        return normalized(jax.numpy.asarray(batch["inputs"]), self.config.data), named

    def evaluation(self, data: Mapping[str, Any] | None = None) -> Evaluation:
        """Open the data that the run was evaluated on, or others: `data` names the fields of that section to change.

        Classes are those that the run was trained on, whatever the data's are; texts are read by the run's own
        tokenizer.

        Raises:
            UserError: the data are not here or do not fit the run.
        """
        return _evaluation(self, data or {})


def load_run(directory: str | Path, *, best: bool = False) -> Run:
    """Open a run at its newest checkpoint, or its best; on the default device, from where a mesh may take it.

    Raises:
        UserError: no run or no checkpoint there, or one that does not fit its config.
    """
    run = read_run(directory, best=best)
    return dataclasses.replace(run, params=jax.device_put(run.params), stats=jax.device_put(run.stats))


def read_run(directory: str | Path, *, best: bool = False) -> Run:
    """`load_run`, with arrays that stay in the host's memory.

    Raises:
        UserError: no run or no checkpoint there, or one that does not fit its config.
    """
    directory = Path(directory)
    cfg, _ = configs.read(directory)
    # the result does not depend on how the work was shared out
    cfg = dataclasses.replace(cfg, mesh=Mesh(), train=dataclasses.replace(cfg.train, strategy="jit", accumulate=1))
    networks = {"model": create(cfg.model)} if _without_task(directory, cfg) else _task(cfg).networks
    checkpointer = Checkpointer(directory / "checkpoints")
    shapes = {name: model.shapes() for name, model in networks.items()}
    kind = "params" if cfg.train.ema is None else "ema"
    params, meta, at = checkpointer.restore_params("best" if best else None, subtree=kind, abstract=shapes)
    stats = {name: tree for name, model in networks.items() if (tree := jax.eval_shape(model.stats))}
    if stats:
        stats, _, _ = checkpointer.restore_params(at, subtree="stats", abstract=stats)
    return Run(directory, cfg, networks, params, stats, at, meta=meta)


def _without_task(directory: Path, cfg: Config) -> bool:
    """Whether a run was imported with a model that no task trains, such as one without a head: to be exported again."""
    return (directory / "pretrained").is_dir() and not format_of(family_of(cfg.model).name).task(cfg.model)


def _task(cfg: Config) -> Task:
    return tasks.build(cfg.task, cfg.model, cfg.data, cfg.train, cfg.eval.metrics)


@dataclass(frozen=True)
class Evaluation(Run):
    """A run with the examples that it is evaluated on; see `Run.evaluation`."""

    source: data.Source

    def measure(self) -> dict[str, float]:
        """The metrics of the whole evaluation set."""
        where = mesh.make_mesh(Mesh())
        everywhere = NamedSharding(where, PartitionSpec())
        params, stats = jax.device_put((self.params, self.stats), everywhere)
        found = evaluate.build(self.task, where, classes=self.source.class_names, groups=self.source.groups)
        return found(params, stats, self._loader(where).once()) or {}

    def _loader(self, where: jax.sharding.Mesh) -> data.Loader:
        size = self.config.eval.batch_size or self.config.data.batch_size
        if self.task.whole is None:  # else pairs are compared, and those that fill up a batch too
            size = -(-size // where.size) * where.size
        shardings = self.task.shardings(where, data.spec(self.source, size))
        order = data.Order(len(self.source), size, self.config.train.seed)
        return data.Loader(self.source, order, shardings, prefetch=self.config.data.prefetch)

    def examples(self, first: int, last: int) -> dict[str, np.ndarray]:
        """A batch of examples, as far as there are so many."""
        indices = np.arange(first, min(last, len(self.source)))
        return self.source.batch(indices, np.zeros_like(indices))

    def batches(self) -> Iterator[dict[str, np.ndarray]]:
        """All examples, in order, the last batch as it comes."""
        size = self.config.eval.batch_size or self.config.data.batch_size
        last = len(self.source)
        if self.config.eval.batches is not None:
            last = min(last, self.config.eval.batches * size)
        for first in range(0, last, size):
            yield self.examples(first, min(first + size, last))

    def class_name(self, index: int) -> str:
        names = self.source.class_names
        return names[index] if index < len(names) else str(index)


def _evaluation(run: Run, given: Mapping[str, Any]) -> Evaluation:
    task, section = run.task, elsewhere(run, given)
    cfg = dataclasses.replace(run.config, data=section)
    try:
        source = data.open_for(cfg, "eval", task.fields, run.kept.classes)
    except UserError as error:
        if given:
            raise
        raise UserError(f"{error}, or other data than the run's own with {section.instead}") from error
    check_batch(task.fields, data.spec(source, section.batch_size))
    known = {field.name: getattr(run, field.name) for field in dataclasses.fields(run)}
    return Evaluation(**{**known, "config": cfg}, source=source)


def elsewhere(run: Run, given: Mapping[str, Any]) -> DataConfig:
    """The section `data` of a run with what it is evaluated on changed; `source` names another kind.

    Raises:
        UserError: such data have no such field.
    """
    own, answers = run.config.data, run.config.task.answers
    fields = {name: value for name, value in given.items() if name != "source"}
    section = own.of_kind(given["source"]) if given.get("source", own.kind) != own.kind else own
    known = {field.name for field in dataclasses.fields(section)}
    if wrong := [name for name in fields if name not in known]:
        raise UserError(
            f"got {_flag(wrong[0])} {_shown(fields[wrong[0]])} for data {section.kind}, which have no use for it, "
            f"expected it for data that have, try {section.instead}"
        )
    imported = (run.directory / "pretrained").is_dir() and not run.kept.train
    if not own.real and not given and imported:
        kind = "table" if answers in ("class", "classes", "translation") else "text"
        texts = run.tokenizer is not None and answers != "caption"
        captions = " --data.captions 'a photo of a {label}'" if answers == "caption" else ""
        raise UserError(
            f"got {run.directory}, which was imported and has no data of its own, expected some to evaluate on, "
            f"try --data {f'{kind} --data.path FILE' if texts else f'images --data.path FOLDER{captions}'}"
        )
    if run.tokenizer is not None and "tokenizer" in known:
        fields["tokenizer"] = str(run.directory)
    return section.evaluated_on(fields)


def _flag(name: str) -> str:
    return {"eval_split": "--split", "dir": "--data-dir"}.get(name, f"--data.{name.replace('_', '-')}")


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else repr(value)
