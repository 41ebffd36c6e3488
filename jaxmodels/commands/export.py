"""`jaxmodels export RUN DIR`: a run's weights in Hugging Face's format."""

from __future__ import annotations

import re
from pathlib import Path

from jaxmodels import config as configs
from jaxmodels import hf
from jaxmodels.commands.progress import progress
from jaxmodels.errors import UserError


def export_run(run: Path, directory: Path, /, best: bool = False, shard_size: str = "5GB") -> None:
    """Write a run's weights in Hugging Face's format, with config.json and the tokenizer.

    Args:
        run: run directory.
        directory: the folder to create.
        best: the best checkpoint instead of the newest.
        shard_size: size of the largest weight file, such as 500MB.
    """

    from jaxmodels.hf import beside, save
    from jaxmodels.models.families import create, family_of
    from jaxmodels.train import saved

    limit = size(shard_size)
    cfg, _ = configs.read(run)
    model = create(cfg.model)
    form = hf.format_of(family_of(cfg.model).name)
    form.describe(cfg.model)  # before anything is read
    with save.complete(directory) as part:
        kept = saved.read_kept(run)
        more = beside.back(run, part, cfg, kept.classes if kept.train else ())
        opened = saved.read_run(run, best=best)
        with progress("writing", 4 * model.count()) as done:
            params, stats = opened.params["model"], opened.stats.get("model", {})
            save.save_pretrained(part, model, params, stats, shard_size=limit, more=more, done=done)
    print(f"{directory}: step {opened.step} of {run}, {model.count():,} parameters")


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
