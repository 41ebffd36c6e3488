"""Judge a saved run by the whole texts or images that it generates."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels import data
from jaxmodels.errors import UserError
from jaxmodels.generate import bleu
from jaxmodels.generate.speech import error_rates, spelled, transcriber
from jaxmodels.generate.translation import translated
from jaxmodels.tasks.extraction import ROUGE
from jaxmodels.tasks.metrics import frechet_distance, inception_score
from jaxmodels.tasks.overlap import judge_summary
from jaxmodels.tasks.task import normalized, tasks_that_answer
from jaxmodels.train.saved import Evaluation, Run, load_run

_AT_ONCE = 100


def judge_texts(run: Run, beams: int | None = None) -> dict[str, float]:
    """Compute BLEU of a run's translations, or ROUGE of its summaries, on the evaluation set that its config names."""
    sources, references = data.open_pairs(run.config.data, "eval")
    found = translated(run, sources, beams=beams)
    if getattr(run.config.task, "target", "") != "summary":
        return {"bleu": bleu(found, references)}
    judged = np.mean([judge_summary(*each) for each in zip(found, references, strict=True)], axis=0)
    return dict(zip(ROUGE, judged.tolist(), strict=True))


def judge_transcripts(evaluation: Evaluation) -> dict[str, float]:
    """Compute the word and character error rates of what a run's decoder transcribes."""
    transcribe, texts, found = transcriber(evaluation.run), [], []
    size = 0
    for batch in evaluation.batches():
        size = max(size, count := len(batch["inputs"]))
        padded = {name: np.resize(x, (size, *x.shape[1:])) for name, x in batch.items()}  # one program for all batches
        found += [heard.text for heard in transcribe(padded)[:count]]
        texts += spelled(evaluation, batch)
    kept = [pair for pair in zip(found, texts, strict=True) if pair[1]]
    return error_rates(*map(list, zip(*kept, strict=True))) if kept else {}


def judge_images(run: Run, classifier: Path, count: int = 1000, real: Iterable[np.ndarray] = ()) -> dict[str, float]:
    """Judge a generative model's images by what a trained classifier makes of them.

    `score` is the inception score of Salimans et al. 2016, computed with this classifier; `classes` counts the classes
    that it predicts at all; `confidence` is its mean highest probability. `frechet` is the Fréchet distance of its last
    hidden units from those of `real` images, batches (B, H, W, C), if there are any.
    """
    samples = run.task.samples
    if samples is None:
        raise UserError(
            f"got --classifier for a run of task {run.config.task.kind}, expected one whose model generates images, "
            "try it without"
        )
    judge = load_run(classifier)
    if judge.config.task.answers != "class":  # the score is of classes that exclude each other
        raise UserError(
            f"got classifier {classifier} of task {judge.config.task.kind}, "
            f"expected {tasks_that_answer('class')} with one label an image, try the run of such a classifier"
        )
    made, seen_as = jax.eval_shape(lambda: samples(run.params, run.stats, 1)), judge.model.inputs(1)[0]
    if made.shape != seen_as.shape:
        raise UserError(
            f"got classifier {classifier} of inputs {seen_as.shape[1:]} for images of {made.shape[1:]}, "
            "expected the same, try a classifier that was trained on images of that size"
        )

    def probabilities(images: jax.Array) -> jax.Array:
        return jax.nn.softmax(judge.apply(normalized(images, judge.config.data)).astype(jnp.float32))

    def features(images: jax.Array) -> jax.Array:
        return judge.apply(normalized(images, judge.config.data), head=False)

    images = samples(run.params, run.stats, count)
    parts = [images[i : i + _AT_ONCE] for i in range(0, count, _AT_ONCE)]
    seen = _each(probabilities, parts)
    chosen = np.unique(seen.argmax(1))
    found = {"score": inception_score(seen), "classes": float(len(chosen)), "confidence": float(seen.max(1).mean())}
    if truth := list(real):
        found["frechet"] = frechet_distance(_each(features, parts), _each(features, truth))
    return found


def _each(compute: Any, parts: Iterable[Any]) -> np.ndarray:
    compute = jax.jit(compute)
    return np.concatenate([compute(part) for part in parts])
