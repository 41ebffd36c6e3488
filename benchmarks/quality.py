"""Train configs on real data to the end, and record what they reach on the test split."""

from __future__ import annotations

import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from benchmarks import record
from jaxmodels.errors import UserError

DATA = record.ROOT.parent / "shared" / "data" / "tfds"


@dataclass(frozen=True)
class Recipe:
    """A config to train, and the metric that it should reach."""

    config: str
    metric: str
    aim: float | None
    split: str | None = "test"
    """None means the config's own."""
    best: bool = False
    lower: bool = False
    """Whether a lower value is better."""
    arguments: tuple[str, ...] = ()
    classifier: str | None = None
    """The recipe whose run is used to judge the images."""
    after: str | None = None
    """The recipe whose run this one needs."""
    seeds: tuple[int, ...] = (0,)
    note: str = ""


RECIPES = {
    "gpt_stdlib": Recipe("gpt_stdlib", "loss", None, None, lower=True, note="unigram model: 3.13 nats a byte"),
    "gpt_shakespeare_char": Recipe(
        "gpt_shakespeare_char", "loss", 1.88, None, lower=True, note="aim: nanoGPT's README"
    ),
    "mlp_mnist": Recipe("mlp_mnist", "accuracy", 0.97, best=True, note="stops early, the best is kept"),
    "cnn_mnist": Recipe("cnn_mnist", "accuracy", 0.988),
    "vgg_mnist": Recipe("vgg_mnist", "accuracy", 0.988),
    "resnet_mnist": Recipe("resnet_mnist", "accuracy", 0.988),
    "vit_mnist": Recipe("vit_mnist", "accuracy", 0.975),
    "vae_mnist": Recipe("vae_mnist", "elbo", -106.0, note="nats, pixels drawn as 0 or 1"),
    "vae_mnist_2d": Recipe("vae_mnist_2d", "elbo", None, note="two latents, for the grid"),
    "gan_mnist": Recipe("gan_mnist", "score", 8.0, classifier="cnn_mnist"),
    "wgan_mnist": Recipe("wgan_mnist", "score", 8.0, classifier="cnn_mnist"),
    "lstm_sst2": Recipe("lstm_sst2", "accuracy", 0.78, best=True),
    "bert_pretrain_sst2": Recipe("bert_pretrain_sst2", "loss", None, "validation", lower=True, note="masked words"),
    "bert_sst2": Recipe("bert_sst2", "accuracy", 0.78, best=True, after="bert_pretrain_sst2", seeds=(0, 1, 2)),
    "bert_sst2_scratch": Recipe(
        "bert_sst2",
        "accuracy",
        None,
        best=True,
        arguments=("--init.source", "None", "--init.fresh", "--optim.layer-decay", "1"),
        after="bert_pretrain_sst2",
        seeds=(0, 1, 2),
        note="the same model, tokenizer and steps, not pre-trained",
    ),
    "transformer_multi30k": Recipe("transformer_multi30k", "bleu", 30.0, note="sacreBLEU, beam of 4"),
    "clip_digits": Recipe("clip_digits", "image_to_text", 0.95, note="captions of the right class first"),
}


@dataclass(frozen=True)
class Options:
    """Recipes to train, and places for data, runs and record."""

    names: Positional[tuple[str, ...]] = ()
    """Recipes; by default, all."""
    data_dir: Path = DATA
    """TFDS data directory."""
    runs: Path | None = None
    """Folder for the runs, by default a temporary one; a run that has already ended there is only evaluated."""
    out: Path | None = None
    """Folder for the record; by default, benchmarks/results."""


def run(options: Options) -> None:
    """Train and evaluate each, and write the record after each."""
    record.check("recipe", options.names, RECIPES)
    with tempfile.TemporaryDirectory() as place:
        runs = (options.runs or Path(place)).resolve()
        rows = {row["name"]: row for row in recorded(options.out)}
        for name in options.names or RECIPES:
            rows[name] = measure(name, options.data_dir.resolve(), runs)
            ordered = [rows[each] for each in RECIPES if each in rows]
            columns = {
                "name": "config",
                "reached": "reached",
                "aim": "aim",
                "each": "of each seed",
                "minutes": "minutes",
                "load": "load average at the end",
                "command": "command",
                "commit": "commit, date",
                "note": "",
            }
            notes = (
                "reached: on the test split, of the moving average or the best checkpoint where the config keeps one",
                "the sets are small ones: 8,500 digits, 6,920 sentences, 29,000 pairs to train on",
                "minutes of the run itself, on two cores; above a load of 2 other work ran beside it",
            )
            path = record.write(
                "quality", "Quality of trained models", ordered, out=options.out, columns=columns, notes=notes
            )
    print(path.read_text())


