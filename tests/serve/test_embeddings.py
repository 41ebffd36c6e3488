"""Embeddings: what an encoder and the files beside it mean, whatever texts are computed together."""

from __future__ import annotations

import base64
import concurrent.futures
import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxmodels import create
from jaxmodels.cli import main
from jaxmodels.errors import UserError
from jaxmodels.hf import sentences
from jaxmodels.hf.save import save_pretrained
from jaxmodels.models.bert import BERTConfig
from jaxmodels.serve.embeddings import Embedder
from jaxmodels.serve.metrics import compilations
from jaxmodels.serve.opened import open_model
from jaxmodels.serve.service import Limits
from tests.serve.serving import live

CONFIG = BERTConfig(vocab_size=32, context=48, layers=2, heads=2, width=16, mlp_width=24, head="none")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxy", "query", ":"]
TEXTS = ["a b c", "q", "x y a b c d e f g h i j k l m n o p q r s t u v w x y a b c d e f", "d Z", "b"]
PARTS = "sentence_transformers.models."


def published(where, config=CONFIG, **pooling):
    """A tiny encoder; with `pooling`, as sentence-transformers saves it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    where.mkdir()
    rust = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]"))
    rust.pre_tokenizer = pre_tokenizers.Whitespace()
    rust.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    rust.save(str(where / "tokenizer.json"))
    (where / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]"})
    )
    model, rng = create(config), np.random.default_rng(0)
    save_pretrained(where, model, jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), model.shapes()))
    if pooling:
        kinds = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
        steps = [{"idx": i, "path": at, "type": PARTS + kind} for i, (kind, at) in enumerate(kinds.items())]
        (where / "modules.json").write_text(json.dumps(steps))
        (where / "1_Pooling").mkdir()
        (where / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 16, **pooling}))
        (where / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 40, "do_lower_case": True}))
        (where / "config_sentence_transformers.json").write_text(
            json.dumps({"prompts": {"query": "query: "}, "default_prompt_name": "query"})
        )
    return where


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return published(tmp_path_factory.mktemp("plain") / "tiny")


@pytest.fixture(scope="module")
def running(directory):
    with live(directory, Limits(queue=80)) as server:
        yield server


def features(opened, ids):
    """The features of a text's tokens, computed for it alone, (T, D)."""
    encoder = opened.encoder
    return np.asarray(encoder.model.apply(encoder.params, np.array([ids]), head=False)[0])


def vectors(told):
    assert [each["index"] for each in told["data"]] == list(range(len(told["data"])))
    return np.array([each["embedding"] for each in told["data"]])


def test_a_vector_is_the_mean_of_the_tokens_of_a_text_whatever_comes_with_it(running):
    opened = running.service.served["tiny"].opened
    status, told = running.post("/v1/embeddings", input=TEXTS)
    assert status == 200 and told["object"] == "list" and told["model"] == "tiny"
    assert {each["object"] for each in told["data"]} == {"embedding"}
    ids = [[2, *(WORDS.index(word) if word in WORDS else 1 for word in text.split()), 3] for text in TEXTS]
    wanted = [features(opened, each).mean(0) for each in ids]
    np.testing.assert_allclose(vectors(told), wanted, atol=2e-5)
    assert told["usage"] == {"prompt_tokens": sum(map(len, ids)), "total_tokens": sum(map(len, ids))}
    alone = running.post("/v1/embeddings", input=TEXTS[3])[1]
    np.testing.assert_allclose(vectors(alone)[0], wanted[3], atol=2e-5)
    np.testing.assert_allclose(vectors(running.post("/v1/embeddings", input=ids)[1]), wanted, atol=2e-5)
    np.testing.assert_allclose(vectors(running.post("/v1/embeddings", input=ids[0])[1])[0], wanted[0], atol=2e-5)


def test_requests_at_once_share_batches_and_compile_nothing(running):
    before, batches = compilations(), running.service.served["tiny"].batches
    rows = batches.rows
    many = [[TEXTS[i % 5]] * (1 + 13 * i) for i in range(8)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda texts: running.post("/v1/embeddings", input=texts), many))
    assert compilations() == before and batches.rows - rows == sum(map(len, many))
    one = vectors(running.post("/v1/embeddings", input=TEXTS)[1])
    for i, (status, told) in enumerate(found):
        assert status == 200
        np.testing.assert_allclose(vectors(told), one[[i % 5] * len(many[i])], atol=2e-5)


