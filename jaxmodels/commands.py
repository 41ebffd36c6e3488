"""What each command does, once its arguments are read."""

from __future__ import annotations

import contextlib
import itertools
import shlex
from collections.abc import Sequence
from dataclasses import replace
from json import dumps
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np

from jaxmodels import config as configs
from jaxmodels import data, hf
from jaxmodels.config import Config
from jaxmodels.errors import UserError, nearest, printable
from jaxmodels.fields import Beams, Count, Dim, Range, Seed
from jaxmodels.models.functional import create, list_models
from jaxmodels.options import OWN_DATA, EvalData, RunOptions, TuneOptions
from jaxmodels.parallel import distributed

SAVED = 75
"""Exit code of a run that was told to stop and has saved."""


def train(cfg: Config, where: RunOptions, file: str, overrides: list[str]) -> int:
    """Train; returns the exit code."""
    distributed.initialize()
    from jaxmodels.train import run as runs

    runs.compilation_cache()
    run = Path(where.run_dir or f"runs/{Path(file).stem}")
    experiment, result = runs.train(cfg, run, where.resume, {"file": file, "overrides": overrides})
    if distributed.is_main():
        if result.ended == "preempted":
            print(printable(f"stopped and saved at step {result.step} in {run}; the same command goes on from there"))
        else:
            farewell(experiment, result, run, [file, *overrides])
    return SAVED if result.ended == "preempted" else 0


def farewell(experiment: Any, result: Any, run: Path, argv: Sequence[str]) -> None:
    """What came out, where it lies, and what to do next."""
    from jaxmodels.report import curves
    from jaxmodels.train.directory import LOCK
    from jaxmodels.train.metrics import main
    from jaxmodels.train.run import averaged
    from jaxmodels.train.tune import again

    train_data, eval_data, tokenizer = experiment.train_data, experiment.eval_data, experiment.train_data.tokenizer
    found = result.metrics or curves.last(run)
    print(
        f"\n{'stopped early' if result.ended == 'early' else 'done'} at step {result.step}: "
        + ", ".join(f"{name} {value:.4f}" for name, value in main(found).items())
    )
    baseline = {}
    if isinstance(train_data, data.Windows) and isinstance(eval_data, data.Windows):
        baseline["unigram model"] = data.unigram_loss(train_data, eval_data)
        print(f"a unigram model of the same text has a loss of {baseline['unigram model']:.4f} nats a token")
    curves.draw(run, run / "curves.png", baseline)
    name = f"./{run}" if str(run).startswith("-") else str(run)
    more = ["jaxmodels", "eval", name]
    if experiment.cfg.task.name == "causal_lm" and tokenizer is not None and jax.process_count() == 1:
        params, model = averaged(result.state)["model"], experiment.task.networks["model"]
        prompt = opening(tokenizer, "def " if experiment.cfg.data.source == "stdlib" else "\n")
        taken = len(tokenizer.before) + len(tokenizer.encode(prompt))
        room = 400 if model.longest is None else min(400, model.longest - taken)
        if room > 0:
            text = continued(model, params, tokenizer, prompt, room, temperature=0.6, seed=1)
            print("\na sample:\n" + "\n".join("  | " + printable(line) for line in text.splitlines()))
            more = ["jaxmodels", "sample", name, "--temperature", "0.5"]
    chosen = {"run_dir": f"{name}-2", "optim.peak_lr": f"{experiment.cfg.optim.peak_lr / 2:g}"}
    commands = [
        shlex.join(more),
        shlex.join(["jaxmodels", "report", name]),
        again(argv[0], argv, chosen),
        shlex.join(["jaxmodels", "config", "explain", name, "optim.peak_lr"]),
    ]
    files = ", ".join(sorted(path.name for path in run.iterdir() if path.name != LOCK))
    print(printable("\n".join([f"\neverything is in {run}/: {files}", "try next:", *(f"  {c}" for c in commands)])))


