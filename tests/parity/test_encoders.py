"""BERT, ViT and CLIP equal transformers' with the same weights: outputs, and the gradients of their losses."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmodels
from jaxmodels import tasks
from jaxmodels.config import Contrastive, QuestionAnswering, Stdlib
from jaxmodels.data.contract import IGNORED
from jaxmodels.models.bert import BERTConfig
from jaxmodels.models.clip import CLIPConfig
from jaxmodels.models.vit import ViTConfig

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="needs the parity extra: torch")
transformers = pytest.importorskip("transformers", reason="needs the parity extra: transformers")

# at these shapes LLVM's optimizations take longer than all else
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
B, T, V = 4, 13, 37
SIZE = {"layers": 2, "heads": 3, "width": 21, "mlp_width": 29}
BERT = BERTConfig(vocab_size=V, context=17, types=3, **SIZE)
HEADS = {
    "masked_lm": (BERT, "BertForMaskedLM"),
    "classification": (dataclasses.replace(BERT, head="classification", classes=5), "BertForSequenceClassification"),
    "pretraining": (dataclasses.replace(BERT, head="pretraining"), "BertForPreTraining"),
    "spans": (dataclasses.replace(BERT, head="spans"), "BertForQuestionAnswering"),
    "none": (dataclasses.replace(BERT, head="none"), "BertModel"),
}
VIT = ViTConfig((20, 20, 2), 5, 7, **SIZE)
CLIP = CLIPConfig((14, 14, 3), 7, 2, 3, 21, 29, V, 17, 2, 2, 18, 23, embedding=11)


def sizes(config, prefix=""):
    """The numbers of a stack, as transformers names them."""
    get = lambda name: getattr(config, prefix + name)  # noqa: E731
    return {
        "num_hidden_layers": get("layers"),
        "num_attention_heads": get("heads"),
        "hidden_size": get("width"),
        "intermediate_size": get("mlp_width"),
        "layer_norm_eps": config.norm_eps,
    }


def randomize(model):
    """Weights of which each one matters."""
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        norm = p.ndim == 1 and name.endswith("weight")
        spread = 0.2 if p.ndim < 2 else 1.0 if "embed" in name and p.ndim != 4 else p[0].numel() ** -0.5
        p.data = spread * torch.randn_like(p) + norm
    return model.eval()


def bert(config, name):
    theirs = transformers.BertConfig(
        vocab_size=V,
        max_position_embeddings=config.context,
        type_vocab_size=config.types,
        num_labels=config.classes or 2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=None,
        **sizes(config),
    )
    return randomize(getattr(transformers, name)(theirs))


def vit(config):
    theirs = transformers.ViTConfig(
        image_size=config.input_shape[0],
        num_channels=config.input_shape[2],
        patch_size=config.patch,
        num_labels=config.classes,
        **sizes(config),
    )
    return randomize(transformers.ViTForImageClassification(theirs))


def clip(config):
    image = {"image_size": config.input_shape[0], "patch_size": config.patch, "projection_dim": config.embedding}
    text = {"vocab_size": V, "max_position_embeddings": config.context, "projection_dim": config.embedding}
    text["eos_token_id"] = 2 if config.end_token is None else config.end_token  # 2: what configs said by mistake
    theirs = transformers.CLIPConfig(
        vision_config={**image, **sizes(config, "image_")},
        text_config={**text, **sizes(config, "text_")},
        projection_dim=config.embedding,
    )
    return randomize(transformers.CLIPModel(theirs))


BLOCKS = {
    "bert": {
        "attention.self.query": "attn/q",
        "attention.self.key": "attn/k",
        "attention.self.value": "attn/v",
        "attention.output.dense": "attn/o",
        "attention.output.LayerNorm": "attn_norm",
        "intermediate.dense": "mlp/up",
        "output.dense": "mlp/down",
        "output.LayerNorm": "mlp_norm",
    },
    "vit": {
        "layernorm_before": "attn_norm",
        **{f"attention.{name}_proj": f"attn/{name}" for name in "qkvo"},
        "layernorm_after": "mlp_norm",
        "mlp.fc1": "mlp/up",
        "mlp.fc2": "mlp/down",
    },
    "clip": {
        "layer_norm1": "attn_norm",
        **{f"self_attn.{name}_proj": f"attn/{name}" for name in "qkv"},
        "self_attn.out_proj": "attn/o",
        "layer_norm2": "mlp_norm",
        "mlp.fc1": "mlp/up",
        "mlp.fc2": "mlp/down",
    },
}
OTHERS = {
    "bert.embeddings.word_embeddings": "embed",
    "bert.embeddings.position_embeddings": "positions",
    "bert.embeddings.token_type_embeddings": "types",
    "bert.embeddings.LayerNorm": "embed_norm",
    "bert.pooler.dense": "pooler",
    "cls.predictions.transform.dense": "transform",
    "cls.predictions.transform.LayerNorm": "transform_norm",
    "cls.predictions": "output",
    "cls.seq_relationship": "next_sentence",
    "classifier": "head",
    "qa_outputs": "spans",
    "vit.embeddings.patch_embeddings.projection": "patches",
    "vit.layernorm": "norm",
    "vision_model.embeddings.patch_embedding": "image/patches",
    "vision_model.embeddings.position_embedding": "image/positions",
    "vision_model.pre_layrnorm": "image/embed_norm",
    "vision_model.post_layernorm": "image/norm",
    "visual_projection": "image/projection",
    "text_model.embeddings.token_embedding": "text/embed",
    "text_model.embeddings.position_embedding": "text/positions",
    "text_model.final_layer_norm": "text/norm",
    "text_projection": "text/projection",
}
LONE = {
    "vit.embeddings.cls_token": "class_token/w",
    "vit.embeddings.position_embeddings": "positions/w",
    "vision_model.embeddings.class_embedding": "image/class_token/w",
    "logit_scale": "scale/log",
}


def ours(model, reference, of=lambda p: p):
    """Parameters of a reference, or their gradients, in our tree."""
    shapes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): x.shape
        for path, x in jax.tree_util.tree_leaves_with_path(model.shapes())
    }
    found = {}
    tables = ("embed", "positions", "types")
    for name, p in reference.named_parameters():
        name = f"bert.{name}" if isinstance(reference, transformers.BertModel) else name
        x = np.array(of(p).detach().numpy())
        if name in LONE:
            found[LONE[name]] = x.reshape(shapes[LONE[name]])
            continue
        owner, _, leaf = name.rpartition(".")
        index = None
        if block := re.fullmatch(r"(\w+)(?:\.encoder)?\.layers?\.(\d+)\.(.+)", owner):
            family, tower = {"vision_model": ("clip", "image/"), "text_model": ("clip", "text/")}.get(
                block[1], (block[1], "")
            )
            index, path = int(block[2]), f"{tower}layers/{BLOCKS[family][block[3]]}"
        else:
            path = OTHERS[owner]
        kind = path.rsplit("/", 1)[-1]
        if "norm" in kind:
            path += {"weight": "/scale", "bias": "/bias"}[leaf]
        else:
            path += {"weight": "/w", "bias": "/b"}[leaf]
        if x.ndim == 4:
            x = x.transpose(2, 3, 1, 0)
        elif x.ndim == 2 and kind not in tables:
            x = x.T
        if index is None:
            found[path] = x.reshape(shapes[path])
        else:
            found.setdefault(path, np.zeros(shapes[path], np.float32))[index] = x.reshape(shapes[path][1:])
    assert {path: x.shape for path, x in found.items()} == shapes, "each parameter has its place"
    tree = {}
    for path, x in found.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = jnp.asarray(x)
    return tree


def close(got, expected, atol=1e-4):
    expected = expected.detach().numpy()
    assert expected.std() > 0.05, "something to compare"
    np.testing.assert_allclose(got, expected, rtol=0, atol=atol)


def texts(seed=0, vocab=V):
    rng = np.random.default_rng(seed)
    ids = (np.arange(T) < rng.integers(3, T + 1, (B, 1))).astype(np.int32)
    return rng.integers(0, vocab, (B, T)).astype(np.int32), ids, rng.integers(0, 3, (B, T)).astype(np.int32)


def tensor(x):
    return torch.from_numpy(np.asarray(x)) if x.dtype == np.float32 else torch.from_numpy(np.asarray(x)).long()


@pytest.mark.parametrize("kernel", ["xla", "blockwise"])
@pytest.mark.parametrize("name", HEADS)
def test_bert_equals_transformers_with_padding_and_token_types(name, kernel):
    config, kind = HEADS[name]
    reference, model = bert(config, kind), jaxmodels.create(config, attention=kernel)
    params, (tokens, ids, types) = ours(model, reference), texts()
    with torch.no_grad():
        expected = reference(tensor(tokens), attention_mask=tensor(ids), token_type_ids=tensor(types))
        plain = reference(tensor(tokens))
    apply = jit(model.apply)
    got, alone = apply(params, tokens, segment_ids=ids, types=types), apply(params, tokens)
    outputs = {
        "masked_lm": ("logits",),
        "classification": ("logits",),
        "pretraining": ("prediction_logits", "seq_relationship_logits"),
        "spans": ("start_logits", "end_logits"),
        "none": ("last_hidden_state", "pooler_output"),
    }[name]
    if name == "spans":
        got, alone = (tuple(np.moveaxis(x, -1, 0)) for x in (got, alone))
    for key, a, b in zip(outputs, *((x if isinstance(x, tuple) else (x,)) for x in (got, alone)), strict=True):
        real = ids.astype(bool) if a.shape[:2] == ids.shape else slice(None)
        close(np.asarray(a)[real], expected[key][torch.from_numpy(real) if isinstance(real, np.ndarray) else real])
        close(b, plain[key])


def test_the_loss_of_question_answering_and_its_gradients_are_those_of_transformers():
    config, kind = HEADS["spans"]
    reference, model = bert(config, kind), jaxmodels.create(config)
    params, (tokens, _, types) = ours(model, reference), texts()
    starts, ends = np.array([0, 2, 1, IGNORED], np.int32), np.array([0, 2, 2, IGNORED], np.int32)
    # which ignores the place T
    theirs = [tensor(np.where(x == IGNORED, T, x)) for x in (starts, ends)]
    given = {"token_type_ids": tensor(types), "start_positions": theirs[0], "end_positions": theirs[1]}
    expected = reference(tensor(tokens), **given).loss
    expected.backward()
    task = tasks.build(QuestionAnswering(), model.config, Stdlib(seq_len=T))

    def batch(pad):
        texts = {name: np.pad(x, [(0, 0), (0, pad)]) for name, x in (("tokens", tokens), ("types", types))}
        return {
            **texts,
            "segment_ids": np.pad(np.ones_like(tokens), [(0, 0), (0, pad)]),
            "starts": starts,
            "ends": ends,
        }

    def loss(params, batch):
        found = task.metrics({"model": params}, {}, batch)["loss"]
        return found[0] / found[1]

    wanted = ours(model, reference, lambda p: torch.zeros_like(p) if p.grad is None else p.grad)
    for pad in (0, 3):  # transformers counts what fills up a row among the places of an answer
        value, gradient = jit(jax.value_and_grad(loss))(params, batch(pad))
        assert float(value) == pytest.approx(expected.item(), abs=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5), gradient, wanted)


def test_the_gradients_of_masked_language_modeling_are_those_of_transformers():
    reference, model = bert(BERT, "BertForMaskedLM"), jaxmodels.create(BERT)
    params, (tokens, ids, types) = ours(model, reference), texts()
    at = np.array([[0, 2], [1, 0], [2, 1], [0, 1]])
    labels = np.full((B, T), -100)
    np.put_along_axis(labels, at, np.take_along_axis(tokens, at, 1)[:, ::-1], 1)
    reference(
        tensor(tokens), attention_mask=tensor(ids), token_type_ids=tensor(types), labels=tensor(labels)
    ).loss.backward()
    targets = np.take_along_axis(labels, at, 1)

    @jit
    @jax.grad
    def gradient(params):
        logits = model.apply(params, tokens, segment_ids=ids, types=types, at=at)
        return tasks.losses.cross_entropy(logits, targets).objective / targets.size

    expected = ours(model, reference, lambda p: torch.zeros_like(p) if p.grad is None else p.grad)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5), gradient(params), expected)


def images(config, seed=0):
    return np.random.default_rng(seed).normal(size=(B, *config.input_shape)).astype(np.float32)


def test_vit_equals_transformers():
    reference, model = vit(VIT), jaxmodels.create(VIT)
    params, x = ours(model, reference), images(VIT)
    with torch.no_grad():
        expected = reference(tensor(x).permute(0, 3, 1, 2)).logits
    close(jit(model.apply)(params, x), expected)


def test_vit_with_mean_pooling_equals_a_script_of_the_same_modules():
    """big_vision's definition: no class token, and the mean over patches after the last norm."""
    reference, model = vit(VIT), jaxmodels.create(VIT, pool="mean")
    params, x = ours(jaxmodels.create(VIT), reference), images(VIT)
    with torch.no_grad():
        embeddings = reference.vit.embeddings
        h = embeddings.patch_embeddings(tensor(x).permute(0, 3, 1, 2)) + embeddings.position_embeddings[:, 1:]
        for layer in reference.vit.layers:
            h = layer(h)
        expected = reference.classifier(reference.vit.layernorm(h).mean(1))
    del params["class_token"]
    params["positions"]["w"] = params["positions"]["w"][1:]
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, model.shapes())
    close(jit(model.apply)(params, x), expected)


