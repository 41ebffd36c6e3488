"""Text continuation: a prompt to begin with, and what the model generates."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import numpy as np

from jaxmodels.data import Tokenizer
from jaxmodels.errors import UserError
from jaxmodels.generate.sample import sample


def opening(tokenizer: Tokenizer, *wanted: str) -> str:
    """Choose the first of these prompts that the tokenizer has tokens for, or another one: a text begins with a
    token."""
    others = (tokenizer.decode([token]) for token in range(tokenizer.vocab_size))
    for text in itertools.chain(wanted, ("\n", " ", "a", "A", "0"), others):
        with contextlib.suppress(UserError):
            if len(tokenizer.before) + len(tokenizer.encode(text)):
                return text
    return ""


def continued(model: Any, params: Any, tokenizer: Tokenizer, prompt: str, tokens: int, **how: Any) -> str:
    """Return a prompt and its continuation as text, up to the end token."""
    ids, ends = np.append(np.array(tokenizer.before, np.int32), tokenizer.encode(prompt)), tokenizer.special.ends
    if len(ids) and ids.max() >= model.config.vocab_size:
        raise UserError(
            f"got a prompt with token {ids.max()}, expected those of the model, which has {model.config.vocab_size}, "
            "try the tokenizer that it was trained with"
        )
    row = sample(model, params, ids, tokens, ends=ends, **how)[0]
    stops = np.flatnonzero(np.isin(row[len(ids) :], ends))
    return tokenizer.decode(row[len(tokenizer.before) : len(ids) + stops[0] if len(stops) else None])
