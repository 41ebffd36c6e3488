"""Parameters from another run, or from published ones: what is kept, what is new, what does not fit."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxmodels.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    InitConfig,
    MetricsConfig,
    TaskConfig,
    TrainConfig,
)
from jaxmodels.errors import UserError
from jaxmodels.hf import load_pretrained
from jaxmodels.models.bert import BERTConfig
from jaxmodels.train import beginning
from jaxmodels.train import run as runs
from jaxmodels.train.arrays import named_leaves
from jaxmodels.train.checkpoint import Checkpointer

BERT = BERTConfig(vocab_size=23, context=9, layers=1, heads=2, width=8, mlp_width=12)
MASKED = Config(
    model=BERT,
    task=TaskConfig(name="masked_lm"),
    data=DataConfig(source="synthetic", seq_len=8, batch_size=8),
    train=TrainConfig(steps=2, ema=0.5),
    checkpoint=CheckpointConfig(every=0),
    metrics=MetricsConfig(progress="none", tensorboard=False),
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A run of two steps of masked language modelling."""
    run = tmp_path_factory.mktemp("source") / "run"
    runs.train(MASKED, run)
    return run


def classifier(where, *fresh, config=BERT, ema=None):
    return replace(
        MASKED,
        model=replace(config, head="classification", classes=3),
        task=TaskConfig(name="classification"),
        train=TrainConfig(steps=2, ema=ema, seed=5),
        init=InitConfig(source=None if where is None else str(where), fresh=fresh),
    )


def begin(cfg):
    """The first state, its parameters by name."""
    made = runs.setup(cfg)
    state = beginning.initial(cfg, made.task, made.optimizers, made.layout)
    return state, {name.partition("/")[2]: np.asarray(x) for name, x in named_leaves(state.params).items()}


def test_the_body_is_that_of_the_source_s_average_and_the_head_is_new(source):
    state, found = begin(classifier(source, "pooler/*", "head/*", ema=0.9))
    average, _, _ = Checkpointer(source / "checkpoints").restore_params(subtree="ema")
    plain, _, _ = Checkpointer(source / "checkpoints").restore_params()
    average, plain = named_leaves(average["model"]), named_leaves(plain["model"])
    body = [name for name in found if not name.startswith(("pooler/", "head/"))]
    assert len(body) > 10
    for name in body:
        np.testing.assert_array_equal(found[name], average[name], err_msg=name)
    assert any((plain[name] != average[name]).any() for name in body)
    _, random = begin(classifier(None))
    assert {name for name in found if np.array_equal(found[name], random[name])} >= {"head/w", "pooler/w"}
    assert int(state.step) == 0
    jax.tree.map(np.testing.assert_array_equal, state.ema, state.params)


def test_a_fresh_body_part_is_the_random_one(source):
    _, found = begin(classifier(source, "pooler/*", "head/*", "layers/attn/*"))
    _, random = begin(classifier(None))
    np.testing.assert_array_equal(found["layers/attn/q/w"], random["layers/attn/q/w"])
    assert (found["layers/mlp/up/w"] != random["layers/mlp/up/w"]).any()


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
    assert message.startswith("got init.fresh 'heads/*', which is no parameter, expected some of ")
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
