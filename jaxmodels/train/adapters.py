"""Adapters from elsewhere: the section that a source describes, its factors, and several of them on one base."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jaxmodels import config as configs
from jaxmodels.compress.adapters import AdapterConfig, adaptation
from jaxmodels.compress.coding import CompressConfig, coding
from jaxmodels.config import Config
from jaxmodels.errors import UserError, nearest
from jaxmodels.hf import peft_load
from jaxmodels.hf.peft import CONFIG, is_peft
from jaxmodels.models.adapted import join, merge
from jaxmodels.models.coded import plain
from jaxmodels.models.families import create
from jaxmodels.models.model import Model
from jaxmodels.train import bases
from jaxmodels.train.arrays import named_leaves, named_parameters
from jaxmodels.train.saved import load_run
from jaxmodels.train.state import State, coded


def resolved(cfg: Config) -> Config:
    """Return a config whose adapter has the targets, ranks and alphas of its source, which need not be given again.

    Raises:
        UserError: what is given differs from the source, or that is no adapter.
    """
    section = cfg.adapter
    if section is None or section.source is None:
        return cfg
    theirs = dataclasses.replace(described(Path(section.source), cfg), source=section.source)
    if section not in (theirs, type(section)(source=section.source)) and (wrong := differs(cfg, section, theirs)):
        raise UserError(
            f"got an adapter that differs from adapter.source {section.source} in {wrong}, expected what that has, "
            f"try --adapter {configs.kind_name(theirs)} --adapter.source {section.source} alone"
        )
    if configs.kind_name(theirs) != configs.kind_name(section):
        raise UserError(
            f"got adapter {configs.kind_name(section)} with adapter.source {section.source}, expected "
            f"{configs.kind_name(theirs)}, which that is, try --adapter {configs.kind_name(theirs)}"
        )
    return dataclasses.replace(cfg, adapter=theirs)


def differs(cfg: Config, section: AdapterConfig, theirs: AdapterConfig) -> str:
    """Name a parameter that two sections treat differently; empty if none, however their patterns are written."""
    networks = {"model": create(cfg.model)}
    mine, others = (adaptation(each, networks, ["model"]).chosen for each in (section, theirs))
    for name in {**mine, **others}:
        if (a := mine.get(name)) != (b := others.get(name)):
            texts = ("not adapted" if x is None else f"of rank {x.rank}, scale {x.scale:g}" for x in (a, b))
            return f"{name.partition('/')[2]} ({' here, there '.join(texts)})"
    return ""


def described(source: Path, cfg: Config) -> AdapterConfig:
    """Return the section of an adapter in a run or in PEFT's format."""
    if is_peft(source):
        found = peft_load.read(source, cfg.model)
        if not found.base and cfg.init.source is None:
            raise UserError(
                f"got adapter.source {source} without init.source, expected the weights that it was trained beside, "
                "try --init.source DIR"
            )
        return found.section
    if not (source / "config.json").is_file():
        raise UserError(
            f"got adapter.source {source}, expected an adapted run, or an adapter in PEFT's format with {CONFIG}"
        )
    theirs = configs.read(source)[0].adapter
    if theirs is None:
        raise UserError(
            f"got adapter.source {source}, a run without an adapter, expected one with it, try --init.source {source}"
        )
    return theirs


def begun(cfg: Config, state: State, layout: State) -> State:
    """Return the first state with the factors of `adapter.source`, and with the batch statistics of that run.

    Raises:
        UserError: they were trained beside another base.
    """
    assert cfg.adapter is not None and cfg.adapter.source is not None
    source, stats = Path(cfg.adapter.source), state.stats
    found = trained(source, cfg, layout.params, state.frozen)
    ema = None if state.ema is None else jax.tree.map(lambda x: x.copy(), found)
    if jax.tree.leaves(stats) and not is_peft(source):
        stats, _, _ = bases.Checkpointer(source / "checkpoints").restore_params(subtree="stats", abstract=layout.stats)
    return dataclasses.replace(state, params=found, ema=ema, stats=stats)


