"""Masked language modeling: restore tokens that were masked in a text."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp

from jaxmodels.data import examples
from jaxmodels.data.contract import IGNORED
from jaxmodels.data.opening import Opening
from jaxmodels.data.section import DataConfig
from jaxmodels.data.source import Source
from jaxmodels.errors import UserError
from jaxmodels.fields import Natural, Range
from jaxmodels.models.model import Model
from jaxmodels.tasks.losses import Scores
from jaxmodels.tasks.task import (
    OF_LANGUAGE,
    Answers,
    Batch,
    Loss,
    ModelCall,
    Params,
    ScoredConfig,
    Task,
    counted,
    forward,
    packed,
    perplexity,
    scored,
    seeds,
    tokens,
)


@dataclass(frozen=True)
class MaskedLM(ScoredConfig):
    """Train an encoder on texts `tokens` (B, T), in which the task itself masks a fraction of the tokens.

    Never masked are positions where `segment_ids` are 0 or `targets` (used for nothing else) are below 0, and the ids
    in `task.keep`. Training masks differently at each step (Liu et al. 2019, section 4.1); in evaluation the mask is a
    function of the tokens. A batch may have `types` and `positions` (B, T) too.
    """

    mask_fraction: Annotated[float, Range(above=0, below=1)] = 0.15
    """Fraction of a text's tokens that are masked (Devlin et al. 2018)."""
    mask_token: Natural | None = None
    """Id of the mask token. None: the last of the vocabulary."""
    keep: tuple[Natural, ...] = ()
    """Ids that are never masked, such as those of [PAD], [CLS] and [SEP]."""
    answers: ClassVar[Answers] = "gaps"

    def examples(self, opening: Opening) -> Source:
        return examples.language(opening, masked=True)

    def build(self, model: Model, data: DataConfig) -> Task:
        config = model.config
        if getattr(config, "head", None) != "masked_lm":
            head = f" with head {config.head}" if hasattr(config, "head") else ""
            raise UserError(
                f"got task masked_lm with {type(config).__name__}{head}, expected an encoder that gives logits of each "
                "token, try BERTConfig with head masked_lm or another --task"
            )
        if data.seq_len > config.context:
            raise UserError(
                f"got data.seq_len {data.seq_len}, expected at most model.context {config.context}, "
                f"try --model.context {data.seq_len}"
            )
        gap = config.vocab_size - 1 if self.mask_token is None else self.mask_token
        if not 0 <= gap < config.vocab_size:
            raise UserError(
                f"got task.mask_token {gap}, expected an id below model.vocab_size {config.vocab_size}, "
                f"try --task.mask-token {config.vocab_size - 1}"
            )
        if wrong := [token for token in self.keep if not 0 <= token < config.vocab_size]:
            raise UserError(
                f"got {wrong[0]} in task.keep, expected ids below model.vocab_size {config.vocab_size}, try without it"
            )
        if len(set(self.keep)) == config.vocab_size:
            raise UserError(
                f"got task.keep of all {config.vocab_size} ids, expected some that may be masked, "
                "try those of [PAD], [CLS] and [SEP] alone"
            )

        def ask(batch: Batch, rng: jax.Array | None = None) -> ModelCall:
            ids = batch["tokens"]
            free = ~jnp.isin(ids, jnp.array(self.keep, ids.dtype)) if self.keep else jnp.ones(ids.shape, bool)
            for name, least in (("segment_ids", 1), ("targets", 0)):
                if name in batch:
                    free &= batch[name] >= least
            if rng is None:
                keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), seeds(ids))
            else:
                rng, own = jax.random.split(rng)
                keys = jax.random.split(own, len(ids))
            hide = functools.partial(mask, fraction=self.mask_fraction, gap=gap, vocab_size=config.vocab_size)
            hidden, at, targets = jax.vmap(hide)(keys, ids, free)
            given = {name: batch[name] for name in ("segment_ids", "types", "positions") if name in batch}
            return ModelCall((hidden,), {**given, "at": at}, counted(batch, targets), self.score, rng)

        def score(
            params: Params, stats: Params, batch: Batch, train: bool = False, rng: jax.Array | None = None
        ) -> tuple[Scores, Params]:
            call = ask(batch, rng)
            how: dict[str, Any] = {**call.options, "train": train, "rng": call.rng}
            logits, stats = forward(("model", model), params, stats, *call.inputs, **how)
            return call.score(logits, call.targets), stats

        fields = {"tokens": tokens(data, config.vocab_size), "targets": tokens(data, config.vocab_size, not data.pack)}
        fields |= {**packed(data), "types": tokens(data, optional=True)}
        loss, metrics = scored(score)
        needs = "a token that may be masked: no padding, none of task.keep"
        losses = (Loss("loss", "model", loss),)
        more: dict[str, Any] = {"gap": gap, "ask": ask, "better": OF_LANGUAGE}
        return Task({"model": model}, losses, metrics, fields, "tokens", needs, perplexity, **more)


def mask(
    key: jax.Array, tokens: jax.Array, free: jax.Array, fraction: float, gap: int, vocab_size: int
) -> tuple[jax.Array, ...]:
    """Mask a fraction of one text's tokens; return the text, the positions and their tokens (P,), IGNORED if unused.

    The fraction is of the tokens that are free, rounded, and at least one. Of 10 masked positions 8 get `gap`, one gets
    a random token and one keeps its token (Devlin et al. 2018, section 3.1).
    Shapes: tokens and free (T,); P is the maximum: the fraction of T.
    """
    order, dice, other = jax.random.split(key, 3)
    most = max(1, round(fraction * len(tokens)))
    _, at = jax.lax.top_k(jnp.where(free, jax.random.uniform(order, tokens.shape), -1.0), most)
    count = jnp.minimum(jnp.maximum(jnp.round(fraction * free.sum()), 1), free.sum())
    taken, there = jnp.arange(most) < count, tokens[at]
    chance = jax.random.uniform(dice, (most,))
    noise = jax.random.randint(other, (most,), 0, vocab_size, tokens.dtype)
    instead = jnp.where(chance < 0.8, gap, jnp.where(chance < 0.9, noise, there))
    return tokens.at[at].set(jnp.where(taken, instead, there)), at, jnp.where(taken, there, IGNORED)