def opening(tokenizer: data.Tokenizer, *wanted: str) -> str:
    """The first of these prompts that the tokenizer has tokens for, else another one: a text begins with a token."""
    others = (tokenizer.decode([token]) for token in range(tokenizer.vocab_size))
    for text in itertools.chain(wanted, ("\n", " ", "a", "A", "0"), others):
        with contextlib.suppress(UserError):
            if len(tokenizer.before) + len(tokenizer.encode(text)):
                return text
    return ""


def continued(model: Any, params: Any, tokenizer: data.Tokenizer, prompt: str, tokens: int, **how: Any) -> str:
    """A prompt and its continuation as text, up to where it ends."""
    from jaxmodels.generate import sample as draw

    ids, ends = np.append(np.array(tokenizer.before, np.int32), tokenizer.encode(prompt)), tokenizer.special.ends
    if len(ids) and ids.max() >= model.config.vocab_size:
        raise UserError(
            f"got a prompt with token {ids.max()}, expected those of the model, which has {model.config.vocab_size}, "
            "try the tokenizer that it was trained with"
        )
    row = draw(model, params, ids, tokens, ends=ends, **how)[0]
    stops = np.flatnonzero(np.isin(row[len(ids) :], ends))
    return tokenizer.decode(row[len(tokenizer.before) : len(ids) + stops[0] if len(stops) else None])


def tune(cfg: Config, options: TuneOptions, file: str, argv: Sequence[str]) -> None:
    """Search, then the best trials, a picture, and how to run the best one again."""
    from jaxmodels.report import search as pictures
    from jaxmodels.train import tune as searching
    from jaxmodels.train.run import compilation_cache

    compilation_cache()
    cfg = replace(cfg, metrics=replace(cfg.metrics, progress="none", tensorboard=False))
    out = searching.search(cfg, options, file, argv)
    trials = searching.tried(cfg, options, out)
    choices = [searching.parse(text, cfg) for text in options.space]
    print("\n" + searching.table(cfg, options, trials))
    ended = [trial for trial in trials if trial["value"] is not None and not trial["pruned"]]
    if ended:
        best = (min if cfg.eval.mode == "min" else max)(ended, key=lambda trial: trial["value"])
        chosen = {choice.field: best[choice.field] for choice in choices}
        print(f"\nthe best one again:\n  {searching.again(file, argv, chosen)}")
    pictures.draw(out / "tune.png", cfg.eval.metric, cfg.eval.mode, [(c.field, c.log) for c in choices], trials)
    print(f"\n{len(trials)} trials in {out}/: study.db, trials/, tune.png; the same command with more --trials goes on")


def evaluate(
    run: str,
    /,
    split: str | None = None,
    best: bool = False,
    json: Path | None = None,
    data_dir: str | None = None,
    classifier: Path | None = None,
    beams: Beams | None = None,
    data: EvalData = OWN_DATA,
) -> None:
    """Metrics of a run on held-out data, its own or others; of a translator BLEU too.

    Args:
        run: run directory.
        split: another split of a set than the run's own (tfds, huggingface).
        best: the best checkpoint instead of the newest.
        json: write the metrics to this file too.
        data_dir: another TFDS data directory than the run's own.
        classifier: a run of a classifier that judges 1,000 images which a generative model makes.
        beams: width of the search for translations, 4 when not given; 1: the likeliest token each time.
        data: what it is evaluated on, where not on the run's own data.
    """
    from jaxmodels.train import judge, saved
    from jaxmodels.train import run as runs

    runs.compilation_cache()
    if json is not None and not json.absolute().parent.is_dir():  # before any work
        raise UserError(f"got --json {json}, whose folder does not exist, expected one that does, try {json.name}")
    given = data.given() | {
        name: value for name, value in (("eval_split", split), ("dir", data_dir)) if value is not None
    }
    opened = saved.open_run(run, best=best, given=given)
    translates = opened.config.task.name == "seq2seq" and opened.config.data.source != "synthetic"
    if beams is not None and not translates:
        raise UserError(f"got --beams {beams} for a run of task {opened.config.task.name}, try it without")
    judged = judge.judged(opened, classifier) if classifier is not None else {}
    found = opened.measure()
    if translates:
        found |= judge.translated(opened, 4 if beams is None else beams)
    found |= judged
    print(printable(f"{run}, step {opened.step}, on {opened.source.describe()}\n{table(found)}"))
    if json is not None:
        facts = {"run": run, "step": opened.step, "data": opened.source.describe()}
        json.write_text(dumps({**facts, **found}, indent=2) + "\n")


