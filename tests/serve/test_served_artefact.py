"""An artefact that classifies is served as its run is, and any other is refused by what it is."""

from __future__ import annotations

import json
import shutil

import jax
import numpy as np
import pytest

from jaxmodels.errors import UserError
from jaxmodels.serve import artefact
from jaxmodels.serve.classes import Classes
from jaxmodels.serve.opened import open_model
from tests.serve import test_artefact, test_inference
from tests.serve.serving import live


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return test_inference.made(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def folder(run):
    return test_artefact.written(run)


def test_tensors_and_files_get_what_predict_says_of_the_run(run, folder):
    pixels = test_inference.images(3)
    files = [test_inference.png(image) for image in pixels]
    raw = b"".join(len(file).to_bytes(4, "little") + file for file in files)
    tensor = {"name": "inputs", "shape": [3], "datatype": "BYTES", "parameters": {"binary_data_size": len(raw)}}
    head = json.dumps({"inputs": [tensor]}).encode()
    with live(folder) as server:
        for body, size in (
            (test_inference.asked(pixels), {}),
            (head + raw, {"Inference-Header-Content-Length": len(head)}),
        ):
            status, told, _ = server.ask("POST", test_inference.PATH, body, **{k: str(v) for k, v in size.items()})
            assert status == 200
            test_inference.check(run, pixels, test_inference.outputs(told))


def test_texts_are_read_as_the_run_reads_them(tmp_path):
    run = test_artefact.made(tmp_path / "run", "bert-classifier", text=True)
    own, other = Classes.of_run(run), Classes.of_artefact(test_artefact.written(run))
    assert other.kind == own.kind == "text" and other.names == own.names and other.shape == ()
    rows = [other.read(text) for text in ("one two", "six " * 40)]
    for row, text in zip(rows, ("one two", "six " * 40), strict=True):
        for name, x in own.read(text).items():
            np.testing.assert_array_equal(row[name], x)
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    found = jax.jit(other.shares)(other.params, batch)
    np.testing.assert_allclose(found, jax.jit(own.shares)(own.params, batch), atol=1e-5)


def test_what_cannot_be_served_is_refused_by_name(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    told = json.loads((copy / "manifest.json").read_text())
    functions = {"start": told["functions"]["classify"], "step": told["functions"]["classify"]}
    cases = (
        (
            {"functions": functions, "model": "gpt2"},
            "an artefact of a gpt2 that has start, step, expected one that classifies",
        ),
        ({"sounds": {}}, "expected one of texts, images or arrays"),
        ({"jax": {"from": "99.0", "below": "99.1"}}, "expected from 99.0"),
    )
    for change, message in cases:
        (copy / "manifest.json").write_text(json.dumps(artefact.signed({**told, **change})))
        with pytest.raises(UserError, match=message):
            open_model(copy)
    (copy / "manifest.json").write_text(json.dumps(told))
    weights = copy / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match="which is damaged"):
        open_model(copy)
