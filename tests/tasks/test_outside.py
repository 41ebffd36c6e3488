"""Models, tasks and metrics from outside the tree are asked what they offer, and not known by their names."""

import dataclasses
import sys
import types
from dataclasses import dataclass, replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels import tasks
from jaxmodels.config import GAN, VAE, Classification, Config, Eval, Mesh, Synthetic
from jaxmodels.data.contract import BatchField
from jaxmodels.errors import UserError
from jaxmodels.models import families, gan, layers
from jaxmodels.models.config import ModelConfig
from jaxmodels.models.gan import GANConfig
from jaxmodels.models.inputs import image_inputs
from jaxmodels.models.mlp import MLPConfig
from jaxmodels.models.model import Family
from jaxmodels.parallel.mesh import make_mesh
from jaxmodels.tasks import classification
from jaxmodels.tasks.checks import checked
from jaxmodels.tasks.task import Task, TaskConfig, Whole, rows
from jaxmodels.train import evaluate
from jaxmodels.train.job import additive, assemble

SHAPE = (4, 4, 1)


@dataclass(frozen=True)
class Plain(ModelConfig):
    """An autoencoder of two matrices."""

    input_shape: tuple[int, ...] = SHAPE
    size: int = 3


class Matrices(nn.Module):
    config: Plain

    @nn.compact
    def __call__(self, images=None, *, latents=None, train=False):
        c = self.config
        mean = latents
        if images is not None:
            mean = layers.Linear((c.size,), ("features", "embed"), name="mean")(images.reshape(len(images), -1))
        out = layers.Linear((16,), ("embed", "features"), name="out")(mean).reshape(-1, *c.input_shape)
        return (out, mean, jnp.zeros_like(mean)) if images is not None else out


class Encoder(nn.Module):
    config: Plain

    @nn.compact
    def __call__(self, images, *, train=False):
        return Matrices(self.config, name="whole")(images)


@dataclass(frozen=True)
class OwnGAN(ModelConfig):
    """A GAN whose networks are those of ours, at a fixed size."""

    network: str = "generator"
    kind: str = "own"


def ours(config):
    return GANConfig(network=config.network, input_shape=SHAPE, latents=6, channels=(4,))


@pytest.fixture
def registered(monkeypatch):
    """Register families for one test."""
    monkeypatch.setattr(families, "_registered", dict(families._registered))
    monkeypatch.setattr(families.FAMILIES, "_registered", {})
    return families.register


def test_an_autoencoder_from_outside_is_trained_by_what_its_apply_gives(registered):
    registered(Family("plain", Plain, Matrices, image_inputs))
    task = tasks.build(VAE(), Plain(), Synthetic())
    assert task.fields["inputs"].shape == SHAPE
    params = task.init(jax.random.key(0))
    assert task.samples(params, {}, 2).shape == (2, *SHAPE)
    batch = {"inputs": jnp.full((2, *SHAPE), 100, jnp.uint8), "labels": jnp.zeros(2, int)}
    loss, _ = task.losses[0].fn(params, {}, batch, jax.random.key(1), 0)
    assert np.isfinite(loss)


def test_an_encoder_that_does_not_decode_codes_is_refused_as_an_autoencoder(registered):
    registered(Family("plain", Plain, Encoder, image_inputs))
    with pytest.raises(UserError, match="got task vae with Plain, expected a variational autoencoder, whose apply"):
        tasks.build(VAE(), Plain(), Synthetic())


def test_a_gan_from_outside_is_trained_by_its_networks(registered):
    def inputs(config, batch, length):
        return gan.inputs(ours(config), batch, length)

    registered(Family("own-gan", OwnGAN, lambda config: gan.GAN(ours(config)), inputs))
    task = tasks.build(GAN(), OwnGAN(), Synthetic())
    params, stats = task.init(jax.random.key(0)), task.stats()
    assert task.samples(params, stats, 2).shape == (2, *SHAPE) and task.fields["inputs"].shape == SHAPE


def own(**changes):
    """The task of a small classifier, with some of its parts changed."""
    return replace(tasks.build(Classification(), MLPConfig((4,), 3, ()), Synthetic()), **changes)


