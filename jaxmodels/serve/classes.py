"""What a classifier is made of, whether it is a run or an artefact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmodels import data
from jaxmodels.data import given
from jaxmodels.data.records import distinct
from jaxmodels.errors import UserError
from jaxmodels.generate import prepare
from jaxmodels.generate.classes import class_names, class_shares
from jaxmodels.serve import artefact_run
from jaxmodels.serve.artefact_run import Artefact
from jaxmodels.train.saved import Run

Function = Callable[[Any, Any], jax.Array]
Row = dict[str, np.ndarray]
"""A record as a model takes it."""


@dataclass(frozen=True)
class Classes:
    """A classifier: its function, and how records become what it takes."""

    names: list[str]
    several: bool
    """Whether a record may be of several classes."""
    kind: given.Kind
    """What it reads."""
    shape: tuple[int, ...]
    """The shape of one example; that of a text is ()."""
    read: Callable[[Any], Any]
    """Turns a record into a row of each input."""
    shares: Function
    """The probabilities of classes, (B, classes), by parameters and a batch."""
    params: Any
    run: Run | None = None
    """What it is of; None: an artefact."""

    @staticmethod
    def of_run(run: Run) -> Classes:
        """That of a run, as `jaxmodels predict` has it."""
        kind = prepare.kind_of(run)
        shape = () if kind == "text" else prepare.shape_of(run)
        several = run.config.task.answers == "classes"
        params = run.params["model"]
        return Classes(class_names(run), several, kind, shape, prepare.reader(run), class_shares(run), params, run)

    @staticmethod
    def of_artefact(folder: Path) -> Classes:
        """That in a folder that `jaxmodels export --format stablehlo` has written, whose probe is computed again.

        Raises:
            UserError: it is damaged, for another version of jax, or no classifier of texts, images or arrays.
        """
        try:
            manifest = artefact_run.manifest_of(folder)
            _check(folder, manifest)
            model = artefact_run.load(folder)
        except artefact_run.Refused as refused:
            raise UserError(str(refused)) from None
        kind, shape, read = _read(folder, manifest)
        names, several = distinct(manifest["classes"]), manifest["answers"] == "classes"
        params = {path: model.weights[path] for path in manifest["functions"]["classify"]["weights"]}
        return Classes(names, several, kind, shape, read, _shares(model), params)


def _check(folder: Path, manifest: dict[str, Any]) -> None:
    """Refuse an artefact that is no classifier, by what it is."""
    if "classify" not in manifest["functions"]:
        raise UserError(
            f"got {folder}, an artefact of a {manifest['model']} that has {', '.join(manifest['functions'])}, "
            f"expected one that classifies, try its run, or python {folder / 'run.py'}"
        )
    if "sounds" in manifest:
        raise UserError(f"got {folder}, an artefact that classifies sounds, expected one of texts, images or arrays")


def _read(folder: Path, manifest: dict[str, Any]) -> tuple[given.Kind, tuple[int, ...], Callable[[Any], Any]]:
    """What an artefact reads, the shape of an example, and how a record becomes one."""
    shape = tuple(manifest["functions"]["classify"]["inputs"]["inputs"]["shape"][1:])
    if "text" in manifest:
        return "text", (), prepare.whole_text(data.load_tokenizer(folder), manifest["text"]["length"])
    if (images := manifest.get("images")) is not None:
        return "image", shape, prepare.image(shape, images["resize"], images["crop"] is not None)
    return "array", shape, prepare.array(shape)


def _shares(model: Artefact) -> Function:
    return lambda params, batch: model.calls["classify"](params, batch)["probabilities"]