def test_base64_has_the_same_numbers_and_the_official_client_reads_it(running):
    plain = vectors(running.post("/v1/embeddings", input=TEXTS)[1]).astype(np.float32)
    coded = running.post("/v1/embeddings", input=TEXTS, encoding_format="base64")[1]["data"]
    assert [base64.b64decode(each["embedding"]) for each in coded] == [row.astype("<f4").tobytes() for row in plain]
    openai = pytest.importorskip("openai", reason="needs the package openai")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{running.port}/v1", api_key="none", max_retries=0)
    told = client.embeddings.create(model="tiny", input=TEXTS)  # which asks for base64
    np.testing.assert_array_equal(np.array([each.embedding for each in told.data], np.float32), plain)
    with pytest.raises(openai.BadRequestError, match="got dimensions, which is not computed here"):
        client.embeddings.create(model="tiny", input=TEXTS, dimensions=8)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"input": ""}, "got input '', expected a text"),
        ({"input": []}, "got input []"),
        ({"input": ["a", ""]}, "none empty"),
        ({"input": ["a", 3]}, "got input ['a', 3]"),
        ({"input": {"text": "a"}}, "expected a text, a list of token ids"),
        ({"input": ["a"] * 2049}, "a list of up to 2,048"),
        ({"input": ["b", "a " * 47]}, "got input 1 of 49 tokens, expected at most 48"),
        ({"input": [[1, 32]]}, "token 32, expected those below 32"),
        ({"input": "a", "encoding_format": "int8"}, "got encoding_format 'int8'"),
        ({"input": "\ud800"}, "surrogate"),
        ({"input": "a", "truncate": True}, "got field 'truncate'"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_mistake_is_one_clear_line(running, body, message):
    status, told = running.post("/v1/embeddings", **body)
    assert status == 400 and message in told["error"]["message"]


def test_a_model_of_another_kind_is_refused_with_the_path_for_it(running):
    status, told = running.post("/v1/completions", prompt="a")
    assert status == 400 and "got model tiny, a model that embeds texts" in told["error"]["message"]
    assert "try /v1/embeddings" in told["error"]["message"]


@pytest.mark.parametrize("pool", ["mean", "cls", "max"])
def test_the_files_of_sentence_transformers_say_how_a_text_is_read_and_pooled(directory, tmp_path, pool, monkeypatch):
    """A prompt, lower case, the pooling and the length 1; kept by an import, and by an export of that."""
    monkeypatch.setattr("jaxmodels.serve.embeddings.LENGTHS", ())
    place = published(tmp_path / "in", **{sentences._SWITCHES[pool]: True})
    opened = open_model(place)
    assert opened.encoder.length == 40
    texts = ["A b", "c D e"]
    ids = [[2, 30, 31, 5, 6, 3], [2, 30, 31, 7, 8, 9, 3]]
    assert opened.encoder.encode(texts) == ids
    reduce = {"mean": lambda x: x.mean(0), "cls": lambda x: x[0], "max": lambda x: x.max(0)}[pool]
    wanted = np.stack([reduce(features(opened, each)) for each in ids])
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)

    def computed(opened):
        embedder = Embedder(opened.encoder, sizes=(2,))
        embedder.prepare(lambda _: None)
        return np.stack(embedder._computed([embedder.row(ids) for ids in opened.encoder.encode(texts)]))

    np.testing.assert_allclose(computed(opened), wanted, atol=2e-6)
    if pool == "mean":
        assert main(["import", str(place), "--out", str(tmp_path / "run")]) == 0
        np.testing.assert_allclose(computed(open_model(tmp_path / "run")), wanted, atol=2e-6)
        assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
        assert sentences.read(tmp_path / "out") == opened.encoder.sentences


@pytest.mark.parametrize(
    ("file", "value", "message"),
    [
        ("modules.json", [{"type": PARTS + "Transformer", "path": ""}, {"type": PARTS + "Dense", "path": "2_Dense"}],
         "with Transformer, Dense, expected Transformer, Pooling and maybe Normalize"),
        ("modules.json", {"type": 3}, "expected the modules of sentence-transformers"),
        ("modules.json", [{"type": "Transformer", "path": ""}, {"type": "Pooling", "path": "../x"}], "a folder beside"),
        ("1_Pooling/config.json", {"pooling_mode_lasttoken": True}, "got pooling pooling_mode_lasttoken"),
        ("1_Pooling/config.json", {"pooling_mode": "weightedmean"}, "got pooling weightedmean"),
        ("1_Pooling/config.json", {"pooling_mode_mean_tokens": True, "include_prompt": False}, "include_prompt false"),
        ("sentence_bert_config.json", {"max_seq_length": 0}, "got max_seq_length 0"),
        ("config_sentence_transformers.json", {"default_prompt_name": "x"}, "expected one of its prompts"),
    ],
)  # fmt: skip
def test_what_is_not_computed_is_refused_by_name(tmp_path, file, value, message):
    place = published(tmp_path / "in", pooling_mode_mean_tokens=True)
    (place / file).write_text(json.dumps(value))
    with pytest.raises(UserError, match=message):
        open_model(place)


def test_an_encoder_with_a_head_for_another_use_is_refused(tmp_path):
    place = published(tmp_path / "in", replace(CONFIG, head="spans"))
    with pytest.raises(UserError, match="expected a language model or an encoder of texts"):
        open_model(place)
