"""Parameters from another run, or from published ones: what is kept, what is new, what does not fit."""

import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxmodels import create, list_models
from jaxmodels.config import Checkpoint, Classification, Config, Init, MaskedLM, Metrics, Synthetic, Train
from jaxmodels.errors import UserError
from jaxmodels.hf import load_pretrained
from jaxmodels.hf.save import save_pretrained
from jaxmodels.models import families, layers
from jaxmodels.models.bert import BERTConfig
from jaxmodels.models.config import ModelConfig
from jaxmodels.models.families import family
from jaxmodels.models.gpt2 import GPT2Config
from jaxmodels.models.inputs import image_inputs
from jaxmodels.models.llama import LlamaConfig
from jaxmodels.models.rotary import RopeScaling
from jaxmodels.models.vit import ViTConfig
from jaxmodels.train import beginning
from jaxmodels.train import run as runs
from jaxmodels.train.arrays import named_leaves
from jaxmodels.train.checkpoint import Checkpointer
from jaxmodels.train.job import assemble
from tests.zoo import arrays

BERT = BERTConfig(vocab_size=23, context=9, layers=1, heads=2, width=8, mlp_width=12)
MASKED = Config(
    model=BERT,
    task=MaskedLM(),
    data=Synthetic(seq_len=8, batch_size=8),
    train=Train(steps=2, ema=0.5),
    checkpoint=Checkpoint(every=0),
    metrics=Metrics(progress="none", loggers=()),
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A run of two steps of masked language modeling."""
    run = tmp_path_factory.mktemp("source") / "run"
    runs.train(MASKED, run)
    return run


def classifier(where, *fresh, config=BERT, ema=None):
    return replace(
        MASKED,
        model=replace(config, head="classification", classes=3),
        task=Classification(),
        train=Train(steps=2, ema=ema, seed=5),
        init=Init(source=None if where is None else str(where), fresh=fresh),
    )


def begin(cfg):
    """The first state, its parameters by name."""
    state = beginning.initial(assemble(cfg))
    return state, {name.partition("/")[2]: np.asarray(x) for name, x in named_leaves(state.params).items()}


@pytest.fixture(scope="module")
def fresh():
    """Parameters of a classifier that begins at random."""
    return begin(classifier(None))[1]


def test_the_body_is_that_of_the_source_s_average_and_the_head_is_new(source, fresh):
    state, found = begin(classifier(source, "pooler/*", "head/*", ema=0.9))
    average, _, _ = Checkpointer(source / "checkpoints").restore_params(subtree="ema")
    plain, _, _ = Checkpointer(source / "checkpoints").restore_params()
    average, plain = named_leaves(average["model"]), named_leaves(plain["model"])
    body = [name for name in found if not name.startswith(("pooler/", "head/"))]
    assert len(body) > 10
    for name in body:
        np.testing.assert_array_equal(found[name], average[name], err_msg=name)
    assert any((plain[name] != average[name]).any() for name in body)
    assert {name for name in found if np.array_equal(found[name], fresh[name])} >= {"head/w", "pooler/w"}
    assert int(state.step) == 0
    jax.tree.map(np.testing.assert_array_equal, state.ema, state.params)


def test_a_fresh_body_part_is_the_random_one(source, fresh):
    _, found = begin(classifier(source, "pooler/*", "head/*", "layers/attn/*"))
    np.testing.assert_array_equal(found["layers/attn/q/w"], fresh["layers/attn/q/w"])
    assert (found["layers/mlp/up/w"] != fresh["layers/mlp/up/w"]).any()


def test_a_whole_run_begins_so_and_learns(source, tmp_path):
    cfg = classifier(source, "pooler/*", "head/*")
    runs.train(cfg, tmp_path / "run")
    assert f"parameters from {source}, step 2; at random: pooler/*, head/*" in (tmp_path / "run/log.txt").read_text()
    assert Checkpointer(tmp_path / "run/checkpoints").steps() == [2]


def refused(cfg):
    with pytest.raises(UserError) as caught:
        begin(cfg)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_the_source_lacks_is_named(source):
    message = refused(classifier(source))
    assert "head" in message and "pooler" in message and "try another --init.source or --init.fresh" in message


def test_another_width_is_named(source):
    message = refused(classifier(source, "pooler/*", "head/*", config=replace(BERT, mlp_width=16)))
    assert "layers/mlp/up" in message and "16" in message and "12" in message


def test_a_pattern_of_nothing_is_refused(source):
    message = refused(classifier(source, "heads/*"))
    assert message.startswith("got init.fresh 'heads/*', which matches no parameter, expected some of ")
    assert "embed" in message and "layers" in message


def test_a_source_that_is_no_run_is_refused(tmp_path):
    assert "expected a directory with config.json" in refused(classifier(tmp_path, "head/*"))


GOLDEN = Path(__file__).parent.parent / "golden" / "bert_masked_lm"


def test_a_directory_in_hugging_face_s_format_is_a_source():
    model, params = load_pretrained(GOLDEN)
    assert model.config.layers == 2
    _, found = begin(classifier(GOLDEN, "pooler/*", "head/*", config=model.config))
    published = named_leaves(params)
    body = [name for name in found if not name.startswith(("pooler/", "head/"))]
    for name in body:
        np.testing.assert_array_equal(found[name], np.asarray(published[name]), err_msg=name)
    message = refused(classifier(GOLDEN, "head/*", config=model.config))
    assert "pooler/w is missing" in message and "try --init.fresh" in message


VIT = ViTConfig(input_shape=(8, 8, 3), patch=4, classes=3, layers=1, heads=2, width=8, mlp_width=12)


def test_a_published_body_begins_a_classifier_whose_head_is_new(tmp_path):
    """A file of ViTModel: no prefix, no head, a pooler that nothing uses."""
    model = create(VIT)
    params = arrays(model)
    save_pretrained(tmp_path, model, params)
    tensors = {
        name.removeprefix("vit."): x
        for name, x in load_file(tmp_path / "model.safetensors").items()
        if not name.startswith("classifier")
    }
    save_file({**tensors, "pooler.dense.weight": np.eye(8, dtype=np.float32)}, tmp_path / "model.safetensors")
    settings = json.loads((tmp_path / "config.json").read_text())
    del settings["id2label"], settings["label2id"]
    settings |= {"architectures": ["ViTModel"], "image_size": [8, 8], "patch_size": [4, 4]}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    cfg = replace(
        MASKED,
        model=replace(VIT, classes=5, dropout=0.1),
        task=Classification(),
        data=Synthetic(batch_size=8),
        init=Init(source=str(tmp_path), fresh=("head/*",)),
    )
    _, found = begin(cfg)
    assert found["head/w"].shape == (8, 5)
    for name, x in named_leaves(params).items():
        if not name.startswith("head/"):
            np.testing.assert_array_equal(found[name], np.asarray(x), err_msg=name)
    assert "missing: classifier.weight" in refused(replace(cfg, init=Init(source=str(tmp_path))))


LLAMA = LlamaConfig(vocab_size=23, layers=1, heads=2, width=8, mlp_width=12, rope_theta=500.0, window=3, norm_eps=1e-4)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A LLaMA in Hugging Face's format."""
    folder, model = tmp_path_factory.mktemp("published"), create(LLAMA)
    save_pretrained(folder, model, arrays(model))
    return folder


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rope_theta": 1e4}, "model.rope_theta 10000.0 for 500.0"),
        ({"norm_eps": 1e-5}, "model.norm_eps 1e-05 for 0.0001"),
        ({"window": None}, "model.window None for 3"),
        ({"rope_scaling": RopeScaling(8.0, 1.0, 4.0, 32)}, "model.rope_scaling.factor 8.0 for 1.0"),
        ({"tied": True}, "model.tied True for False"),
        ({"rope_theta": 1e4, "window": 4}, "--model.window 3 --model.rope-theta 500.0"),
        ({"dtype": "bfloat16", "remat": "full", "context": 64, "unroll": 1}, None),
    ],
)
def test_a_field_that_changes_what_is_computed_has_to_be_the_source_s(change, words, published):
    ours, kept = replace(LLAMA, **change), {"model/embed/w": None}
    if words is None:
        beginning.check_same_model(ours, published, kept)
        return
    with pytest.raises(UserError) as caught:
        beginning.check_same_model(ours, published, kept)
    parts = words.split(" ") if words.startswith("--") else [words]
    assert all(part in str(caught.value) for part in parts), caught.value
    beginning.check_same_model(ours, published, {})  # all at random


