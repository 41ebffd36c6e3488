"""The benchmark of serving: both sides answer the same requests, and a record says how fast."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks import serve
from tests.serve.serving import live, published


def test_requests_are_answered_in_their_order_and_have_the_lengths_that_were_asked_for(tmp_path):
    """On a server in this process; the record itself is made of these."""
    options = serve.Options(tmp_path, clients=(2,), requests=2, prompt=8, tokens=6)
    asked = serve.prompts(options, 2, 0, 256)
    assert len(asked) == 4 and all(4 <= len(each["prompt"]) <= 8 and 2 <= each["count"] <= 6 for each in asked)
    assert len({tuple(each["prompt"][:4]) for each in asked}) == 4
    with live(published(tmp_path / "tiny"), rows=2, chunks=(16,), length=32) as running:
        running.service.served["model"] = running.service.served["tiny"]
        found = serve.texts(running.port, 2, asked)
        for each, text in zip(asked, found["answers"], strict=True):
            body = {"prompt": each["prompt"], "max_tokens": each["count"], "temperature": 0}
            assert running.post("/v1/completions", **body)[1]["choices"][0]["text"] == text
        with pytest.raises(ValueError, match="400"):
            serve.texts(running.port, 1, [{"prompt": [1] * 40, "count": 4}])
    assert len(found["first"]) == 4 and 0 < np.max(found["first"]) <= found["seconds"]


def test_a_record_compares_each_number_of_clients_with_the_peer(tmp_path, monkeypatch):
    def measured(options, folder):
        row = {"what": "jaxmodels serve", "clients": 1, "unit": "tokens", "speed": 9.0, "ratio": 3.0}
        return [row], ["the peer"]

    monkeypatch.setattr(serve, "language", measured)
    serve.run(serve.Options(tmp_path, out=tmp_path))
    told = json.loads((tmp_path / "serve.json").read_text())
    assert told["rows"][0]["ratio"] == 3.0 and told["notes"][0] == "the peer"
    assert "| jaxmodels serve | 1 | tokens | 9 | 3 |" in (tmp_path / "serve.md").read_text()
