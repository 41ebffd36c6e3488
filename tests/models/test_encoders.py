"""BERT, ViT and CLIP: padding, packing, heads, patches, the end of a text, initial deviations, refusals."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmodels
from jaxmodels.errors import UserError
from jaxmodels.models.bert import BERTConfig
from jaxmodels.models.clip import CLIPConfig
from jaxmodels.models.vit import ViTConfig
from tests.zoo import arrays

B, T, V = 4, 12, 48
SIZE = {"layers": 2, "heads": 4, "width": 32, "mlp_width": 48}
BERT = BERTConfig(vocab_size=V, context=16, **SIZE)
VIT = ViTConfig((8, 12, 3), 4, 5, **SIZE)
CLIP = CLIPConfig((8, 8, 3), 4, 2, 4, 32, 48, V, 16, 2, 2, 24, 40, embedding=20)


@pytest.fixture(scope="module")
def of():
    """A model, parameters of which each one matters, and its compiled `apply`."""

    @functools.cache
    def make(config):
        model = jaxmodels.create(config)
        return model, arrays(model), jax.jit(model.apply, static_argnames=("head", "train"))

    return make


def texts(seed=0):
    return np.random.default_rng(seed).integers(1, V, (B, T)).astype(np.int32)


def images(config, seed=0):
    return np.random.default_rng(seed).random((B, *config.input_shape), np.float32)


def close(a, b, atol=1e-5):
    np.testing.assert_allclose(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("name", "count"),
    {
        # transformers' BertForMaskedLM, timm's models of the same names, OpenAI's checkpoints
        "bert-base": 109_514_298,
        "bert-large": 335_174_458,
        "bert-base-cased": 108_340_804,
        "bert-large-cased": 333_610_308,
        "vit-ti16": 5_717_416,
        "vit-s16": 22_050_664,
        "vit-b16": 86_567_656,
        "vit-l16": 304_326_632,
        "vit-ti32": 6_131_560,
        "vit-s32": 22_878_952,
        "vit-b32": 88_224_232,
        "vit-l32": 306_535_400,
        "clip-vit-b32": 151_277_313,
        "clip-vit-b16": 149_620_737,
        "clip-vit-l14": 427_616_513,
    }.items(),
)
def test_presets_have_the_published_sizes(name, count):
    assert jaxmodels.create(name).count() == count


def test_what_stands_in_padding_changes_nothing(of):
    _, params, apply = of(BERT)
    ids = (np.arange(T) < np.array([[12], [7], [3], [9]])).astype(np.int32)
    tokens = texts()
    other = np.where(ids == 1, tokens, texts(1))
    a, b = (apply(params, x, segment_ids=ids) for x in (tokens, other))
    close(a[ids == 1], b[ids == 1])
    assert np.abs(apply(params, tokens) - apply(params, other))[ids == 1].max() > 1e-2, "without ids it does"
    close(apply(params, tokens[2:3, :3]), a[2:3, :3])


def test_texts_packed_into_a_row_are_as_if_alone(of):
    _, params, apply = of(BERT)
    tokens = texts()[:1]
    ids = np.array([[1] * 5 + [2] * 4 + [0] * 3], np.int32)
    positions = np.array([[*range(5), *range(4), *range(3)]], np.int32)
    packed = apply(params, tokens, segment_ids=ids, positions=positions)
    close(packed[:, :5], apply(params, tokens[:, :5]))
    close(packed[:, 5:9], apply(params, tokens[:, 5:9]))


def test_token_types_are_the_first_where_none_are_given(of):
    _, params, apply = of(BERT)
    tokens = texts()
    close(apply(params, tokens), apply(params, tokens, types=np.zeros_like(tokens)), 0)
    assert np.abs(apply(params, tokens) - apply(params, tokens, types=np.ones_like(tokens))).max() > 1e-2


def test_logits_at_places_are_those_of_all_places(of):
    _, params, apply = of(BERT)
    tokens, at = texts(), np.array([[3, 0], [11, 11], [2, 5], [7, 6]])
    expected = np.take_along_axis(np.asarray(apply(params, tokens)), at[..., None], 1)
    close(apply(params, tokens, at=at), expected)


def test_each_head_has_its_own_outputs_and_parameters_over_the_same_encoder(of):
    tokens = texts()
    trunk = {"embed", "positions", "types", "embed_norm", "layers"}
    restoring = {"transform", "transform_norm", "output"}
    _, params, apply = of(BERT)
    assert set(params) == trunk | restoring
    features = apply(params, tokens, head=False)
    assert features.shape == (B, T, 32)
    shared = {name: params[name] for name in trunk}
    expected = {
        "classification": ({"pooler", "head"}, [(B, 5)]),
        "pretraining": ({"pooler", "next_sentence"} | restoring, [(B, T, V), (B, 2)]),
        "none": ({"pooler"}, [(B, T, 32), (B, 32)]),
    }
    for head, (names, shapes) in expected.items():
        _, own, apply = of(dataclasses.replace(BERT, head=head, classes=5 if head == "classification" else None))
        assert set(own) == trunk | names
        out = apply({**own, **shared}, tokens)
        assert [x.shape for x in jax.tree.leaves(out)] == shapes
        assert {x.dtype for x in jax.tree.leaves(out)} == {np.dtype("float32")}
        close(apply({**own, **shared}, tokens, head=False), features)
        if head == "none":
            close(out[0], features)
            close(out[1], np.tanh(features[:, 0] @ own["pooler"]["w"] + own["pooler"]["b"]))


def test_mean_pooling_takes_the_tokens_of_a_text_and_not_its_padding(of):
    _, params, apply = of(dataclasses.replace(BERT, head="none", pool="mean"))
    tokens, ids = texts(), np.where(np.arange(T) < np.array([[T], [T], [5], [1]]), 1, 0)
    features, pooled = apply(params, tokens, segment_ids=ids)
    means = np.stack([np.asarray(x)[row > 0].mean(0) for x, row in zip(features, ids, strict=True)])
    close(pooled, np.tanh(means @ params["pooler"]["w"] + params["pooler"]["b"]))
    features, pooled = apply(params, tokens)
    close(pooled, np.tanh(features.mean(1) @ params["pooler"]["w"] + params["pooler"]["b"]))


def test_patches_are_those_of_a_convolution(of):
    """Window and stride are the patch: the same weights, another order of computing."""
    _, params, apply = of(dataclasses.replace(VIT, layers=1))
    params = {**params, "layers": jax.tree.map(jnp.zeros_like, params["layers"])}  # blocks that add nothing
    x = images(VIT)
    patches = jax.lax.conv_general_dilated(
        x, params["patches"]["w"], (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    ).reshape(B, 6, 32)
    rows = patches + params["patches"]["b"] + params["positions"]["w"][1:]
    mean_params = {name: leaf for name, leaf in params.items() if name != "class_token"}
    mean_params["positions"] = {"w": params["positions"]["w"][1:]}
    _, _, mean = of(dataclasses.replace(VIT, layers=1, pool="mean"))

    def norm(y):
        y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6)
        return y * params["norm"]["scale"] + params["norm"]["bias"]

    close(mean(mean_params, x, head=False), norm(rows).mean(1))
    token = params["class_token"]["w"] + params["positions"]["w"][:1]
    close(apply(params, x, head=False), np.broadcast_to(norm(token), (B, 32)))


def test_a_class_token_sees_every_patch_and_a_mean_has_none(of):
    for pool in ("class", "mean"):
        model, params, _ = of(dataclasses.replace(VIT, pool=pool))
        x = jnp.asarray(images(VIT))
        slope = jax.jit(jax.grad(lambda x, model=model, params=params: (model.apply(params, x) ** 2).sum()))(x)
        assert (np.abs(slope).reshape(B, 2, 4, 3, 4, 3).max((2, 4, 5)) > 1e-6).all()
        assert ("class_token" in params) == (pool == "class")
        assert params["positions"]["w"].shape == (7 if pool == "class" else 6, 32)


def test_clip_gives_unit_vectors_and_each_tower_runs_alone(of):
    _, params, apply = of(CLIP)
    x, tokens = images(CLIP), texts()
    seen, read, scale = apply(params, x, tokens)
    assert seen.shape == read.shape == (B, 20) and scale.shape == ()
    for vectors in (seen, read):
        close(np.linalg.norm(vectors, axis=-1), np.ones(B))
    one, none, _ = apply(params, x, None)
    close(one, seen)
    assert none is None
    none, other, _ = apply({name: params[name] for name in ("text", "scale")}, None, tokens)
    close(other, read)
    assert none is None


def test_a_text_is_read_out_at_its_end_and_sees_nothing_behind_it(of):
    tokens = texts() % 40
    tokens[:, 4], tokens[:, 9] = 45, 45
    for end, pooled, ends in ((None, 45, 4), (41, 41, 6)):
        _, params, apply = of(dataclasses.replace(CLIP, end_token=end))
        row = tokens.copy()
        row[:, 6] = 41
        assert row[0, ends] == pooled
        expected = apply(params, None, row)[1]
        behind, before = row.copy(), row.copy()
        behind[:, ends + 1 :] = np.where(row[:, ends + 1 :] == 41, 41, (row[:, ends + 1 :] + 3) % 40)
        before[:, ends - 1] = (row[:, ends - 1] + 3) % 40
        close(apply(params, None, behind)[1], expected)
        assert np.abs(apply(params, None, before)[1] - expected).max() > 1e-2
        close(apply(params, None, row[:, : ends + 1])[1], expected)


def deviation(x):
    return float(np.std(np.asarray(x)))


def test_initial_deviations_of_bert_and_vit_are_those_of_transformers():
    wide = {"layers": 2, "width": 128, "heads": 4, "mlp_width": 96}
    for config in (
        BERTConfig(vocab_size=200, context=64, types=32, head="pretraining", **wide),
        ViTConfig((32, 32, 3), 4, 64, **wide),
    ):
        params = jax.jit(jaxmodels.create(config).init)(jax.random.key(0))
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            if path[-1].key == "w":
                few = leaf.size < 1000
                assert deviation(leaf) == pytest.approx(0.02, rel=0.2 if few else 0.06), path
            else:
                assert (np.asarray(leaf) == (path[-1].key == "scale")).all(), path


def test_initial_deviations_of_clip_are_those_of_transformers():
    config = CLIPConfig((32, 32, 3), 4, 3, 4, 128, 96, 200, 64, 5, 4, 96, 128, embedding=80)
    params = jax.jit(jaxmodels.create(config).init)(jax.random.key(0))
    for tower, width, depth in (("image", 128, 3), ("text", 96, 5)):
        inner = (2 * width * depth) ** -0.5
        blocks = params[tower]["layers"]
        found = {
            **{f"attn/{name}": (blocks["attn"][name]["w"], inner) for name in "qkv"},
            "attn/o": (blocks["attn"]["o"]["w"], width**-0.5),
            "mlp/up": (blocks["mlp"]["up"]["w"], (2 * width) ** -0.5),
            "mlp/down": (blocks["mlp"]["down"]["w"], inner),
            "projection": (params[tower]["projection"]["w"], width**-0.5),
            "positions": (params[tower]["positions"]["w"], 0.02),
        }
        for name, (leaf, expected) in found.items():
            assert deviation(leaf) == pytest.approx(expected, rel=0.04), (tower, name)
    assert deviation(params["image"]["patches"]["w"]) == pytest.approx(0.02, rel=0.04)
    assert deviation(params["image"]["class_token"]["w"]) == pytest.approx(128**-0.5, rel=0.25)
    assert deviation(params["text"]["embed"]["w"]) == pytest.approx(0.02, rel=0.04)
    assert float(params["scale"]["log"]) == pytest.approx(np.log(1 / 0.07), abs=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BERTConfig(heads=5), "got width 768 with heads 5"),
        (lambda: BERTConfig(head="classification"), "with classes None, .*try --model.classes 2"),
        (lambda: BERTConfig(classes=3), "got head masked_lm with classes 3, .*try --model.head classification"),
        (lambda: ViTConfig(patch=15), "got patch 15 with images of 224x224, .*try --model.patch 14"),
        (lambda: ViTConfig(patch=0), "got model.patch 0.*try --model.patch 1"),
        (lambda: ViTConfig((224, 200, 3)), "got patch 16 with images of 224x200, .*try --model.patch 8"),
        (lambda: ViTConfig(heads=7), "got width 768 with heads 7"),
        (lambda: CLIPConfig(patch=33), "got patch 33"),
        (lambda: CLIPConfig(image_heads=7), "got image_width 768 with image_heads 7"),
        (lambda: CLIPConfig(text_heads=7), "got text_width 512 with text_heads 7"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_inputs_that_do_not_fit_are_refused(of):
    long = np.zeros((1, 17), np.int32)
    for config, inputs, message in (
        (BERT, (long,), "got 17 tokens, expected at most the model's context of 16"),
        (CLIP, (None, long), "got 17 tokens, expected at most the model's context of 16"),
        (CLIP, (np.zeros((1, 8, 4, 3)), None), r"got inputs of shape \(8, 4, 3\), expected \(8, 8, 3\)"),
        (VIT, (np.zeros((1, 12, 8, 3)),), r"got inputs of shape \(12, 8, 3\), expected \(8, 12, 3\)"),
    ):
        model, params, _ = of(config)
        with pytest.raises(UserError, match=message):
            model.apply(params, *inputs)