def test_tokens_are_counted_by_their_axis_whatever_the_field_is_called():
    ids = BatchField((12,), np.int32, ("seq",), below=9)
    task = own(unit="tokens", fields={"sentence": ids, "answer": replace(ids, shape=(7,)), "score": BatchField(())})
    assert task.units(4) == 48
    with pytest.raises(UserError, match=r"got a task that counts tokens, with batches of score, .* the axis seq"):
        own(unit="tokens", fields={"score": BatchField(())})


def test_a_model_with_auxiliary_losses_is_never_cut_into_more_microbatches():
    cfg = Config(MLPConfig(SHAPE, 5, ()), Classification(), Synthetic(batch_size=8), mesh=Mesh(data=1))
    job = assemble(cfg, jax.devices()[:1], opened=False)
    assert additive(job)
    model = replace(job.task.networks["model"], auxiliary=True)
    assert not additive(replace(job, task=replace(job.task, networks={"model": model})))


def metrics(params, stats, batch):
    count = rows(batch).sum()
    return {name: (count, count) for name in ("loss", "error", "recall/a", "odd")}


@pytest.mark.parametrize(
    ("metric", "mode", "message"),
    [
        ("error", "min", None),
        ("error", "max", "got eval.mode max for eval.metric eval/error, expected min"),
        ("recall/a", "min", "got eval.mode min for eval.metric eval/recall/a, expected max"),
        ("group/north/recall/a", "min", "got eval.mode min for eval.metric eval/group/north/recall/a, expected max"),
        ("group/north/error", "min", None),
        ("gap/recall/a", "max", "expected min"),
        ("odd", None, "got eval.metric eval/odd, which may be better lower or higher, expected a metric that says so"),
        ("odd", "min", None),
        ("error", None, None),
        ("odd", "max", None),
    ],
)
def test_a_metric_decides_only_in_the_direction_that_its_task_states(metric, mode, message):
    task = own(metrics=metrics, better={"error": "min", "recall": "max"}, summarize=Task.summarize)
    mesh = make_mesh(Mesh(data=1), jax.devices()[:1])
    cfg = Eval(metric=f"eval/{metric}", mode=mode)

    def batch():
        return {**task.batch_spec(4), "group": jax.ShapeDtypeStruct((4,), np.int32)}

    def check():
        evaluate.check_metric(cfg, task, mesh, batch, groups=("north", "south"))

    if message is None:
        check()
        return
    with pytest.raises(UserError) as error:
        check()
    assert message in str(error.value)


def spread(outputs, batch):
    """A value for each output, of which the last does not count."""
    return outputs, jnp.ones_like(outputs).at[:, -1].set(0)


@dataclass(frozen=True)
class Compared(TaskConfig):
    """A task from outside that is measured on a whole set, and gives its model's outputs."""

    def build(self, model, data):
        task = Classification().build(model, data)

        def keep(params, stats, batch):
            return {"outputs": task.outputs(params, stats, batch)[:, 0], "weight": rows(batch)}

        def sums(kept, source):
            highest = float(kept["outputs"].max())
            return {"loss": (highest * len(kept["outputs"]), float(len(kept["outputs"])))}

        return dataclasses.replace(
            task,
            metrics=lambda *given: {"loss": task.metrics(*given)["loss"]},
            summarize=Task.summarize,
            whole=Whole(keep, sums),
        )

    def examples(self, opening):
        raise NotImplementedError


