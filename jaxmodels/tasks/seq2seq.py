"""Sequence to sequence: predict each next token of a target from a source, text or sound, and the target so far."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np

from jaxmodels.data import examples
from jaxmodels.data.contract import BatchField
from jaxmodels.data.opening import Opening
from jaxmodels.data.recordings import dictated
from jaxmodels.data.section import DataConfig
from jaxmodels.data.source import Source
from jaxmodels.errors import UserError
from jaxmodels.fields import Dim, Positive
from jaxmodels.models.model import Model
from jaxmodels.tasks.losses import Scores, language_cross_entropy
from jaxmodels.tasks.task import (
    Answers,
    Batch,
    Loss,
    ModelCall,
    Params,
    ScoredConfig,
    Task,
    counted,
    floats,
    forward,
    language_task,
    scored,
    tokens,
)


@dataclass(frozen=True)
class Seq2Seq(ScoredConfig):
    """Train an encoder-decoder on sources `inputs` (B, S), decoder inputs `tokens` (B, T) and `targets` (B, T).

    Targets are the tokens that follow, ignored below 0. A batch may have `segment_ids` (B, S) and `target_segment_ids`
    (B, T), for padding and packing. With `task.seconds` sources are sounds (B, N), padded with silence.
    """

    target: Literal["translation", "summary"] = "translation"
    """What it makes of texts. Translations are judged by BLEU, summaries by ROUGE-1, ROUGE-2 and ROUGE-L, each with the
    best of several references."""
    target_len: Dim | None = None
    """Tokens of a target of texts; as many as `data.seq_len`, those of a source, when not given."""
    seconds: Positive | None = None
    """Length of sources that are sounds: shorter ones are padded, and longer ones left out. None: sources are texts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seconds is not None and (self.target_len is not None or self.target != "translation"):
            raise UserError(
                f"got task.target {self.target} and task.target_len {self.target_len} with task.seconds, expected "
                "neither for sounds, whose texts have data.seq_len tokens, try --task.seconds None"
            )

    @property
    def answers(self) -> Answers:  # pyright: ignore[reportIncompatibleVariableOverride]
        return "translation" if self.seconds is None else "transcript"

    def examples(self, opening: Opening) -> Source:
        return examples.pairs(opening, self.target_len) if self.seconds is None else dictated(opening)

    def build(self, model: Model, data: DataConfig) -> Task:
        unembedding = model.unembedding
        if unembedding is None or len(model.inputs(1)) != 2:
            raise UserError(
                f"got task seq2seq with {type(model.config).__name__}, expected an encoder-decoder, "
                "try TransformerConfig or another --task"
            )
        packing = ("segment_ids", "target_segment_ids") if self.seconds is None else ()

        def given(batch: Batch) -> tuple[tuple[jax.Array, jax.Array], dict[str, Any]]:
            sources = batch["inputs"] if self.seconds is None else floats(batch["inputs"])
            return (sources, batch["tokens"]), {name: batch[name] for name in packing if name in batch}

        length = data.seq_len if self.target_len is None else self.target_len
        if model.longest is not None and (most := max(data.seq_len, length)) > model.longest:
            raise UserError(
                f"got texts of up to {most} tokens, expected at most model.context {model.longest}, "
                f"try --model.context {most}"
            )
        if data.pack and length != data.seq_len:
            raise UserError(
                f"got task.target_len {length} with data.pack, expected rows of data.seq_len {data.seq_len} on both "
                "sides, try --data.pack False"
            )

        def ask(batch: Batch, rng: jax.Array | None = None) -> ModelCall:
            inputs, packed = given(batch)
            return ModelCall(inputs, {**packed, "head": False}, counted(batch, batch["targets"]), self.score, rng)

        def score(params: Params, stats: Params, batch: Batch, **kwargs: Any) -> tuple[Scores, Params]:
            call = ask(batch)
            features, stats = forward(("model", model), params, stats, *call.inputs, **call.options, **kwargs)
            output = unembedding(params["model"])
            return language_cross_entropy(features, output, call.targets, self.label_smoothing, self.z_loss), stats

        def outputs(params: Params, stats: Params, batch: Batch) -> Any:
            inputs, packed = given(batch)
            return forward(("model", model), params, stats, *inputs, **packed)[0]

        ids, marks = tokens(data, getattr(model.config, "vocab_size", None)), tokens(data, optional=True, usual=True)
        own, own_marks = (dataclasses.replace(field, shape=(length,)) for field in (ids, marks))
        fields = {
            "inputs": self._sources(model, ids),
            "tokens": own,
            "targets": own,
            **dict(zip(packing, (marks, own_marks), strict=False)),
        }
        loss, metrics = scored(score)
        return language_task(model, Loss("loss", "model", loss), metrics, fields, outputs=outputs, ask=ask)

    def _sources(self, model: Model, ids: BatchField) -> BatchField:
        """Return the field of the sources: token ids, or sounds of the model's rate.

        Raises:
            UserError: the model reads others, or no sounds as long.
        """
        config, kind = model.config, type(model.config).__name__
        rate, longest = getattr(config, "sample_rate", None), getattr(config, "longest_sound", None)
        if rate is None and self.seconds is None:
            return ids
        if rate is None:
            raise UserError(f"got task.seconds {self.seconds} with {kind}, which reads texts, expected none, "
                            "try --task.seconds None")  # fmt: skip
        most = "" if longest is None else f" of at most {longest / rate:g}"
        if self.seconds is None:
            raise UserError(f"got no task.seconds with {kind}, which reads sounds, expected their length{most}, "
                            "try --task.seconds 30")  # fmt: skip
        samples = round(self.seconds * rate)
        if longest is not None and not 1 <= samples <= longest:
            raise UserError(f"got task.seconds {self.seconds:g} with {kind}, expected a length{most}, "
                            f"try --task.seconds {longest / rate:g}")  # fmt: skip
        # 16 bits a sample, of which a plan draws those from 0 on
        return BatchField((samples,), np.float32, stored=np.int16, below=2**15, rate=rate)
