"""What counts and what does not: padding rows, means over nothing, microbatches of unequal weight."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels import tasks
from jaxmodels.config import (
    SGD,
    Checkpoint,
    Classification,
    Config,
    Constant,
    Eval,
    MaskedLM,
    Mesh,
    Metrics,
    Stdlib,
    Train,
)
from jaxmodels.data import Loader, Order
from jaxmodels.data.texts import Rows
from jaxmodels.errors import UserError
from jaxmodels.models.bert import BERTConfig
from jaxmodels.models.clip import CLIPConfig
from jaxmodels.models.dit import DiTConfig
from jaxmodels.models.gan import GANConfig
from jaxmodels.models.gpt2 import GPT2Config
from jaxmodels.models.mlp import MLPConfig
from jaxmodels.models.transformer import TransformerConfig
from jaxmodels.models.unet import UNetConfig
from jaxmodels.models.vae import VAEConfig
from jaxmodels.parallel.mesh import make_mesh
from jaxmodels.tasks.task import rows
from jaxmodels.train import evaluate, job, state, step
from jaxmodels.train import run as runs
from tests.sections import task_of

N, T, V = 10, 6, 24
IMAGE = (4, 4, 1)
BODY = {"layers": 1, "width": 8, "heads": 2}
TOWERS = {f"{tower}_{name}": size for tower in ("image", "text") for name, size in {**BODY, "mlp_width": 8}.items()}
CASES = {
    "classification": MLPConfig(IMAGE, 7, ()),
    "multi_label": MLPConfig(IMAGE, 7, ()),
    "causal_lm": GPT2Config(V, T, **BODY),
    "masked_lm": BERTConfig(V, context=T, mlp_width=8, **BODY),
    "seq2seq": TransformerConfig(vocab_size=V, mlp_width=8, **BODY),
    "verification": MLPConfig(IMAGE, 7, (8,)),
    "segmentation": UNetConfig(IMAGE, 7, (4, 6)),
    "contrastive": CLIPConfig(IMAGE, 2, vocab_size=V, context=T, embedding=4, **TOWERS),
    "vae": VAEConfig(input_shape=IMAGE, hidden=(8,), latents=2),
    "gan": GANConfig(input_shape=IMAGE, latents=3, channels=(4,)),
    "diffusion": DiTConfig(IMAGE, 2, classes=7, mlp_width=8, **BODY),
}
# at these shapes LLVM's optimizations take longer than all else
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def built(name):
    kind = Classification(multi_label=True) if name == "multi_label" else task_of(name)
    task = tasks.build(kind, CASES[name], Stdlib(seq_len=T))
    return task, jit(task.init)(jax.random.key(0)), task.stats()


def examples(task, name, count=N):
    """Examples without labels where the task needs none."""
    rng = np.random.default_rng(0)

    def draw(leaf):
        if name == "multi_label" and len(leaf.shape) == 2:
            return rng.integers(0, 2, leaf.shape).astype(np.float32)
        if np.issubdtype(leaf.dtype, np.integer):
            return rng.integers(0, 7, leaf.shape).astype(np.int32)
        return rng.random(leaf.shape, np.float32)

    return {field: draw(leaf) for field, leaf in task.batch_spec(count).items()}


@pytest.mark.parametrize("name", CASES)
def test_metrics_do_not_depend_on_the_size_of_an_evaluation_s_batches(name):
    task, params, stats = built(name)
    source = Rows({**examples(task, name), "group": np.arange(N, dtype=np.int32) % 2}, split="eval", label="examples",
                  groups=("a", "b"))  # fmt: skip
    mesh = make_mesh(Mesh(), jax.devices()[:1])
    shardings = task.shardings(mesh, source.arrays)
    measure = evaluate.build_evaluate(task, mesh, groups=source.groups)
    found = [measure(params, stats, Loader(source, Order(N, size, 0), shardings).once()) for size in (5, 4)]
    assert found[1] == pytest.approx(found[0], rel=1e-5, abs=1e-4)
    spec = Loader(source, Order(N, 5, 0), shardings).abstract()
    names = set(evaluate.metric_names(task, mesh, spec, groups=source.groups))
    assert names >= set(found[0])
    assert all("/" in name for name in names - set(found[0])), "those of classes that are nowhere in a group"
    assert found[0]["loss"] == pytest.approx((found[0]["group/a/loss"] + found[0]["group/b/loss"]) / 2, rel=0.5)


def test_an_evaluation_of_pairs_compares_each_with_all_of_the_set():
    task, params, stats = built("contrastive")
    batch = examples(task, "contrastive")
    mesh = make_mesh(Mesh(), jax.devices()[:1])
    shardings = task.shardings(mesh, batch)
    source = Rows(batch, split="eval", label="pairs")
    found = evaluate.build_evaluate(task, mesh)(params, stats, Loader(source, Order(N, 3, 0), shardings).once())
    for name, (total, count) in task.metrics(params, stats, batch).items():
        assert found[name] == pytest.approx(float(total) / N, rel=1e-5) and int(count) == N
    classes = np.array([0, 1, 0, 2, 2, 3, 0, 4, 4, 5], np.int32)
    kept = {field: np.asarray(x) for field, x in task.whole.keep(params, stats, {**batch, "classes": classes}).items()}
    expected = task.metrics(params, stats, {**batch, "classes": classes})
    for name, (total, _) in task.whole.sums(kept, source).items():
        assert total == pytest.approx(float(expected[name][0]), rel=1e-5)


def advanced(task, batch, accumulate=1):
    cfg = SGD(peak_lr=0.1, weight_decay=0.0, clip_norm=None, schedule=Constant())
    optimizers = {loss.name: cfg.build(1, task.axes()[loss.trains]) for loss in task.losses}
    now = jit(lambda key: state.init(task, optimizers, key))(jax.random.key(0))
    advance = jit(functools.partial(step.advance, task, optimizers, accumulate=accumulate, ema=None))
    after, metrics = advance(now, jax.tree.map(jnp.asarray, batch))
    return now, after, {name: float(value) for name, value in metrics.items()}


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (np.array([0, 3, -1, 2], np.int32), [1, 1, 0, 0]),
        (np.array([[-1, 1], [0, -1], [-1, -1], [1, 1]], np.float32), [1, 1, 0, 0]),
        (np.array([-0.5, 3.0, -7.0, 2.0], np.float32), [1, 1, 1, 0]),
        (None, [1, 1, 1, 0]),
    ],
)
def test_a_row_does_not_count_without_weight_or_with_none_of_its_labels(labels, expected):
    batch = {"inputs": np.ones((4, 2)), "weight": np.array([1, 1, 1, 0], np.float32)}
    batch |= {} if labels is None else {"labels": labels}
    counts = rows(jax.tree.map(jnp.asarray, batch))
    assert counts.dtype == jnp.float32 and counts.tolist() == expected


@pytest.mark.parametrize("name", ["classification", "causal_lm"])
def test_microbatches_of_unequal_weight_and_of_none_give_the_step_of_the_rows_that_count(name):
    task = built(name)[0]
    # a share is every fourth row: the second has none that counts
    batch, counts = examples(task, name, 12), np.array([1, 0, 1, 1, 0, 0, 1, 0, 1, 0, 0, 1], np.float32)
    _, few, alone = advanced(task, {key: x[counts > 0] for key, x in batch.items()})
    for accumulate in (1, 4):
        _, after, metrics = advanced(task, {**batch, "weight": counts}, accumulate)
        assert metrics == pytest.approx(alone, rel=1e-4)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), after.params, few.params)


def test_a_step_in_which_nothing_counts_moves_nothing_and_has_no_loss():
    task = built("classification")[0]
    batch = {**examples(task, "classification"), "labels": np.full(N, -1, np.int32)}
    now, after, metrics = advanced(task, batch)
    jax.tree.map(np.testing.assert_array_equal, now.params, after.params)
    assert metrics["weight"] == 0 and np.isnan(metrics["loss"])
    assert step.measured(metrics) == ({}, True)
    two = {"a/loss": 1.0, "a/weight": 3.0, "b/loss": float("nan"), "b/grad_norm": 0.0, "b/weight": 0.0}
    assert step.measured(two) == ({"a/loss": 1.0}, True)


def test_a_share_of_a_label_weighs_as_much_as_it_is():
    """Blended images of which one alone has a label: the mean is over that label's share, be it below 1."""
    task = tasks.build(Classification(mixup=0.4), CASES["classification"], Stdlib())
    batch = examples(task, "classification", 2)
    batch["labels"][1] = -1
    params = jit(task.init)(jax.random.key(0))
    total, aux = task.losses[0].fn(params, {}, batch, jax.random.key(0))
    now, after, metrics = advanced(task, batch)
    assert metrics["weight"] == pytest.approx(1.0) and float(aux.weight) == pytest.approx(1.0)
    assert metrics["loss"] > 0 and float(total) > 0
    assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(now.params), jax.tree.leaves(after.params), strict=True))