def trained(source: Path, cfg: Config, layout: Any, frozen: Any) -> Any:
    """Read trained parameters with the shapes and shardings of `layout`, which belong to these frozen ones.

    Raises:
        UserError: they were trained beside another base, or have other shapes.
    """
    base = bases.fingerprint(frozen)
    if is_peft(source):
        found, here = peft_load.read(source, cfg.model), named_leaves(frozen)
        for path, copy in found.copies.items():
            if (name := f"model/{path}") in here and not bool((here[name] == copy).all()):
                raise UserError(
                    f"got {source} with another {path} than {cfg.init.source}, expected the base that it was trained "
                    "beside, try that one"
                )
        if found.base:
            bases.check(
                bases.Base(found.base and _name(source), found.base), base, Path(cfg.init.source or "?"), source
            )
        kept = named_leaves(layout)
        placed = bases.fitted(source, named_leaves({"model": found.leaves}), kept)
        return jax.tree.unflatten(jax.tree.structure(layout), [placed[name] for name in kept])
    theirs, _ = configs.read(source)
    kind = "params" if theirs.train.ema is None else "ema"
    found, meta, _ = bases.Checkpointer(source / "checkpoints").restore_params(subtree=kind, abstract=layout)
    bases.check(bases.Base.read(meta, source), base, Path(cfg.init.source or "?"), source)
    return found


def _name(source: Path) -> str:
    return str(peft_load.special.objects(source / CONFIG).get("base_model_name_or_path") or "")


@dataclasses.dataclass(frozen=True)
class Adapters:
    """Several adapters of one base, whose arrays all of them share."""

    model: Model
    base: dict[str, Any]
    """The parameters that are adapted, as the model takes them without an adapter."""
    trained: Mapping[str, Any]
    """Factors, and parameters trained themselves, by the name of the adapter."""

    def params(self, name: str | None = None) -> Any:
        """Return the parameters with an adapter, or without one: `model.apply(adapters.params("sst2"), tokens)`.

        Raises:
            UserError: there is no adapter of that name.
        """
        if name is None:
            return self.base
        if name not in self.trained:
            raise UserError(
                f"got adapter {name!r}, expected one of {', '.join(self.trained)}{nearest(name, self.trained)}"
            )
        return join(self.base, self.trained[name])

    def merged(self, name: str) -> Any:
        """Return parameters of the ordinary kind that compute what those with the adapter do."""
        return plain(merge(self.params(name), self.model.axes()))


def load_adapters(base: str | Path, adapters: Mapping[str, str | Path]) -> Adapters:
    """Load several adapters, adapted runs or PEFT's directories, on one base, a run or a published model.

    Raises:
        UserError: an adapter does not fit, or was trained beside another base.
    """
    base = Path(base)
    if bases.is_published(base):
        from jaxmodels.hf import load_pretrained

        model, params = load_pretrained(base)
    else:
        run = load_run(base)
        model, params = run.model, run.params["model"]
    compress = _compressed(adapters)
    held = coding(compress, {"model": model})
    shapes = {"model": model.shapes()} if held is None else held.shapes()
    here = bases.fitted(base, named_parameters({"model": params}), named_parameters(shapes))
    found: dict[str, Any] = {}
    for name, directory in adapters.items():
        cfg = Config(model=model.config, init=configs.Init(source=str(base)), compress=compress)
        section = described(Path(directory), cfg)
        adapter = adaptation(section, {"model": model}, ["model"])
        adapter = dataclasses.replace(adapter, coding=coded(cfg, {"model": model}, adapter))
        frozen, layout = adapter.shapes()
        own = bases.with_parameters(frozen, {each: here[each] for each in named_parameters(frozen)})
        found[name] = trained(Path(directory), cfg, layout, own)["model"]
    return Adapters(model, bases.with_parameters(shapes, here)["model"], jax.device_put(found))


def _compressed(adapters: Mapping[str, str | Path]) -> CompressConfig | None:
    """Return how all of these adapters' bases are coded.

    Raises:
        UserError: they differ, so that the adapters cannot share one.
    """
    found = {
        name: None if is_peft(Path(directory)) else configs.read(directory)[0].compress
        for name, directory in adapters.items()
    }
    first = next(iter(found.items()), ("", None))
    for name, section in found.items():
        if section != first[1]:
            raise UserError(
                f"got adapters {first[0]} and {name}, whose bases are not coded in the same way, expected one base of "
                "all of them, try each alone"
            )
    return first[1]
