"""Sounds that a model draws, to hear, with their spectrograms."""

from __future__ import annotations

import itertools

import numpy as np

from jaxmodels.data.waves import wav
from jaxmodels.generate.sounds import draw_sounds, names_of
from jaxmodels.report.pieces import Heard, Picture, Piece, grid
from jaxmodels.train.saved import Evaluation

MOST = 10
SECONDS = 1.0
SEED = 1


def pieces(evaluation: Evaluation) -> list[Piece]:
    """Show sounds that the model draws; of a model with conditions, for several values of the first ones."""
    run = evaluation.run
    if run.task.sounds is None:
        return []
    names = names_of(run)
    # each value of the first condition with the next value of the others
    rows = [tuple(each[i % len(each)] for each in names) for i in range(min(MOST, len(names[0])))] if names else []
    samples, rate = draw_sounds(run, rows, count=4, seconds=SECONDS, seed=SEED)
    titles = [", ".join(row) for row in rows] or [f"sound {i + 1}" for i in range(len(samples))]
    columns = min(5, len(samples))
    figure, axes = grid(-(-len(samples) // columns), columns, 2.4, 1.8)
    for axis, title, sound in itertools.zip_longest(axes.flat, titles, samples):
        if title is None:
            axis.set_axis_off()
            continue
        axis.specgram(np.asarray(sound), NFFT=256, Fs=rate, noverlap=192, cmap="magma", vmin=-140, vmax=-30)
        axis.set_title(title, fontsize=9)
        axis.set_yticks([0, rate / 4, rate / 2], ["0", f"{rate / 4000:g} kHz", f"{rate / 2000:g} kHz"], fontsize=7)
        axis.tick_params(labelsize=7)
    heard = Heard(
        [(title, wav(sound, rate)) for title, sound in zip(titles, samples, strict=True)],
        "Sounds that the checkpoint draws, sample by sample, unselected.",
    )
    return [heard, Picture("spectrograms", figure, "Their spectrograms: seconds across, frequencies upwards.")]
