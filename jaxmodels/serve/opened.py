"""What is served: a run, a directory of transformers, or an artefact, with what stands beside its weights."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodels import config as configs
from jaxmodels import data
from jaxmodels.data import special
from jaxmodels.errors import UserError
from jaxmodels.generate import asked
from jaxmodels.hf import load, sentences
from jaxmodels.hf.beside import KEPT
from jaxmodels.hf.sentences import Sentences
from jaxmodels.models.bert import BERTConfig
from jaxmodels.models.model import Model
from jaxmodels.serve.classes import Classes
from jaxmodels.serve.errors import Refused
from jaxmodels.tasks.task import tasks_that_answer
from jaxmodels.train.saved import Run, imported, load_run

log = logging.getLogger("jaxmodels")


@dataclass(frozen=True)
class Writer:
    """A language model beside its tokenizer."""

    model: Model
    params: Any
    tokenizer: data.Tokenizer
    penalty: float = 1.0
    """The repetition penalty that the model's files ask for."""
    template: Any = None
    """The chat template, compiled; None: the model has none."""
    marks: Any = None
    """Its special tokens as text, by their names in the template."""

    def encode(self, text: str) -> list[int]:
        """The tokens of a prompt, as `jaxmodels sample` begins a text.

        Raises:
            Refused: the tokenizer cannot read it.
        """
        return [*self.tokenizer.before, *self._ids(text)]

    def chat(self, messages: list[dict[str, Any]]) -> list[int]:
        """The tokens of a conversation, up to where the answer begins.

        Raises:
            Refused: the model has no chat template, or that refuses the messages.
        """
        if self.template is None:
            raise Refused(400, "got a chat for a model without a chat template, expected one with, try /v1/completions")
        from jinja2 import TemplateError

        try:
            text = self.template.render(messages=messages, add_generation_prompt=True, **self.marks)
        except (TemplateError, TypeError, ValueError, KeyError, RecursionError) as error:
            raise Refused(400, f"got messages that the model's chat template refuses ({error})") from None
        return self._ids(text)

    def _ids(self, text: str) -> list[int]:
        try:
            return np.asarray(self.tokenizer.encode(text)).tolist()
        except UserError as error:
            raise Refused.of(error) from None


@dataclass(frozen=True)
class Encoder:
    """An encoder of texts beside its tokenizer, and how one vector is made of a text."""

    model: Model
    params: Any
    tokenizer: data.Tokenizer
    sentences: Sentences
    length: int
    """The most tokens of a text."""

    @staticmethod
    def of(model: Model, params: Any, tokenizer: data.Tokenizer, how: Sentences, longest: int) -> Encoder:
        """Texts are as long as the model takes, and the files beside it say."""
        return Encoder(model, params, tokenizer, how, min(longest, how.length or longest))

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of whole texts, with the special ones around them.

        Raises:
            UserError: the tokenizer cannot read one.
        """
        how = self.sentences
        whole = [how.prefix + text for text in texts]
        ids = self.tokenizer.encode_many([text.lower() for text in whole] if how.lower else whole, special=True)
        return [np.asarray(each).tolist() for each in ids]


@dataclass(frozen=True)
class Opened:
    """A model to serve, under a name, of one of three kinds."""

    name: str
    writer: Writer | None = None
    classes: Classes | None = None
    encoder: Encoder | None = None


def embeds(config: Any) -> bool:
    """Whether a model's features are served: it reads texts, and its head is for no other use."""
    return isinstance(config, BERTConfig) and config.head in ("masked_lm", "pretraining", "none")


def open_model(directory: Path, name: str = "", best: bool = False) -> Opened:
    """Open a run, a language model or an encoder in Hugging Face's format, or an artefact that classifies.

    Raises:
        UserError: there is none, or it is of a kind that is not served.
    """
    name = name or directory.resolve().name
    if (directory / "checkpoints").is_dir():
        cfg, _ = configs.read(directory)
        if embeds(cfg.model):
            return Opened(name, encoder=_encoder_of(load_run(directory, best=best)))
        if cfg.task.answers not in ("continuation", "class", "classes"):
            raise UserError(
                f"got a run of task {cfg.task.kind}, expected {tasks_that_answer('continuation', 'class', 'classes')}, "
                f"try jaxmodels predict {directory} FILE"
            )
        run = load_run(directory, best=best)
        run.task  # noqa: B018  an imported model may have none
        if cfg.task.answers != "continuation":
            return Opened(name, classes=Classes.of_run(run))
        if run.tokenizer is None:
            raise UserError(f"got {directory} without a tokenizer, expected a run that was trained on texts")
        penalty = asked.repetition_penalty(directory)
        writer = Writer(run.model, run.params["model"], run.tokenizer, penalty, *chat_template(directory / KEPT))
        return Opened(name, writer)
    if (directory / "manifest.json").is_file():
        return Opened(name, classes=Classes.of_artefact(directory))
    if not (directory / "config.json").is_file():
        raise UserError(
            f"got {directory}, expected a run directory or one with config.json and model.safetensors, or an artefact, "
            "try runs/NAME"
        )
    form, config = load.described(directory)
    if form.task(config) != "causal_lm" and not embeds(config):
        raise UserError(
            f"got {directory} with a {type(config).__name__}, expected a language model or an encoder of texts, "
            f"try jaxmodels import {directory} --out runs/{name}"
        )
    tokenizer = data.load_tokenizer(directory)
    how = sentences.read(directory) if embeds(config) else None
    model, params = load.load_pretrained(directory, None, {}, codes=True)
    if how is not None:
        return Opened(name, encoder=Encoder.of(model, params, tokenizer, how, config.context))
    return Opened(name, Writer(model, params, tokenizer, 1.0, *chat_template(directory)))


