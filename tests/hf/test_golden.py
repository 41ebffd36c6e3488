"""Small models that transformers wrote (tests/golden/make.py) give its outputs here, and go out as they came."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxmodels
from jaxmodels import hf
from jaxmodels.hf import save

GOLDEN = Path(__file__).parents[1] / "golden"
FOLDERS = sorted(path.parent for path in GOLDEN.glob("*/expected.npz"))


@pytest.fixture(scope="module", params=FOLDERS, ids=lambda folder: folder.name)
def case(request):
    return request.param, *jaxmodels.load_pretrained(request.param)


def test_there_is_one_of_every_model_type():
    kinds = {json.loads((folder / "config.json").read_text())["model_type"] for folder in FOLDERS}
    assert kinds == {kind for kinds in hf.supported().values() for kind in kinds}
    assert sum(path.stat().st_size for path in GOLDEN.rglob("*") if path.is_file()) < 800_000


def test_outputs_are_those_of_transformers(case):
    folder, model, params = case
    arrays = np.load(folder / "expected.npz")
    inputs = {name.removeprefix("in/"): arrays[name] for name in arrays.files if name.startswith("in/")}
    positional = [inputs.pop(str(i)) for i in range(len(inputs)) if str(i) in inputs]
    stats = model.stats()
    out = jax.jit(model.apply)(params, *positional, **inputs, **({"stats": stats} if stats else {}))
    expected = [arrays[name] for name in arrays.files if name.startswith("out/")]
    out = out[0] if stats else out
    for found, wanted in zip(jax.tree.leaves(out), expected, strict=True):
        told = ~np.isnan(wanted)
        assert np.abs(wanted[told]).max() > 0.05
        np.testing.assert_allclose(np.asarray(found)[told], wanted[told], rtol=0, atol=1e-4)


def test_what_was_imported_is_exported_byte_for_byte(case, tmp_path):
    folder, model, params = case
    save.save_pretrained(tmp_path, model, params)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert set(after) == set(before)
    for name, tensor in after.items():
        assert tensor.tobytes() == before[name].tobytes(), name
    assert (tmp_path / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert jaxmodels.load_pretrained(tmp_path)[0].config == model.config