@pytest.mark.parametrize("end", [None, 30])
def test_clip_equals_transformers(end):
    config = dataclasses.replace(CLIP, end_token=end)
    reference, model = clip(config), jaxmodels.create(config)
    params, x, (tokens, ids, _) = ours(model, reference), images(config), texts()
    tokens[:, [2, 1]] = 30, 5
    tokens[0, -1] = 30  # a second end
    with torch.no_grad():
        expected = reference(tensor(tokens), tensor(x).permute(0, 3, 1, 2), attention_mask=tensor(ids))
    seen, read, scale = jit(model.apply)(params, x, tokens, segment_ids=ids)
    close(seen, expected.image_embeds, 1e-5)
    if end is None:  # the highest id may lie in the padding, where nothing is promised
        ends = np.take_along_axis(ids, tokens.argmax(1)[:, None], 1)[:, 0].astype(bool)
        assert ends.sum() > 0
        close(read[ends], expected.text_embeds[torch.from_numpy(ends)], 1e-5)
    else:
        close(read, expected.text_embeds, 1e-5)
        close(scale * seen @ read.T, expected.logits_per_image)
    with torch.no_grad():
        unpadded = reference(tensor(tokens), tensor(x).permute(0, 3, 1, 2))
    close(jit(model.apply)(params, None, tokens)[1], unpadded.text_embeds, 1e-5)