def test_every_field_of_a_model_is_told_by_the_shapes_or_free_or_compared(source):
    """A field that is new is compared, unless it is put into one of the lists."""
    known = {field.name for name in list_models() for field in dataclasses.fields(family(name).config)}
    assert {*beginning.FREE, *beginning.SHAPED} <= known
    assert not {*beginning.FREE} & {*beginning.SHAPED}
    cfg = classifier(source, "pooler/*", "head/*", config=replace(BERT, norm_eps=1e-6))
    assert "model.norm_eps 1e-06 for 1e-12 of init.source" in refused(cfg)
    other = replace(MASKED, model=GPT2Config(vocab_size=23, context=9, layers=1, heads=2, width=8))
    with pytest.raises(UserError, match="with a BERTConfig, expected a GPT2Config"):
        beginning.check_same_model(other.model, source, {"model/embed/w": None})
    # masked language modeling taught no pooler: what it reads is free as long as it is new
    beginning.check_same_model(replace(classifier(source).model, pool="mean"), source, {"model/embed/w": None})
    with pytest.raises(UserError, match="model.pool 'mean' for 'first'"):
        beginning.check_same_model(replace(classifier(source).model, pool="mean"), source, {"model/pooler/w": None})


@dataclasses.dataclass(frozen=True)
class Folded(ModelConfig):
    """A classifier from outside whose weights do not show their heads."""

    input_shape: tuple[int, ...] = (4,)
    width: int = 8
    heads: int = 2
    depth: int = 2
    classes: int = 3