def table(found: dict[str, float]) -> str:
    """Metrics as text: single ones in a column, those of classes and groups as rows of a table."""
    lines = [f"  {name:18s} {value:.6g}" for name, value in found.items() if "/" not in name]
    nested = [name for name in found if "/" in name]
    for kind in dict.fromkeys("group" if name.startswith("group/") else "class" for name in nested):
        cells: dict[str, dict[str, float]] = {}
        for name in nested:
            if name.startswith("group/") != (kind == "group"):
                continue
            first, second = name.split("/", 1)
            if kind == "group":
                first, second = second.split("/", 1)
                if "/" in second:  # classes within a group: in the file
                    continue
            row, column = (first, second) if kind == "group" else (second, first)
            if column == "gap" or first == "gap":
                row, column = (f"gap in {second}", "difference")
                if "/" in second:
                    continue
            cells.setdefault(row, {})[column] = found[name]
        columns = list(dict.fromkeys(column for row in cells.values() for column in row))
        width = max(map(len, [kind, *cells]))
        lines.append("\n  " + "  ".join([f"{kind:{width}s}", *(f"{column:>12s}" for column in columns)]))
        for row, values in cells.items():
            shown = (f"{values[column]:12.4f}" if column in values else " " * 12 for column in columns)
            lines.append("  " + "  ".join([f"{row:{width}s}", *shown]))
    return "\n".join(lines)


def sample(
    run: str,
    /,
    prompt: str | None = None,
    tokens: Count | None = None,
    temperature: Annotated[float, Range(0)] | None = None,
    top_k: Count | None = None,
    top_p: Annotated[float, Range(above=0, most=1)] | None = None,
    seed: Seed | None = None,
    best: bool = False,
) -> None:
    """Text from a run: the prompt goes on, or is translated (the likeliest translation that a beam of 4 finds).

    Args:
        run: run directory.
        prompt: what the text begins with, a line end when not given; or what is translated.
        tokens: how many tokens to add; 200, or as many as the model's context has room for, when not given.
        temperature: 0 takes the likeliest token each time; higher is more varied; 0.8 when not given.
        top_k: choose among the k likeliest tokens only.
        top_p: choose among the likeliest tokens that together have this probability.
        seed: the same seed gives the same text; 0 when not given.
        best: the best checkpoint instead of the newest.
    """
    from jaxmodels.train import load_run
    from jaxmodels.train.run import compilation_cache

    compilation_cache()
    options = {"tokens": tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    given = {name: value for name, value in options.items() if value is not None}
    cfg, _ = configs.read(run)
    if cfg.task.name not in ("causal_lm", "seq2seq"):
        instead = {"gan": "report", "vae": "report"}.get(cfg.task.name, "predict")
        files = " FILE" if instead == "predict" else ""
        raise UserError(
            f"got a run of task {cfg.task.name}, expected causal_lm or seq2seq, try jaxmodels {instead} {run}{files}"
        )
    if cfg.task.name == "seq2seq":
        if given:
            flag = next(iter(given)).replace("_", "-")
            raise UserError(f"got --{flag} for a translator, expected a --prompt alone, try it without --{flag}")
        if not prompt:
            raise UserError(f"got no prompt, expected a text to translate, try jaxmodels sample {run} --prompt TEXT")
    opened = load_run(run, best=best)
    tokenizer, _ = opened.tokenizer, opened.task  # an imported model may have none
    if tokenizer is None:
        raise UserError(f"got {run} without a tokenizer, expected a run that was trained on texts, try another run")
    model, params = opened.model, opened.params["model"]
    if cfg.task.name == "seq2seq":
        from jaxmodels.generate import translate_texts

        assert prompt is not None
        print(translate_texts(model, params, tokenizer, [prompt])[0])
        return
    prompt = opening(tokenizer) if prompt is None else prompt
    if tokens is None:
        taken = len(tokenizer.before) + len(tokenizer.encode(prompt))
        room = 200 if model.longest is None else model.longest - taken
        given["tokens"] = max(min(200, room), 1)
    print(continued(model, params, tokenizer, prompt, **{"temperature": 0.8, **given}))


def models(name: str | None = None, /) -> None:
    """Families and presets with their sizes, or one model's tree of parameters.

    FLOPs are those of a forward pass, for each token (at a context of at most 2,048) or example.

    Args:
        name: a preset or a family, such as llama3-8b.
    """
    if name is None:
        from jaxmodels.models import flops

        readable = hf.supported()
        print(f"{'':27s}{'parameters':>17s}   FLOPs forward")
        for family, presets in list_models().items():
            kinds = ", ".join(readable.get(family, ()))
            print(f"{family}{kinds and f' (weights in and out: {kinds})'}")
            for preset in presets:  # each as soon as it is known
                model = flops.countable(create(preset))
                print(f"  {preset:25s}{model.count():>17,}   {forward_flops(model)}", flush=True)
        return
    model = create(name)
    axes = dict(jax.tree_util.tree_leaves_with_path(model.axes(), is_leaf=lambda x: isinstance(x, tuple)))
    print(model.config)
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.shapes()):
        dims = "  ".join(f"{axis}={size}" for axis, size in zip(axes[path], leaf.shape, strict=True))
        print(f"  {jax.tree_util.keystr(path, simple=True, separator='/'):24s} {dims}")
    print(f"{model.count():,} parameters")


