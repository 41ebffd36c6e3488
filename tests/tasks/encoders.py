"""Small encoders, examples for them, and a few steps of training: what tests of masked texts and of pairs share."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.config import Contrastive, MaskedLM, Synthetic
from jaxmodels.models.bert import BERTConfig
from jaxmodels.models.clip import CLIPConfig
from jaxmodels.models.vit import ViTConfig
from tests.sections import drawn

B, T, V = 8, 12, 48
SIZE = {"layers": 2, "heads": 4, "width": 32, "mlp_width": 48}
BERT = BERTConfig(vocab_size=V, context=16, **SIZE)
VIT = ViTConfig((8, 8, 3), 4, 5, **SIZE, dropout=0.1)
CLIP = CLIPConfig((8, 8, 3), 4, 2, 4, 32, 48, V, 16, 2, 2, 24, 40, embedding=20)
DATA = Synthetic(seq_len=T, batch_size=B)
MLM = MaskedLM(mask_fraction=0.3)
PAIRS = Contrastive()


def synthetic(task, config, seed=0, rows=B):
    text = hasattr(config, "vocab_size")  # what reads no text has no length of texts
    source = drawn(task, config, batch_size=B, **({"seq_len": T} if text else {}))
    return source.batch(np.arange(rows) + seed * rows, np.zeros(rows, np.int64))


def padded(seed=0):
    """Texts of different lengths."""
    batch = synthetic(MLM, BERT, seed)
    lengths = np.random.default_rng(seed).integers(3, T + 1, (B, 1))
    return {"tokens": batch["tokens"], "segment_ids": (np.arange(T) < lengths).astype(np.int32)}


def learn(task, params, optimizer, rows, steps):
    """Parameters after so many steps on `rows(key)`."""
    moments = optimizer.init(params["model"])

    @jax.jit
    def run(trained, moments):
        def body(carry, key):
            trained, moments = carry

            def mean(trained):
                total, aux = task.losses[0].fn({"model": trained}, {}, rows(key), key)
                return total / aux.weight

            updates, moments = optimizer.update(jax.grad(mean)(trained), moments, trained)
            return (jax.tree.map(jnp.add, trained, updates), moments), None

        return jax.lax.scan(body, (trained, moments), jax.random.split(jax.random.key(1), steps))[0][0]

    return {"model": run(params["model"], moments)}
