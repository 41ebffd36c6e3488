"""An encoder's embeddings are the mean of the features that transformers computes."""

import numpy as np
import pytest

from jaxmodels.serve.embeddings import Embedder
from jaxmodels.serve.opened import open_model
from tests.serve.test_embeddings import TEXTS, published

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="needs the parity extra: torch")
tf = pytest.importorskip("transformers", reason="needs the parity extra: transformers")


def test_the_mean_of_transformers_features_by_hand_is_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxmodels.serve.embeddings.LENGTHS", ())
    directory = published(tmp_path / "tiny")
    tokenizer, model = tf.AutoTokenizer.from_pretrained(directory), tf.AutoModel.from_pretrained(directory)
    given = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        x = model(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).last_hidden_state
    mask = given["attention_mask"][..., None]
    wanted = ((x * mask).sum(1) / mask.sum(1)).numpy()
    embedder = Embedder(open_model(directory).encoder, sizes=(8,))
    embedder.prepare(lambda _: None)
    found = embedder._computed([embedder.row(ids) for ids in embedder.encoder.encode(TEXTS)])
    np.testing.assert_allclose(np.stack(found), wanted, atol=5e-5)