def forward_flops(model: Any) -> str:
    """FLOPs of a forward pass as text."""
    from jaxmodels.models import flops

    if not np.issubdtype(model.inputs(1)[0].dtype, np.integer):
        return f"{flops.forward(model, 1):.3g} an example"
    length = min(getattr(model.config, "context", 2048), 2048)
    return f"{flops.forward(model, 1, length) / length:.3g} a token, T={length:,}"


def train_tokenizer(paths: tuple[str, ...], /, vocab_size: Dim = 8192, out: Path = Path("tokenizer.json")) -> None:
    """Train a byte-level BPE on files of text.

    Args:
        paths: files or globs.
        vocab_size: tokens to learn.
        out: where the tokenizer.json goes.
    """
    from jaxmodels.data import commands

    commands.train_tokenizer(paths, vocab_size, out)


def config_explain(source: str, field: str | None = None, /) -> None:
    """A field's value, what it means, and where the value came from.

    Args:
        source: a run directory or a config file.
        field: its dotted name, such as optim.peak_lr; all fields when not given.
    """
    if Path(source).is_file():
        cfg, origin = configs.load(source), {"file": source, "overrides": []}
    else:
        cfg, origin = configs.read(source)
    values = configs.flatten(cfg)
    wanted = field.replace("-", "_").removeprefix("__") if field else None
    if wanted is not None and wanted not in values:
        raise UserError(f"got field {field!r}, expected one such as optim.peak_lr{nearest(wanted, values)}")
    for name in [wanted] if wanted else list(values):
        print(printable(f"{name} = {values[name]!r}  ({configs.provenance(cfg, name, origin)})"))
        if wanted:
            print(f"  {configs.documentation(cfg, name)}")


def config_diff(a: str, b: str, /) -> None:
    """Fields in which two runs differ.

    Args:
        a: a run directory.
        b: another one.
    """
    found = configs.differences(configs.read(a)[0], configs.read(b)[0])
    for name, (left, right) in found.items():
        print(printable(f"{name}: {left!r} in {a}, {right!r} in {b}"))
    if not found:
        print("the same config")
