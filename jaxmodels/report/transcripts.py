"""A recognizer's transcripts beside the texts, and where it heard each character or token."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.models.spectrogram import hop, log_mel
from jaxmodels.report.attention import weights
from jaxmodels.report.pieces import Picture, Piece, Table, figure, pieces_of
from jaxmodels.tasks import ctc
from jaxmodels.tasks.task import floats
from jaxmodels.train.saved import Evaluation

LOOKED_AT = 256
"""The first held-out sounds, of which the worst are shown."""
DECODED = 32
"""As many of a decoder, which writes token by token."""
LISTED = 24
DRAWN = 3
_BANDS = 40


def pieces(evaluation: Evaluation) -> list[Piece]:
    """Tabulate the transcripts with the most errors, and draw the frames of some sounds with their characters."""
    run, tokenizer = evaluation.run, evaluation.source.tokenizer
    if run.config.task.answers != "transcript" or tokenizer is None:
        return []
    if run.task.predicts is None:
        return decoded(evaluation)
    config: Any = run.config.task
    blank = run.model.config.vocab_size - 1 if config.blank is None else config.blank
    assert run.task.outputs is not None
    outputs = jax.jit(run.task.outputs)
    size, last = run.config.eval.batch_size or run.config.data.batch_size, min(LOOKED_AT, len(evaluation.source))
    found = []
    for first in range(0, last, size):
        batch = evaluation.examples(first, first + size)
        logits, frames = outputs(run.params, run.stats, batch), run.model.config.frames(batch["lengths"])
        read = ctc.stripped(ctc.greedy(logits, jnp.asarray(frames), blank), config.space)
        wrong = ctc.edits(read, ctc.stripped(jnp.asarray(batch["targets"]), config.space))
        rows = zip(batch["inputs"], batch["lengths"], batch["targets"], logits, frames, read, wrong, strict=True)
        found += [tuple(map(np.asarray, row)) for row in rows if (row[2] >= 0).any()]

    def spelled(ids: np.ndarray) -> str:
        return tokenizer.decode(ids[ids >= 0]).strip()

    order = sorted(range(len(found)), key=lambda i: -int(found[i][-1]) / int((found[i][2] >= 0).sum()))
    listed = [
        (spelled(text), spelled(read), f"{int(wrong)} of {int((text >= 0).sum())}")
        for *_, text, _, _, read, wrong in (found[i] for i in order[:LISTED])
    ]
    caption = f"The transcripts with the most errors a character, of the first {len(found):,} held-out sounds."
    shown: list[Piece] = [Table(("text", "transcript", "errors"), listed, caption)]
    drawn = [i for i in [*order[:1], *order[:0:-1]] if ctc.fits(found[i][4][None], jnp.asarray(found[i][2])[None])[0]]
    for name, i in zip(("worst", "good", "better"), drawn[:DRAWN], strict=False):
        sound, length, text, logits, frames, read, _ = found[i]
        picture = draw(sound[: int(length)], evaluation, logits[: int(frames)], text[text >= 0], blank)
        words = f"Frames of “{spelled(text)}”, read as “{spelled(read)}”; below, where each character is the likeliest."
        shown.append(Picture(f"alignment-{name}", picture, words))
    return shown


def decoded(evaluation: Evaluation) -> list[Piece]:
    """Tabulate the transcripts of a decoder with the most errors, and draw where it listened in a sound."""
    from jaxmodels.generate.speech import error_rates, spelled, transcriber

    run, last = evaluation.run, min(DECODED, len(evaluation.source))
    transcribe, size, rows = transcriber(run), min(run.config.eval.batch_size or run.config.data.batch_size, last), []
    for first in range(0, last - last % size, size):
        batch = evaluation.examples(first, first + size)
        heard = [each.text for each in transcribe(batch)]
        rows += [(*pair, batch["inputs"][i], batch["tokens"][i], batch["targets"][i])
                 for i, pair in enumerate(zip(spelled(evaluation, batch), heard, strict=True)) if pair[0]]  # fmt: skip
    wrong = [error_rates([heard], [text]).get("wer", 0.0) for text, heard, *_ in rows]
    order = sorted(range(len(rows)), key=lambda i: -wrong[i])
    listed = [(*rows[i][:2], f"{wrong[i]:.0%}") for i in order[:LISTED]]
    caption = f"The transcripts with the most errors a word, of the first {len(rows):,} held-out sounds."
    shown: list[Piece] = [Table(("text", "transcript", "errors"), listed, caption)]
    if rows:
        text, _, *arrays = rows[order[len(order) // 2]]
        shown += listening(evaluation, text, *arrays)
    return shown


def listening(
    evaluation: Evaluation, text: str, sound: np.ndarray, tokens: np.ndarray, targets: np.ndarray
) -> list[Piece]:
    """Draw log-mel frames of a sound (N,), and what the decoder attends to as it is to predict each token of a text."""
    run, tokenizer = evaluation.run, evaluation.source.tokenizer
    at = np.flatnonzero(targets >= 0)
    samples = floats(jnp.asarray(sound))[None]
    kept = weights(run.apply, samples, jnp.asarray(tokens[: at[-1] + 1])[None])
    rate = run.task.fields["inputs"].rate or 1
    depth, places = run.model.config.decoder_layers or run.model.config.layers, kept[0].shape[-1]
    # of the upper half of the decoder's layers, which align better than the lower
    looks = [each[0] for each in kept if each.shape[-2:] == (at[-1] + 1, places)][-(-depth // 2) :]
    if not looks:
        return []
    heat = np.mean(looks, (0, 1))[at]
    mels, seconds = np.asarray(log_mel(samples, rate, _BANDS))[0], len(sound) / rate
    whole = figure(10.0, 2.4 + 0.18 * len(at))
    above, below = whole.subplots(2, 1, sharex=True, height_ratios=(2, max(1.0, 0.25 * len(at))))
    above.imshow(mels.T, aspect="auto", origin="lower", extent=(0, seconds, 0, rate / 2000), cmap="magma")
    above.set_ylabel("mel bands")
    above.set_yticks([])
    extent = (0, seconds, len(at) - 0.5, -0.5)
    below.imshow(heat / heat.max(1, keepdims=True), aspect="auto", extent=extent, cmap="Blues", vmin=0)
    below.set_xlim(0, min(seconds, 1.05 * (1 + np.flatnonzero(sound).max(initial=0)) / rate))  # without the padding
    below.set_yticks(range(len(at)), pieces_of(tokenizer, targets[at]), fontsize=7.5, parse_math=False)
    below.set_xlabel("seconds")
    words = f"Frames of “{text}”; below, what the decoder attends to as it predicts each token: mean over upper layers."
    return [Picture("listening", whole, words)]


def draw(sound: np.ndarray, evaluation: Evaluation, logits: np.ndarray, text: np.ndarray, blank: int) -> Any:
    """Draw log-mel frames of a sound, and the probabilities of the characters of its text with their alignment."""
    tokenizer = evaluation.source.tokenizer
    assert tokenizer is not None
    rate = evaluation.run.task.fields["inputs"].rate or 1
    mels = np.asarray(log_mel(floats(jnp.asarray(sound))[None], rate, _BANDS))[0]
    log_p = np.asarray(jax.nn.log_softmax(jnp.asarray(logits)))
    at, seconds = ctc.align(log_p, text, blank), len(sound) / rate
    whole = figure(10.0, 3.4)
    above, below = whole.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    extent = (0, len(mels) * hop(rate) / rate, 0, rate / 2000)
    above.imshow(mels.T, aspect="auto", origin="lower", extent=extent, cmap="magma")
    above.set_ylabel("mel bands")
    above.set_yticks([])
    time = (np.arange(len(log_p)) + 0.5) * seconds / len(log_p)
    below.plot(time, np.exp(log_p[:, blank]), color="0.8", linewidth=1)
    for place in range(len(text)):
        own = np.flatnonzero(at == place)
        letter = tokenizer.decode(text[place : place + 1]).replace(" ", "␣")
        middle = time[own].mean()
        chance = np.exp(log_p[own, text[place]]).max()
        below.vlines(middle, 0, chance, color="#1f6fb4")
        below.text(middle, 1.05, letter, ha="center", fontsize=8, parse_math=False, clip_on=False)
        above.axvline(middle, color="white", linewidth=0.4, alpha=0.6)
    below.set_ylim(0, 1)
    below.set_xlim(0, seconds)
    below.set_ylabel("probability")
    below.set_xlabel("seconds")
    return whole
