"""`jaxmodels export RUN DIR`: a run's weights in Hugging Face's format."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from jaxmodels import config as configs
from jaxmodels import hf
from jaxmodels.commands.progress import progress
from jaxmodels.errors import UserError


def export_run(run: Path, directory: Path, /, best: bool = False, shard_size: str = "5GB") -> None:
    """Weights of a run in Hugging Face's format, with config.json and the tokenizer.

    Args:
        run: run directory.
        directory: the folder to make.
        best: the best checkpoint instead of the newest.
        shard_size: largest file of weights, such as 500MB.
    """
    import jax

    from jaxmodels.hf import beside, save
    from jaxmodels.models.functional import create, family_of
    from jaxmodels.train.checkpoint import Checkpointer

    limit = size(shard_size)
    cfg, _ = configs.read(run)
    model = create(cfg.model)
    form = hf.format_of(family_of(cfg.model).name)
    form.describe(cfg.model)  # before anything is read
    with save.complete(directory) as part:
        more = beside.back(run, part, cfg)
        checkpointer = Checkpointer(run / "checkpoints")
        kind = "params" if cfg.train.ema is None else "ema"
        params, _, at = checkpointer.restore_params("best" if best else None, subtree=kind)
        stats: Any = {}
        if jax.tree.leaves(jax.eval_shape(model.stats)):
            stats, _, _ = checkpointer.restore_params(at, subtree="stats")
        with progress("writing", 4 * model.count()) as done:
            save.save_pretrained(
                part, model, params["model"], stats.get("model", {}), shard_size=limit, more=more, done=done
            )
    print(f"{directory}: step {at} of {run}, {model.count():,} parameters")


def size(text: str) -> int:
    """Bytes of a size such as 5GB or 500MB.

    Raises:
        UserError: it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)B?", text.strip(), re.IGNORECASE)
    count = int(float(found[1]) * 1000 ** " KMG".index(found[2].upper() or " ")) if found else 0
    if count < 1:
        raise UserError(f"got --shard-size {text!r}, expected a size in bytes, try 5GB")
    return count
