"""`jaxmodels tune CONFIG.py --space ...`: search for good values of fields."""

from __future__ import annotations

from dataclasses import replace

from jaxmodels.commands.options import Configured
from jaxmodels.train.space import TuneOptions


def tune(given: Configured, options: TuneOptions) -> None:
    """Search, then print the best trials, draw a picture, and show how to run the best one again."""
    from jaxmodels.parallel import progress
    from jaxmodels.report import search as pictures
    from jaxmodels.train import tune as searching
    from jaxmodels.train.run import compilation_cache

    progress.begin()
    compilation_cache()
    cfg, file, argv = given.config, given.file, [given.file, *given.overrides]
    cfg = replace(cfg, metrics=replace(cfg.metrics, progress="none", loggers=()))
    out = searching.search(cfg, options, file, argv)
    trials = searching.read_trials(cfg, options, out)
    choices = searching.parse_space(options.space, cfg)
    print("\n" + searching.ranking(cfg, options, trials))
    ended = [trial for trial in trials if trial["value"] is not None and not trial["pruned"]]
    if ended:
        best = (min if cfg.eval.lowest else max)(ended, key=lambda trial: trial["value"])
        chosen = {choice.field: best[choice.field] for choice in choices}
        print(f"\nthe best one again:\n  {searching.train_command(file, argv, chosen)}")
    pictures.draw(out / "tune.png", cfg.eval.metric, cfg.eval.lowest, [(c.field, c.log) for c in choices], trials)
    print(
        f"\n{len(trials)} trials in {out}/: study.db, trials/, tune.png; the same command with more --trials continues"
    )