def recorded(out: Path | None) -> list[dict[str, Any]]:
    """Return the rows of the existing record."""
    path = (out or record.RESULTS) / "quality.json"
    return json.loads(path.read_text())["rows"] if path.is_file() else []


def measure(name: str, data_dir: Path, runs: Path) -> dict[str, Any]:
    """Train one recipe with each of its seeds, and return its row."""
    recipe = RECIPES[name]
    for other in (recipe.after, recipe.classifier):
        if other is not None:
            trained(other, RECIPES[other], 0, data_dir, runs)
    found, extra, minutes = [], {}, []
    for seed in recipe.seeds:
        where = trained(name, recipe, seed, data_dir, runs)
        metrics = evaluated(recipe, where, runs)
        found.append(metrics[recipe.metric])
        minutes.append(duration(where))
        extra = {key: metrics[key] for key in ("classes", "perplexity", "bits_per_byte") if key in metrics}
    reached = statistics.mean(found)
    met = None if recipe.aim is None else (reached <= recipe.aim if recipe.lower else reached >= recipe.aim)
    shown = {"accuracy": "{:.2%}", "image_to_text": "{:.2%}"}.get(recipe.metric, "{:.2f}")
    side = "≤" if recipe.lower else "≥"
    parts = [recipe.note] if recipe.note else []
    parts += [f"{key} {value:.4g}" for key, value in extra.items()]
    return {
        "name": name,
        "value": reached,
        "reached": f"{recipe.metric} {shown.format(reached)}",
        "aim": "" if recipe.aim is None else f"{side} {shown.format(recipe.aim)}{'' if met else ': missed'}",
        "each": ", ".join(shown.format(value) for value in found) if len(found) > 1 else "",
        "minutes": round(statistics.mean(minutes), 1),
        "load": round(os.getloadavg()[0], 1),
        "command": shlex.join(
            ["jaxmodels", "train", f"configs/{recipe.config}.py", "--data.dir", "DIR", *recipe.arguments]
        ),
        "commit": f"{record.git('rev-parse', '--short=12', 'HEAD')}, {datetime.now():%Y-%m-%d}",
        "note": "; ".join(parts),
    }


def trained(name: str, recipe: Recipe, seed: int, data_dir: Path, runs: Path) -> Path:
    """Return a recipe's run directory, training it first if need be."""
    where = runs / (name if seed == 0 else f"{name}-seed{seed}")
    if not (where / "ended").exists():
        arguments = list(recipe.arguments)
        if recipe.after is not None:
            before = str(runs / recipe.after)
            arguments += ["--data.tokenizer", before]
            arguments += [] if "--init.source" in arguments else ["--init.source", before]
        seeds = ("--train.seed", str(seed)) if seed else ()
        call(
            "train",
            f"configs/{recipe.config}.py",
            *data_options(recipe, data_dir),
            "--run-dir",
            str(where),
            *seeds,
            *arguments,
        )
        (where / "ended").touch()
    return where


def data_options(recipe: Recipe, data_dir: Path) -> tuple[str, ...]:
    """Return the options that locate the data; the standard library needs none."""
    return () if recipe.config == "gpt_stdlib" else ("--data.dir", str(data_dir))


def evaluated(recipe: Recipe, where: Path, runs: Path) -> dict[str, float]:
    """Return the metrics of a run."""
    out = where / "quality.json"
    arguments = ["--split", recipe.split] if recipe.split else []
    arguments += ["--best"] if recipe.best else []
    arguments += ["--classifier", str(runs / recipe.classifier)] if recipe.classifier else []
    call("eval", str(where), "--json", str(out), *arguments)
    return json.loads(out.read_text())


def duration(where: Path) -> float:
    """Return the minutes from the first line of a run's log to its last checkpoint."""
    first = (where / "log.txt").read_text()[:19]
    last = max(path.stat().st_mtime for path in where.glob("checkpoints/*/meta.json"))
    return (last - datetime.strptime(first, "%Y-%m-%d %H:%M:%S").timestamp()) / 60


def call(*arguments: str) -> None:
    """Run a jaxmodels command, with its output on the terminal."""
    print(f"$ jaxmodels {shlex.join(arguments)}", flush=True)
    done = subprocess.run([sys.executable, "-m", "jaxmodels", *arguments], cwd=record.ROOT, check=False)
    if done.returncode:
        raise UserError(f"got exit code {done.returncode} of jaxmodels {shlex.join(arguments)}, expected 0")
