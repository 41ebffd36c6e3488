"""Metrics of classifiers, as sums over examples and what is derived from them."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.tasks.task import Better, Sums, Totals, divide

BINS = 15
"""Confidence bins of the calibration error (Guo et al. 2017)."""
LISTED = 100
"""With more classes than this, metrics of single classes are not reported."""
TOP = 5
_RATIOS = ("precision", "recall", "f1")
BETTER: dict[str, Better] = {
    **dict.fromkeys(("accuracy", "top5", *_RATIOS, *(f"{name}_micro" for name in _RATIOS)), "max"),
    "calibration_error": "min",
}
"""Which values of a classifier's metrics are better."""


def single(logits: jax.Array, labels: jax.Array) -> Sums:
    """Sum the metrics of a classifier that chooses one class.

    Shapes: logits (B, C), labels (B,), ignored below 0. Sums: `accuracy`, where the first of equal logits is chosen;
    `counts` (C, 3) of true positives, false positives and false negatives; `calibration` (BINS, 2) of confidence and of
    correct choices; `top5` if there are more than five classes.
    """
    logits = logits.astype(jnp.float32)
    seen = labels >= 0
    count, classes = seen.sum(), logits.shape[-1]
    chosen = jax.nn.one_hot(logits.argmax(-1), classes) * seen[:, None]
    actual = jax.nn.one_hot(labels, classes)
    confidence = jnp.exp(logits.max(-1) - jax.nn.logsumexp(logits, -1))
    right = (chosen * actual).sum(-1)
    # the bins are (0, 1/n], (1/n, 2/n] …, as in the paper
    bins = jax.nn.one_hot(jnp.clip(jnp.ceil(confidence * BINS) - 1, 0, BINS - 1).astype(int), BINS) * seen[:, None]
    found: Sums = {
        "accuracy": (right.sum(), count),
        "counts": (confusions(chosen, actual), count),
        "calibration": (jnp.einsum("bn,bk->nk", bins, jnp.stack([confidence, right], -1)), count),
    }
    if classes > TOP:
        mine = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[:, None], -1)
        # `not <=` rather than `>`, which would count a NaN logit among the top five
        found["top5"] = ((seen & ((~(logits <= mine)).sum(-1) < TOP)).sum(), count)
    return found


def multiple(logits: jax.Array, labels: jax.Array) -> Sums:
    """Sum the metrics of a classifier that judges each class independently, at a probability of 1/2.

    Shapes: logits (B, C), labels (B, C) of 0 and 1, each ignored below 0. `accuracy` counts examples that are correct
    in all of their known classes.
    """
    known = labels >= 0
    seen = known.any(-1)
    chosen, actual = (logits > 0) * known, jnp.maximum(labels, 0)
    return {
        "counts": (confusions(chosen, actual), seen.sum()),
        "accuracy": ((seen & (chosen == actual).all(-1)).sum(), seen.sum()),
    }


def confusions(chosen: jax.Array, actual: jax.Array) -> jax.Array:
    """Count true positives, false positives and false negatives of each class, (C, 3), from 0 and 1 (B, C)."""
    both = (chosen * actual).sum(0)
    return jnp.stack([both, chosen.sum(0) - both, actual.sum(0) - both], -1)


def summarize(totals: Totals, classes: Sequence[str] = ()) -> dict[str, float]:
    """Compute precision, recall and F1 (macro, micro, per class) and calibration error, and divide all other sums.

    The macro mean is over classes that occur or were chosen or, with independent classes, over all; ratios without a
    denominator are 0. These are scikit-learn's conventions. A class that is left out of the mean has no metrics of its
    own either, or a group without it would seem to be served badly.
    """
    rest = {name: total for name, total in totals.items() if name not in ("counts", "calibration")}
    found = divide(rest)
    counts, _ = totals["counts"]
    each = ratios(counts)
    occurs = (counts.sum(-1) > 0) | ("calibration" not in totals)
    for name, values in each.items():
        if occurs.any():
            found[name] = float(values[occurs].mean())
    for name, value in ratios(counts.sum(0)).items() if occurs.any() else ():
        found[f"{name}_micro"] = float(value)
    if (calibration := totals.get("calibration")) is not None and calibration[1] > 0:
        bins, count = calibration
        found["calibration_error"] = float(np.abs(bins[:, 0] - bins[:, 1]).sum() / count)
    if len(counts) <= LISTED:
        names = unique([*classes, *map(str, range(len(classes), len(counts)))])
        for name, values in each.items():
            found |= {f"{name}/{names[k]}": float(values[k]) for k in np.flatnonzero(occurs)}
    return found


def unique(names: Sequence[str]) -> list[str]:
    """Make names unique: repeated ones get their number appended, as in `3 (2)` and `3 (3)`."""
    names = list(names)
    while alike := {name for name in names if names.count(name) > 1}:
        names = [f"{name} ({k})" if name in alike else name for k, name in enumerate(names)]
    return names


def ratios(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Compute precision, recall and F1 from counts (…, 3) of true positives, false positives and false negatives."""
    hit, wrong, missed = np.moveaxis(np.asarray(counts, np.float64), -1, 0)
    parts = {"precision": (hit, hit + wrong), "recall": (hit, hit + missed), "f1": (2 * hit, 2 * hit + wrong + missed)}
    return {name: above / np.maximum(below, 1e-300) for name, (above, below) in parts.items()}


def inception_score(probabilities: np.ndarray) -> float:
    """Exponential of the mean divergence of each image's classes from the overall distribution; from 1 to C.

    Shapes: probabilities (N, C) of a classifier. Source: Salimans et al. 2016, section 4.
    """
    p = np.asarray(probabilities, np.float64)
    ratio = np.log(np.maximum(p, 1e-12)) - np.log(np.maximum(p.mean(0, keepdims=True), 1e-12))
    return float(np.exp((p * ratio).sum(1).mean()))


def frechet_distance(one: np.ndarray, other: np.ndarray) -> float:
    """Squared distance between two normal distributions with the means and covariances of two sets of features.

    Shapes: (N, D) and (M, D). It is biased upwards for few rows: compare only figures of equally many.
    Source: Heusel et al. 2017, equation 6, with the trace of the root of C₁C₂ from C₁^½ C₂ C₁^½, which is symmetric.
    """
    one, other = (np.asarray(x, np.float64) for x in (one, other))
    (mean, covariance), (mean2, covariance2) = ((x.mean(0), np.atleast_2d(np.cov(x.T))) for x in (one, other))
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    shared = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ covariance2 @ root), 0)).sum()
    return float(np.square(mean - mean2).sum() + np.trace(covariance) + np.trace(covariance2) - 2 * shared)