@pytest.mark.parametrize(
    ("name", "field", "needs"),
    [
        ("classification", "labels", "a label of 0 or above"),
        ("causal_lm", "targets", "a target of 0 or above"),
        ("masked_lm", "segment_ids", "a token that may be masked: no padding, none of task.keep"),
    ],
)
def test_a_set_of_which_nothing_counts_is_refused_and_never_the_best(name, field, needs):
    task, params, stats = built(name)
    empty = np.full(N if field == "labels" else (N, T), 0 if field == "segment_ids" else -1, np.int32)
    measure = evaluate.build_evaluate(task, make_mesh(Mesh(), jax.devices()[:1]))
    with pytest.raises(UserError, match=f"got nothing to evaluate, expected {needs} in the data, try"):
        measure(params, stats, [{**examples(task, name), field: empty}])
    with pytest.raises(UserError, match="got nothing to evaluate"):
        measure(params, stats, [])


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (tuple(range(V)), "got task.keep of all 24 ids, expected some that may be masked"),
        ((0, V), "got 24 in task.keep, expected ids below model.vocab_size 24"),
        ((-1,), r"got task.keep \(-1,\), expected at least 0"),
    ],
)
def test_ids_to_keep_are_some_of_the_vocabulary_s(keep, message):
    with pytest.raises(UserError, match=message):
        tasks.build(MaskedLM(keep=keep), CASES["masked_lm"], Stdlib(seq_len=T))


def test_a_run_on_labels_that_are_all_ignored_ends_with_one_line_and_without_a_best_checkpoint(tmp_path, monkeypatch):
    arrays = {"inputs": np.zeros((40, *IMAGE), np.float32), "labels": np.full(40, -1, np.int32)}
    monkeypatch.setattr(job.data, "open_for", lambda cfg, split, *_: Rows(arrays, split=split, label="unlabeled"))
    cfg = Config(
        CASES["classification"],
        task=Classification(),
        data=Stdlib(batch_size=8),
        train=Train(steps=2),
        eval=Eval(every=1),
        metrics=Metrics(loggers=(), progress="none"),
        checkpoint=Checkpoint(best=True),
    )
    with pytest.raises(UserError, match="got nothing to evaluate, expected a label of 0 or above in the data"):
        runs.train(cfg, tmp_path / "run")
    assert not list((tmp_path / "run").glob("checkpoints/*"))
    with pytest.raises(
        UserError, match="got nothing to train on in 2 consecutive batches, expected a label of 0 or above"
    ):
        runs.train(replace(cfg, eval=Eval(), checkpoint=Checkpoint()), tmp_path / "other")
