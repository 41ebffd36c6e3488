"""Transcription: the text of a sound, by connectionist temporal classification (Graves et al. 2006)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.data.contract import BatchField
from jaxmodels.data.opening import Opening
from jaxmodels.data.recordings import transcribed
from jaxmodels.data.section import DataConfig
from jaxmodels.data.source import Source
from jaxmodels.errors import UserError
from jaxmodels.fields import Natural, Positive
from jaxmodels.models.model import Model
from jaxmodels.tasks import ctc
from jaxmodels.tasks.task import (
    Answers,
    Aux,
    Batch,
    Loss,
    Params,
    Sums,
    Task,
    TaskConfig,
    counted,
    floats,
    forward,
)


@dataclass(frozen=True)
class Transcription(TaskConfig):
    """Train a recognizer on sounds `inputs` (B, N) and their texts `targets` (B, U).

    A batch may have `lengths` (B,), the samples of each sound before its padding.
    The texts are ignored below 0, and at most `data.seq_len` tokens long. The loss is in nats a token. A text for which
    its sound has too few frames is not learned from; `unaligned` is the share of these. Tokens are taken for
    characters: their errors are `cer`, those of words `wer`, both of the likeliest token of each frame.
    """

    seconds: Positive = 20.0
    """Length of an example: shorter sounds are padded, and longer ones left out."""
    blank: Natural | None = None
    """Id of the blank, which no text has. None: the last of the vocabulary."""
    space: Natural | None = 1
    """Id of the token between words; in tokenizer chars 1, behind the line end. None: texts are not made of words."""
    answers: ClassVar[Answers] = "transcript"

    def examples(self, opening: Opening) -> Source:
        return transcribed(opening, self.blank, self.space)

    def build(self, model: Model, data: DataConfig) -> Task:
        config = model.config
        rate, size = getattr(config, "sample_rate", None), getattr(config, "vocab_size", None)
        if rate is None or size is None or not hasattr(config, "frames"):
            raise UserError(
                f"got task transcription with {type(config).__name__}, expected a model that reads sounds, "
                "try Wav2Vec2Config or another --task"
            )
        samples, blank = round(self.seconds * rate), size - 1 if self.blank is None else self.blank
        if config.frames(samples) < 1:
            least = config.samples(1) / rate
            raise UserError(
                f"got task.seconds {self.seconds:g}, expected at least {least:g}, what a frame of the model sees, "
                f"try --task.seconds {max(1.0, 10 * least):g}"
            )
        for name, token in (("blank", blank), ("space", self.space)):
            if token is not None and token >= size:
                raise UserError(
                    f"got task.{name} {token}, expected an id below model.vocab_size {size}, "
                    f"try --task.{name} {size - 1 if name == 'blank' else 0}"
                )

        def read(params: Params, stats: Params, batch: Batch, **how: Any) -> tuple[jax.Array, jax.Array, Params]:
            sounds = floats(batch["inputs"])
            lengths = batch.get("lengths", jnp.full(sounds.shape[:1], sounds.shape[1]))
            logits, stats = forward(("model", model), params, stats, sounds, lengths=lengths, **how)
            return logits, jnp.clip(config.frames(lengths), 0, logits.shape[1]), stats

        def sums(logits: jax.Array, frames: jax.Array, targets: jax.Array) -> Sums:
            each, tokens = ctc.ctc_loss(logits, frames, targets, blank), (targets >= 0).sum(1)
            right = jnp.isfinite(each) & (tokens > 0)
            loss = jnp.where(right, each, 0.0).sum(), jnp.where(right, tokens, 0).sum()
            return {"loss": loss, "unaligned": (((tokens > 0) & ~right).sum(), (tokens > 0).sum())}

        def loss(params: Params, stats: Params, batch: Batch, rng: jax.Array, step: Any = 0) -> tuple[jax.Array, Aux]:
            logits, frames, stats = read(params, stats, batch, train=True, rng=rng)
            found = sums(logits, frames, counted(batch, batch["targets"]))
            total, count = found["loss"]
            return total, Aux(count, found, stats)

        def metrics(params: Params, stats: Params, batch: Batch) -> Sums:
            logits, frames, _ = read(params, stats, batch)
            targets = counted(batch, batch["targets"])
            return {**sums(logits, frames, targets), **errors(ctc.greedy(logits, frames, blank), targets, self.space)}

        def predicts(params: Params, stats: Params, batch: Batch) -> dict[str, jax.Array]:
            logits, frames, _ = read(params, stats, batch)
            there = jnp.arange(logits.shape[1]) < frames[:, None]
            sure = jax.nn.softmax(logits).max(-1).mean(1, where=there)
            return {"tokens": ctc.greedy(logits, frames, blank), "confidence": sure}

        fields = {
            # 16 bits a sample, of which a plan draws those from 0 on
            "inputs": BatchField((samples,), np.float32, stored=np.int16, below=2**15, rate=rate),
            "lengths": BatchField((), below=samples + 1, optional=True, usual=True),
            "targets": BatchField((data.seq_len,), below=size),
        }
        return Task(
            {"model": model},
            (Loss("loss", "model", loss),),
            metrics,
            fields,
            needs="a sound with a text for which it has enough frames",
            better={"wer": "min", "cer": "min", "unaligned": "min"},
            predicts=predicts,
            outputs=lambda params, stats, batch: read(params, stats, batch)[0],
        )


def errors(found: jax.Array, targets: jax.Array, space: int | None) -> Sums:
    """Sum the errors of texts (B, T) in characters and in words, of those in targets (B, U); rows without any are left
    out. Spaces around a text count for nothing, as in jiwer."""
    targets = ctc.stripped(targets, space)
    count = (targets >= 0).sum(1)
    found = ctc.stripped(jnp.where(count[:, None] > 0, found, -1), space)
    sums = {"cer": (ctc.edits(found, targets).sum(), count.sum())}
    if space is not None:
        mine, theirs = ctc.words(found, space), ctc.words(targets, space)
        sums["wer"] = ctc.edits(mine, theirs).sum(), (theirs[..., 0] >= 0).sum()
    return sums