def test_metrics_from_outside_are_measured_of_a_whole_set_too(monkeypatch):
    module = types.ModuleType("own_measures")
    module.spread = tasks.better("min")(spread)
    spread.__module__ = "own_measures"
    monkeypatch.setitem(sys.modules, "own_measures", module)
    model = MLPConfig((4,), 3, ())
    task = tasks.build(Compared(), model, Synthetic(), None, ("own_measures:spread",))
    assert task.better_of("spread") == "min"
    mesh = make_mesh(Mesh(data=1), jax.devices()[:1])
    params = task.init(jax.random.key(0))
    x = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    weight = np.array([1, 1, 1, 1, 1, 0, 1, 0], np.float32)
    group = np.arange(8, dtype=np.int32) % 2
    whole = {"inputs": x, "labels": np.zeros(8, np.int32), "weight": weight, "group": group}
    batches = [{name: value[at : at + 4] for name, value in whole.items()} for at in (0, 4)]
    measure = evaluate.build_evaluate(task, mesh, groups=("even", "odd"))
    found = measure(params, {}, batches)
    outputs = np.asarray(task.networks["model"].apply(params["model"], x), np.float64)[:, :2]
    real = weight > 0
    assert found["spread"] == pytest.approx(outputs[real].mean(), rel=1e-5)
    assert found["group/odd/spread"] == pytest.approx(outputs[real & (group == 1)].mean(), rel=1e-5)
    firsts = np.asarray(task.outputs(params, {}, whole))[real, 0]
    assert found["loss"] == pytest.approx(firsts.max(), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "gives", "message"),
    [
        ("outputs", None, "whose outputs gives None, expected arrays, try its logits"),
        ("outputs", {"logits": "high"}, "whose outputs gives {'logits': 'high'}, expected arrays"),
        ("samples", jnp.zeros((2, 16)), "whose samples gives float32[2, 16], expected images (count, height, width"),
        ("predicts", {}, "whose predicts gives {}, expected arrays of real numbers by name, each of 2 rows"),
        ("predicts", {3: jnp.zeros(2)}, "whose predicts gives {3: float32[2]}, expected arrays of real numbers by"),
        ("predicts", {"a": jnp.zeros(3)}, "whose predicts gives {'a': float32[3]}, expected arrays of real numbers"),
        ("predicts", {"a": jnp.zeros(2, complex)}, "whose predicts gives {'a': complex64[2]}, expected arrays of real"),
        ("summarize", {"loss": 1.0, 3: 1.0}, "whose summarize gives {'loss': 1.0, 3: 1.0}, expected numbers by name"),
        ("summarize", {"error": 1.0}, "whose summarize gives {'error': 1.0}, expected numbers by name, the loss among"),
    ],
)
def test_what_a_task_gives_of_its_model_is_refused_if_it_is_something_else(name, gives, message):
    task = checked(own(**{name: lambda *args: gives}), Classification())
    with pytest.raises(UserError) as error:
        getattr(task, name)({}, *[{"inputs": jnp.zeros((2, 4))}] * (1 if name == "summarize" else 2))
    assert message in str(error.value)


def test_predictions_of_any_number_of_rows_are_traced_as_such():
    """As an export does, whose functions take any number of them."""
    task = checked(own(predicts=lambda params, stats, batch: {"a": batch["inputs"].sum(1)}), Classification())
    rows = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("rows"), 4), jnp.float32)
    assert str(jax.eval_shape(lambda x: task.predicts({}, {}, {"inputs": x}), rows)["a"].shape) == "(rows,)"


@pytest.mark.parametrize(
    ("gives", "said"),
    [
        (lambda x: None, "None"),
        (lambda x: (x, x), "(float32[2, 3], float32[2, 3])"),
        (lambda x: x[:, :2], "float32[2, 2]"),
        (lambda x: {"all": x}, "{'all': float32[2, 3]}"),
    ],
)
def test_a_model_that_gives_no_logits_of_its_classes_is_refused_as_a_classifier(monkeypatch, gives, said):
    real = classification.forward
    monkeypatch.setattr(classification, "forward", lambda *args, **how: (gives(real(*args, **how)[0]), {}))
    task = own()
    batch = {"inputs": jnp.ones((2, 4)), "labels": jnp.zeros(2, int)}
    with pytest.raises(UserError) as error:
        task.metrics(task.init(jax.random.key(0)), {}, batch)
    assert f"that gives {said} for 2 examples of 3 classes, expected logits of shape (2, 3)" in str(error.value)


def test_a_task_that_answers_with_something_unknown_is_refused():
    @dataclass(frozen=True)
    class Numbers(Classification):
        answers = "clas"

    with pytest.raises(UserError, match="whose answers is 'clas', expected one of class, .*, did you mean 'class'"):
        checked(own(), Numbers())