class Folding(nn.Module):
    config: Folded

    @nn.compact
    def __call__(self, x, *, train=False):
        c = self.config
        x = layers.Linear((c.width,), ("features", "embed"), name="inputs")(x)
        for i in range(c.depth):
            x = layers.Linear((c.width,), ("embed", "mlp"), name=f"layer{i}")(x)
            x = nn.softmax(x.reshape(len(x), c.heads, -1)).reshape(x.shape)
        return layers.Linear((c.classes,), ("embed", "classes"), name="head")(x)


def test_a_field_of_a_model_from_outside_is_told_by_the_shapes_only_if_it_changes_one(tmp_path, monkeypatch):
    monkeypatch.setattr(families, "_registered", dict(families._registered))
    monkeypatch.setattr(families.FAMILIES, "_registered", {})
    families.register(families.Family("folded", Folded, Folding, image_inputs))
    cfg = replace(MASKED, model=Folded(), task=Classification(), data=Synthetic(batch_size=8))
    runs.train(cfg, tmp_path / "run")
    kept = {f"model/{name}": None for name in named_leaves(create(Folded()).shapes())}
    for told in (Folded(), Folded(width=16), Folded(classes=5)):  # of which reading says what does not fit
        beginning.check_same_model(told, tmp_path / "run", kept)
    for changed, words in ((Folded(heads=4), "model.heads 4 for 2"), (Folded(depth=1), "model.depth 1 for 2")):
        with pytest.raises(UserError, match=words):
            beginning.check_same_model(changed, tmp_path / "run", kept)
