"""Several models in one server: the field `model` of a request says which one answers it."""

from __future__ import annotations

import numpy as np
import pytest

from jaxmodels.cli import main
from jaxmodels.errors import UserError
from jaxmodels.serve.opened import open_models
from tests.serve import test_embeddings as encoders
from tests.serve.serving import live, published


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    published(folder / "llama")
    encoders.published(folder / "bert")
    return folder


def test_each_model_answers_by_its_name_and_refuses_what_is_for_another(folder, monkeypatch):
    monkeypatch.setattr("jaxmodels.serve.embeddings.LENGTHS", ())
    writer, encoder = open_models([f"tiny={folder / 'llama'}", str(folder / "bert")])
    assert (writer.name, encoder.name) == ("tiny", "bert")
    with live(writer, more=[encoder], rows=1, length=32, chunks=(16,)) as running:
        told = running.ask("GET", "/v1/models")[1]["data"]
        assert [each["id"] for each in told] == ["tiny", "bert"]
        assert [each.get("max_model_len") for each in told] == [32, None]
        status, told = running.post("/v1/completions", prompt="a", max_tokens=3, temperature=0)
        assert status == 200 and told["model"] == "tiny" and told["usage"]["completion_tokens"] == 3
        status, told = running.post("/v1/embeddings", model="bert", input="a b")
        assert status == 200 and told["model"] == "bert"
        wanted = encoders.features(encoder, [2, 5, 6, 3]).mean(0)
        np.testing.assert_allclose(told["data"][0]["embedding"], wanted, atol=2e-5)
        status, told = running.post("/v1/embeddings", input="a b")
        assert status == 400 and "got model tiny, a language model" in told["error"]["message"]
        status, told = running.post("/v1/completions", model="third", prompt="a")
        assert status == 404 and "expected one of tiny, bert" in told["error"]["message"]


def test_names_are_before_the_first_sign_of_a_directory_and_may_lie_in_paths(folder):
    (folder / "a=b").symlink_to(folder / "bert")
    names = lambda *given: [each.name for each in open_models([str(each) for each in given])]  # noqa: E731
    assert names(folder / "a=b", f"x={folder / 'bert'}") == ["bert", "x"]
    assert open_models([str(folder / "bert")], "given")[0].name == "given"
    with pytest.raises(UserError, match="got two models of the name bert"):
        names(folder / "bert", f"bert={folder / 'bert'}")
    with pytest.raises(UserError, match="got --name one for 2 models"):
        open_models(["a", "b"], "one")
    with pytest.raises(UserError, match="expected a run directory"):
        names(f"x={folder / 'nothing'}")


def test_lengths_without_a_model_that_writes_are_refused(folder, capsys):
    assert main(["serve", f"x={folder / 'bert'}", "--length", "8", "--port", "0"]) == 2
    assert "got --length for a model that writes no texts" in capsys.readouterr().err
