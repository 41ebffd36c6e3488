"""OpenAI's endpoint for embeddings: a vector for each text, from the features of an encoder's tokens."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from jaxmodels.errors import UserError
from jaxmodels.serve.asked import Embed
from jaxmodels.serve.batches import Batches
from jaxmodels.serve.classes import Row
from jaxmodels.serve.errors import Refused
from jaxmodels.serve.opened import Encoder
from jaxmodels.serve.service import Service

SIZES = (1, 8, 32)
LENGTHS = 32, 128, 512, 2048
"""Numbers of tokens, up to the model's longest text, that texts are padded to."""
SMALLEST = 1e-12
"""A vector shorter than this is not scaled to length 1."""


class Embedder(Batches):
    """An encoder, whose outputs are a vector for each text, (B, D)."""

    what, path = "a model that embeds texts", "/v1/embeddings"

    def __init__(self, encoder: Encoder, sizes: Sequence[int] = SIZES) -> None:
        self.encoder = encoder
        self.lengths = [*(n for n in LENGTHS if n < encoder.length), encoder.length]
        super().__init__(self._vectors, encoder.params, [self.row([0] * n) for n in self.lengths], sizes)

    def row(self, ids: Sequence[int]) -> Row:
        """A text's tokens, padded to one of the lengths that are compiled."""
        room = next(n for n in self.lengths if n >= len(ids))
        tokens, segment_ids = np.zeros((2, room), np.int32)
        tokens[: len(ids)], segment_ids[: len(ids)] = ids, 1
        return {"tokens": tokens, "segment_ids": segment_ids}

    def _vectors(self, params: Any, batch: Any) -> jax.Array:
        how, real = self.encoder.sentences, (batch["segment_ids"] > 0)[..., None]
        x = self.encoder.model.apply(params, batch["tokens"], segment_ids=batch["segment_ids"], head=False)
        x = x.astype(jnp.float32)
        if how.pool == "mean":
            x = jnp.mean(x, axis=1, where=real)
        else:
            x = x[:, 0] if how.pool == "cls" else jnp.max(x, axis=1, where=real, initial=-jnp.inf)
        return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), SMALLEST) if how.unit else x


async def embeddings(request: Request) -> Response:
    """A vector for each text."""
    service: Service = request.app.state.service
    asked = Embed.read(await service.body(request))
    embedder = service.batches(asked.model, Embedder)
    texts = await asyncio.to_thread(_ids, embedder.encoder, asked.inputs)
    count = -(-len(texts) // embedder.sizes[-1])  # batches, since texts that come together are computed together
    service.admit(service.find(asked.model), count)
    try:
        found = await service.unless_gone(request, embedder.compute([embedder.row(ids) for ids in texts]))
    finally:
        service.leave(count)
    if not np.isfinite(found).all():
        raise Refused(422, "got texts for which the model gives no finite numbers, expected others")
    read = sum(map(len, texts))
    service.note(request, {"prompt_tokens": read, "completion_tokens": 0})
    data = [
        {"object": "embedding", "index": i, "embedding": written(row, asked.encoding_format)}
        for i, row in enumerate(found)
    ]
    usage = {"prompt_tokens": read, "total_tokens": read}
    return JSONResponse({"object": "list", "data": data, "model": asked.model, "usage": usage})


def written(vector: np.ndarray, form: str) -> list[float] | str:
    """A vector as JSON has it: numbers, or the base64 of float32 in little endian."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode() if form == "base64" else vector.tolist()


def _ids(encoder: Encoder, inputs: Sequence[Any]) -> list[Sequence[int]]:
    """The tokens of each input.

    Raises:
        Refused: one is too long, or the tokenizer or the model does not know it.
    """
    try:
        read = iter(encoder.encode([each for each in inputs if isinstance(each, str)]))
    except UserError as error:
        raise Refused.of(error) from None
    found: list[Sequence[int]] = [next(read) if isinstance(each, str) else each for each in inputs]
    for number, ids in enumerate(found):
        if not len(ids):
            raise Refused(400, f"got input {number} without a token, expected at least one")
        if len(ids) > encoder.length:
            said = f"got input {number} of {len(ids)} tokens, expected at most {encoder.length}"
            raise Refused(400, said, "context_length_exceeded")
        if max(ids) >= (vocabulary := encoder.model.config.vocab_size):
            raise Refused(400, f"got input {number} with token {max(ids)}, expected those below {vocabulary}")
    return found
