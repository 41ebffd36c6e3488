"""Small models, and directories of them in Hugging Face's format."""

import json

import jax
import numpy as np

import jaxmodels
from jaxmodels.hf import save
from jaxmodels.models.gpt2 import GPT2Config
from jaxmodels.models.llama import LlamaConfig

GPT2 = GPT2Config(vocab_size=16, context=8, layers=2, width=16, heads=4)
LLAMA = LlamaConfig(vocab_size=16, layers=2, width=16, heads=4, kv_heads=2, mlp_width=24, tied=True, context=64)


def filled(model, seed=0):
    """Parameters no two of which are alike."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), model.shapes())


def saved(config, folder, **how):
    model = jaxmodels.create(config)
    params = filled(model)
    folder.mkdir(exist_ok=True)
    save.save_pretrained(folder, model, params, **how)
    return model, params


def change(folder, **settings):
    """Rewrite config.json; None removes a setting."""
    path = folder / "config.json"
    values = {**json.loads(path.read_text()), **settings}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)