def _encoder_of(run: Run) -> Encoder:
    """The encoder of a run, for texts as long as it was trained on."""
    if run.tokenizer is None:
        raise UserError(f"got {run.directory} without a tokenizer, expected a run that was trained on texts")
    cfg, how = run.config, sentences.read(run.directory / KEPT)
    trained = run.model.longest if imported(run.directory, run.kept) else cfg.data.seq_len
    return Encoder.of(run.model, run.params["model"], run.tokenizer, how, min(cfg.model.context, trained))


def open_models(given: Sequence[str], name: str = "", best: bool = False) -> list[Opened]:
    """Open models by NAME=DIR or DIR, whose name is then that of the directory; `name` is for a single one.

    Raises:
        UserError: one cannot be served, or two have one name.
    """
    if name and len(given) > 1:
        raise UserError(f"got --name {name} for {len(given)} models, expected one model, try {name}={given[0]}")
    found: dict[str, Opened] = {}
    for each in given:
        own, _, place = ("", "", each) if Path(each).exists() else each.partition("=")
        if not place or "/" in own:  # of a path that has no such directory, the name is no part
            own, place = "", each
        own = own or name or Path(place).resolve().name
        if own in found:
            raise UserError(f"got two models of the name {own}, expected names of their own, try other={place}")
        found[own] = open_model(Path(place), own, best)
    return list(found.values())


def open_adapters(given: Sequence[str], taken: Collection[str], best: bool = False) -> list[Opened]:
    """Open runs with an adapter, each merged into its base, by the names in NAME=DIR.

    Raises:
        UserError: one is not of this form, has a name that is `taken`, or is no run with an adapter.
    """
    found: dict[str, Opened] = {}
    for each in given:
        name, _, place = each.partition("=")
        if not name or not place:
            raise UserError(f"got --adapter {each}, expected NAME=DIR, try --adapter mine={each or 'runs/mine'}")
        if name in taken or name in found:
            raise UserError(f"got --adapter {each}, whose name another model has, expected one of its own")
        if (Path(place) / "checkpoints").is_dir() and configs.read(Path(place))[0].adapter is not None:
            found[name] = open_model(Path(place), name, best)
        else:
            raise UserError(
                f"got --adapter {each}, which is no run with an adapter, expected one that was trained with --adapter, "
                f"try jaxmodels serve {place}"
            )
    return list(found.values())


def chat_template(directory: Path) -> tuple[Any, dict[str, Any]]:
    """The chat template in a directory of transformers, and the special tokens that it may name; None if it has none.

    Raises:
        UserError: a file is damaged, or the template is none.
    """
    settings = special.objects(directory / "tokenizer_config.json") if _has(directory, "tokenizer_config.json") else {}
    source = settings.get("chat_template")
    if isinstance(source, list):  # several by name
        named = {each.get("name"): each.get("template") for each in source if isinstance(each, dict)}
        source = named.get("default")
    if _has(directory, "chat_template.jinja"):
        source = (directory / "chat_template.jinja").read_text(encoding="utf-8")
    if not isinstance(source, str):
        return None, {}
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    marks = {name: text for name in names if (text := special.text_of(directory, name)) is not None}
    return _compiled(source, directory), marks


def _has(directory: Path, name: str) -> bool:
    return (directory / name).is_file()


def _compiled(source: str, directory: Path) -> Any:
    """Compile a template as transformers does: in a sandbox, with the functions that templates there call."""
    import json
    from datetime import datetime

    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    made.filters["tojson"] = tojson
    made.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    try:
        return made.from_string(source)
    except TemplateError as error:
        raise UserError(f"got a chat template in {directory} that is none ({error}), expected one of Jinja") from None


def finite(value: float) -> float:
    """A log-probability as JSON can say it."""
    return value if math.isfinite(value) else -9999.0
