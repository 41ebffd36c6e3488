"""`jaxmodels export RUN DIR`: a run for transformers or PEFT, or as functions."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from jaxmodels import config as configs
from jaxmodels import hf
from jaxmodels.commands.progress import progress
from jaxmodels.errors import UserError


def export_run(
    run: Path,
    directory: Path,
    /,
    format: Literal["huggingface", "compressed-tensors", "peft", "stablehlo"] = "huggingface",
    best: bool = False,
    shard_size: str | None = None,
) -> None:
    """Write a run's weights in Hugging Face's format, with config.json and the tokenizer; or an artefact, which jax and
    numpy run without this package.

    Args:
        run: run directory.
        directory: the folder to create.
        format: huggingface, codes as numbers and an adapter merged; compressed-tensors, codes as they are; peft, the
            adapter alone; or stablehlo: weights, functions for CPU, CUDA and TPU, tokenizer, classes, and a run.py that
            runs them.
        best: the best checkpoint instead of the newest.
        shard_size: size of the largest weight file in Hugging Face's format; default 5GB.
    """
    if format in ("huggingface", "compressed-tensors"):
        _huggingface(run, directory, best, size(shard_size or "5GB"), codes=format != "huggingface")
    elif shard_size is not None:
        raise UserError(f"got --shard-size {shard_size} with --format {format}, which has one file, try without it")
    elif format == "peft":
        _adapter(run, directory, best)
    else:
        _artefact(run, directory, best)


def _huggingface(run: Path, directory: Path, best: bool, limit: int, codes: bool) -> None:
    from jaxmodels.hf import beside, save
    from jaxmodels.models.families import create
    from jaxmodels.train import saved

    cfg, _ = configs.read(run)
    if codes and (cfg.compress is None or cfg.adapter is not None):
        raise UserError(
            f"got {run}, {'an adapted run, which is merged into numbers' if cfg.adapter else 'a run without codes'}, "
            "expected one with a section compress and no adapter, try --format huggingface"
        )
    model = create(cfg.model)
    form = hf.format_for(cfg.model)
    form.describe(cfg.model)  # before anything is read
    with save.complete(directory) as part:
        kept = saved.read_kept(run)
        more = beside.back(run, part, cfg, kept.classes if kept.train else ())
        opened = saved.read_run(run, best=best)
        with progress("writing", 4 * model.count()) as done:
            opened = opened if codes else opened.numbers()
            params, stats = opened.params["model"], opened.stats.get("model", {})
            save.save_pretrained(part, model, params, stats, shard_size=limit, more=more, done=done, codes=codes)
    print(f"{directory}: step {opened.step} of {run}, {model.count():,} parameters")


def _artefact(run: Path, directory: Path, best: bool) -> None:
    from jaxmodels.hf import save
    from jaxmodels.serve import artefact
    from jaxmodels.train import saved

    with save.complete(directory) as part:
        manifest = artefact.write(saved.read_run(run, best=best), part)
    names = ", ".join(manifest["functions"])
    print(f"{directory}: step {manifest['step']} of {run}, {manifest['parameters']:,} parameters, functions {names}")


def _adapter(run: Path, directory: Path, best: bool) -> None:
    """Write a run's adapter in PEFT's format.

    Raises:
        UserError: the run has none, or one that PEFT's format cannot hold.
    """
    import jax

    from jaxmodels import tasks
    from jaxmodels.hf import peft_save, save
    from jaxmodels.models.adapted import Factors
    from jaxmodels.models.coded import Coded
    from jaxmodels.train import bases, state

    cfg, _ = configs.read(run)
    if cfg.adapter is None:
        raise UserError(f"got {run}, a run without an adapter, expected one with it, try --format huggingface")
    task = tasks.build(cfg.task, cfg.model, cfg.data, cfg.train, cfg.eval.metrics)
    adapter = state.adapted(cfg, task)
    assert adapter is not None
    paths = {name.partition("/")[2]: chosen for name, chosen in adapter.chosen.items()}
    chosen, full = ([path for path, each in paths.items() if bool(each.rank) is factors] for factors in (True, False))
    modules = peft_save.check(cfg.model, chosen, full)
    kind = "params" if cfg.train.ema is None else "ema"
    frozen, trained, meta, at = bases.restore(run, cfg, adapter, "best" if best else None, kind)
    leaves, base = (
        {
            jax.tree_util.keystr(path, simple=True, separator="/"): jax.device_get(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(
                tree, is_leaf=lambda x: isinstance(x, Factors | Coded)
            )
        }
        for tree in (trained["model"], frozen["model"])
    )
    named = bases.Base.read(meta, run)
    with save.complete(directory) as part:
        name = named.source or str((run / bases.OWN).absolute())
        peft_save.write(part, modules, cfg.adapter, leaves, base, (name, named.hash), cfg.task.answers)
    print(f"{directory}: step {at} of {run}, an adapter of {named.source or run} (hash {named.hash[:12]})")


def size(text: str) -> int:
    """Parse a size such as 5GB or 500MB into bytes.

    Raises:
        UserError: it is not a size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)B?", text.strip(), re.IGNORECASE)
    count = int(float(found[1]) * 1000 ** " KMG".index(found[2].upper() or " ")) if found else 0
    if count < 1:
        raise UserError(f"got --shard-size {text!r}, expected a size in bytes, try 5GB")
    return count
