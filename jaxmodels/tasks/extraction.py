"""Extractive summarization: the sentences of a text that say most of what its summary says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.data import sentences
from jaxmodels.data.contract import BatchField
from jaxmodels.data.opening import Opening
from jaxmodels.data.section import DataConfig
from jaxmodels.data.sentences import Documents
from jaxmodels.data.source import Source
from jaxmodels.errors import UserError
from jaxmodels.fields import Count
from jaxmodels.models.model import Model
from jaxmodels.tasks.losses import Scores, binary_cross_entropy
from jaxmodels.tasks.overlap import judge_summary
from jaxmodels.tasks.task import (
    Answers,
    Batch,
    Loss,
    Params,
    Task,
    TaskConfig,
    Whole,
    counted,
    forward,
    scored,
    tokens,
)

ROUGE = ("rouge1", "rouge2", "rougeL")


@dataclass(frozen=True)
class Extraction(TaskConfig):
    """Choose the sentences of a text that make a summary of it.

    Each sentence is judged by itself, from its first token, beside all others; the loss is the binary cross-entropy of
    its mark. In evaluation the likeliest sentences are the summary, judged by ROUGE-1, ROUGE-2 and ROUGE-L, each with
    the best of several reference summaries.
    Source: Liu & Lapata 2019, section 3.1, with the simplest of its layers.
    """

    sentences: Count = 3
    """Sentences of a summary."""
    most: Count = 64
    """The most sentences of a text; those behind them are left out."""
    answers: ClassVar[Answers] = "extract"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sentences > self.most:
            raise UserError(
                f"got task.sentences {self.sentences}, expected at most task.most {self.most}, "
                f"try --task.sentences {self.most}"
            )

    def examples(self, opening: Opening) -> Source:
        return sentences.extracted(opening, self.most)

    def build(self, model: Model, data: DataConfig) -> Task:
        config = model.config
        if getattr(config, "head", None) != "sentences":
            head = f" with head {config.head}" if hasattr(config, "head") else ""
            raise UserError(
                f"got task extraction with {type(config).__name__}{head}, expected an encoder that judges sentences, "
                "try BERTConfig with head sentences"
            )
        if data.seq_len > config.context:
            raise UserError(
                f"got data.seq_len {data.seq_len}, expected at most model.context {config.context}, "
                f"try --model.context {data.seq_len}"
            )

        def apply(params: Params, stats: Params, batch: Batch, **how: Any) -> tuple[jax.Array, Params]:
            given = {name: batch[name] for name in ("types", "segment_ids", "at") if name in batch}
            return forward(("model", model), params, stats, batch["tokens"], **given, **how)

        def score(params: Params, stats: Params, batch: Batch, **how: Any) -> tuple[Scores, Params]:
            logits, stats = apply(params, stats, batch, **how)
            labels = counted(batch, batch["labels"])
            counts = labels >= 0
            loss = jnp.where(counts, binary_cross_entropy(logits, jnp.maximum(labels, 0)), 0).sum()
            correct = (counts & ((logits > 0) == (labels > 0))).sum()
            return Scores(loss, loss, correct, counts.sum()), stats

        def keep(params: Params, stats: Params, batch: Batch) -> dict[str, jax.Array]:
            logits, _ = apply(params, stats, batch)
            own = {"document": batch["document"]} if "document" in batch else {}  # which synthetic data lack
            weight = batch.get("weight", jnp.ones(len(logits)))
            return {"logits": logits, "labels": batch["labels"], "weight": weight, **own}

        def sums(kept: Mapping[str, np.ndarray], source: Source) -> dict[str, tuple[Any, float]]:
            logits, counts = kept["logits"].astype(np.float64), kept["labels"] >= 0
            right = kept["labels"] > 0
            loss = np.logaddexp(0, np.where(right, -logits, logits))[counts].sum()
            count, texts = float(counts.sum()), float(len(logits))
            found = {"loss": (loss, count), "accuracy": (float(((logits > 0) == right)[counts].sum()), count)}
            if not isinstance(source, Documents):
                return found
            judged = np.zeros(len(ROUGE))
            for number, row, there in zip(kept["document"].tolist(), logits, counts, strict=True):
                document = source.documents[number]
                judged += judge_summary(
                    " ".join(document.sentences[i] for i in self.chosen(row[there])), document.summaries
                )
            return {**found, **{name: (float(x), texts) for name, x in zip(ROUGE, judged, strict=True)}}

        optional = {"optional": True, "usual": True}
        fields = {
            "tokens": tokens(data, config.vocab_size),
            "types": tokens(data, config.types, **optional),
            "segment_ids": tokens(data, **optional),
            "at": BatchField((self.most,), below=data.seq_len),
            "labels": BatchField((self.most,), below=2),
            "document": BatchField((), optional=True),
        }
        loss, metrics = scored(score)
        return Task(
            {"model": model},
            (Loss("loss", "model", loss),),
            metrics,
            fields,
            needs="a sentence with a mark of 0 or 1",
            whole=Whole(keep, sums, ROUGE),
            better=dict.fromkeys(("accuracy", *ROUGE), "max"),
        )

    def chosen(self, logits: np.ndarray) -> list[int]:
        """Return the sentences of a summary in their order; the first of equal ones."""
        return sorted(np.argsort(-logits, kind="stable")[: self.sentences].tolist())