def test_contrastive_loss_and_gradients_are_those_of_transformers():
    reference, model = clip(CLIP), jaxmodels.create(CLIP)
    params, x, (tokens, *_) = ours(model, reference), images(CLIP), texts()
    out = reference(tensor(tokens), tensor(x).permute(0, 3, 1, 2), return_loss=True)
    out.loss.backward()
    task = tasks.build(Contrastive(), CLIP, Stdlib(seq_len=T, batch_size=B))

    @jit
    @jax.value_and_grad
    def loss(params):
        total, aux = task.losses[0].fn({"model": params}, {}, {"images": x, "tokens": tokens}, jax.random.key(0))
        return total / aux.weight

    value, gradient = loss(params)
    assert float(value) == pytest.approx(out.loss.item(), rel=1e-5)
    expected = ours(model, reference, lambda p: p.grad)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-4), gradient, expected)


def test_presets_have_the_sizes_of_transformers_models():
    """Made on torch's meta device, where no weights are."""

    def count(kind, **fields):
        with torch.device("meta"):
            return sum(p.numel() for p in kind(kind.config_class(**fields)).parameters())

    for name in ("bert-base", "bert-large", "bert-base-cased", "bert-large-cased"):
        model = jaxmodels.create(name)
        fields = {"vocab_size": model.config.vocab_size, **sizes(model.config)}
        assert model.count() == count(transformers.BertForMaskedLM, **fields), name
    for name in (f"vit-{size}{patch}" for size in ("ti", "s", "b", "l") for patch in (16, 32)):
        model = jaxmodels.create(name)
        fields = {"patch_size": model.config.patch, "num_labels": 1000, **sizes(model.config)}
        assert model.count() == count(transformers.ViTForImageClassification, **fields), name
    for name in ("clip-vit-b32", "clip-vit-b16", "clip-vit-l14"):
        model = jaxmodels.create(name)
        c = model.config
        image = {"patch_size": c.patch, **sizes(c, "image_")}
        expected = count(
            transformers.CLIPModel,
            vision_config=image,
            text_config=sizes(c, "text_"),
            projection_dim=c.embedding,
        )
        assert model.count() == expected, name
