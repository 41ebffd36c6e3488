"""Tasks: networks and losses joined into one object, all pure."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxmodels.data.contract import IGNORED, BatchField, Contract
from jaxmodels.data.opening import Opening
from jaxmodels.data.section import DataConfig
from jaxmodels.data.source import Source
from jaxmodels.errors import UserError
from jaxmodels.fields import Dropped, Section, Weight
from jaxmodels.models.model import Model
from jaxmodels.parallel import rules
from jaxmodels.registry import Registry, function_of
from jaxmodels.tasks.losses import Scores, cross_entropy
from jaxmodels.tasks.parts import (
    Autoencoder,
    Aux,
    Batch,
    Better,
    Loss,
    ModelCall,
    Params,
    Sounds,
    Sums,
    Totals,
    Whole,
)


@dataclass(frozen=True)
class Task:
    """Networks by name, the ordered losses that train them, and what is measured on held-out data."""

    networks: Mapping[str, Model]
    losses: tuple[Loss, ...]
    metrics: Callable[[Params, Params, Batch], Sums]
    """Sums over a batch, in evaluation mode."""
    fields: Contract
    """The fields of a batch."""
    unit: Literal["tokens", "examples"] = "examples"
    """The unit of throughput."""
    needs: str = "an example"
    """What a set must contain for anything in it to count, as phrased in the error if nothing does."""
    summarize: Callable[[Totals, Sequence[str]], dict[str, float]] = lambda totals, classes: divide(totals)
    """Turns the sums over a whole set into metrics, given the names of the classes if they have any."""
    whole: Whole | None = None
    """How a whole set is measured, if sums over its batches would depend on their size."""
    samples: Callable[..., jax.Array] | None = None
    """`samples(params, stats, count=64, seed=0)`: images (N, H, W, C) in [0, 1] that a generative model generates; the
    same seed gives the same latents. Where it has `asks`, it takes `given=` too, their arrays of `count` rows."""
    path: Callable[..., jax.Array] | None = None
    """`path(params, stats, count, seed=0)`: what there is before and after each step of a model that makes images in
    several, (K, N, H, W, C) in [0, 1]; the last are those of `samples`. It takes `given=` too."""
    asks: tuple[str, ...] = ()
    """Fields of a batch that say what is asked for in an image, such as its class."""
    sounds: Sounds | None = None
    """How a model of sounds draws them."""
    autoencoder: Autoencoder | None = None
    """Conversions between an autoencoder's images and its inputs and outputs."""
    predicts: Callable[[Params, Params, Batch], Mapping[str, jax.Array]] | None = None
    """`predicts(params, stats, batch)`: what `jaxmodels predict` prints for each record if `answers` is "", as arrays
    (B, …) by name. The batch has only `inputs` and, for texts, `segment_ids`; a transcript's has `lengths`, and its
    answer are `tokens` (B, T), ignored below 0, and the `confidence` (B,)."""
    gap: int | None = None
    """The id of a masked token."""
    outputs: Callable[[Params, Params, Batch], Any] | None = None
    """`outputs(params, stats, batch)`: the model's outputs for a batch in evaluation mode, such as logits, which
    metrics from outside are computed from."""
    ask: Callable[[Batch, jax.Array | None], ModelCall] | None = None
    """`ask(batch, rng)`: what the only loss gives the network `model`. None: a teacher cannot be asked the same."""
    teacher: Model | None = None
    """A frozen network that losses find as `params["teacher"]`, {"params": …, "stats": …}. It is none of `networks`."""
    better: Mapping[str, Better] = dataclasses.field(default_factory=dict)
    """Whether a lower or a higher value is better, by the name of a metric, or by what stands before its slash if each
    class has one, as in `recall/cat`. A lower `loss` always is. `eval.metric` can only be a metric that is here."""

    def __post_init__(self) -> None:
        if self.unit == "tokens" and not self.lengths():
            raise UserError(
                f"got a task that counts tokens, with batches of {', '.join(self.fields)}, expected a field with the "
                'axis seq, try unit="examples"'
            )

    def better_of(self, metric: str) -> Better | None:
        """Return whether a lower or a higher value of a metric is better; None if the task does not say."""
        name = metric.partition("/")[0]
        return self.better.get(name) or ("min" if name == "loss" else None)

    @property
    def updates(self) -> int:
        """The largest number of updates of one network in a step, each on its own share of the batch."""
        return max(loss.updates for loss in self.losses)

    def batch_spec(self, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Return shapes and dtypes of a batch of `rows` examples, without optional fields."""
        return {name: field.rows(rows) for name, field in self.fields.items() if not field.optional}

    def stored_spec(self, rows: int, real: bool) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of a batch as data are expected to give it, with what `real` ones usually have."""
        fields = {name: field for name, field in self.fields.items() if not field.optional or (real and field.usual)}
        return {name: field.rows(rows, stored=True) for name, field in fields.items()}

    def batch_axes(self, name: str, rank: int) -> rules.Names:
        """Return the logical axes of a batch's array; in one that the task does not read, only the rows have a name."""
        axes = self.fields[name].axes if name in self.fields else ()
        return ("batch", *(axes or (None,) * (rank - 1)))

    def shardings(self, mesh: Mesh, batch: Mapping[str, Any]) -> dict[str, NamedSharding]:
        """Return the sharding of each array of a batch; `batch` may consist of shapes."""
        return {name: rules.sharding(mesh, self.batch_axes(name, len(x.shape))) for name, x in batch.items()}

    def lengths(self) -> list[int]:
        """Return the lengths of an example's sequences, where a batch must have a certain length."""
        needed = [field for field in self.fields.values() if not field.optional]
        return [n for field in needed for n, axis in zip(field.shape or (), field.axes, strict=False) if axis == "seq"]

    def units(self, rows: int) -> int:
        """Return the tokens or examples in a batch, whichever throughput is counted in.

        A row has as many tokens as its longest sequence: the inputs and targets of a text are the same tokens.
        """
        return rows * max(self.lengths()) if self.unit == "tokens" else rows

    def init(self, key: jax.Array) -> Params:
        """Initialize the parameters of each network."""
        keys = jax.random.split(key, len(self.networks))
        return {name: model.init(k) for (name, model), k in zip(self.networks.items(), keys, strict=True)}

    def axes(self) -> Params:
        """Return the logical axes of each network's parameters."""
        return {name: model.axes() for name, model in self.networks.items()}

    def stats(self) -> Params:
        """Initialize the batch statistics of the networks that have them."""
        stats = {name: model.stats() for name, model in self.networks.items()}
        return {name: tree for name, tree in stats.items() if tree}


METRICS = Registry("metric", "jaxmodels.metrics", {}, function_of("outputs", "batch"))
"""Metrics from outside: pure functions `metric(outputs, batch)` that return a value for each example, (B,), or values
of its parts and their weights, both (B, …). Examples that do not count are left out of the mean by this package."""
TASKS = Registry(
    "task",
    "jaxmodels.tasks",
    {
        "causal_lm": "jaxmodels.tasks.causal_lm:CausalLM",
        "masked_lm": "jaxmodels.tasks.masked_lm:MaskedLM",
        "classification": "jaxmodels.tasks.classification:Classification",
        "seq2seq": "jaxmodels.tasks.seq2seq:Seq2Seq",
        "verification": "jaxmodels.tasks.verification:Verification",
        "segmentation": "jaxmodels.tasks.segmentation:Segmentation",
        "detection": "jaxmodels.tasks.detection:Detection",
        "set_detection": "jaxmodels.tasks.set_detection:SetDetection",
        "contrastive": "jaxmodels.tasks.contrastive:Contrastive",
        "vae": "jaxmodels.tasks.vae:VAE",
        "gan": "jaxmodels.tasks.gan:GAN",
        "waveform": "jaxmodels.tasks.waveform:Waveform",
        "question_answering": "jaxmodels.tasks.question_answering:QuestionAnswering",
        "extraction": "jaxmodels.tasks.extraction:Extraction",
        "next_item": "jaxmodels.tasks.next_item:NextItem",
        "diffusion": "jaxmodels.tasks.diffusion:Diffusion",
        "transcription": "jaxmodels.tasks.transcription:Transcription",
        "retrieval": "jaxmodels.tasks.retrieval:Retrieval",
        "multimodal_lm": "jaxmodels.tasks.multimodal_lm:MultimodalLM",
    },
)

Answers = Literal[
    "", "class", "classes", "mask", "boxes", "caption", "continuation", "translation", "gaps", "answer",
    "extract", "items", "transcript", "reply",
]  # fmt: skip
"""What a trained model predicts for a record: its class, or several; the class of each pixel; boxes around objects; the
caption that fits; the continuation of a text; its translation; the masked tokens; the answer to a question; the
sentences that sum a text up; the items that a user takes next; the text of a sound; the reply to a question
about media; nothing."""


def tasks_that_answer(*answers: Answers) -> str:
    """Name the tasks whose models predict one of these, such as "causal_lm or seq2seq", for a message."""
    found = []
    for name in TASKS.names():
        try:
            kind = TASKS.find(name)
            answer = kind.answers if isinstance(kind.answers, str) else kind().answers  # it may depend on a field
        except (UserError, TypeError):  # of another package: it cannot be imported, or has a field without a default
            continue
        found += [name] * (answer in answers)
    return " or ".join(found)


@dataclass(frozen=True)
class TaskConfig(Section, section="task", kinds=TASKS):
    """What a model is trained to do. Your own task derives from this class and implements `build` and `examples`."""

    answers: ClassVar[Answers] = ""
    reads: ClassVar[tuple[str, ...]] = ()
    """Fields of `data` that its losses read themselves."""

    @property
    def kind(self) -> str:
        """The task's name, such as vae."""
        return TASKS.name_of(type(self))

    @abstractmethod
    def build(self, model: Model, data: DataConfig) -> Task:
        """Join the model with its losses, metrics and batches.

        Raises:
            UserError: this task cannot train such a model.
        """

    @abstractmethod
    def examples(self, opening: Opening) -> Source:
        """Make examples from a source, usually with a function of `data.examples`.

        Raises:
            UserError: the source does not provide what the task needs.
        """


@dataclass(frozen=True)
class ScoredConfig(TaskConfig):
    """A task whose loss is the cross-entropy of classes or tokens."""

    label_smoothing: Dropped = 0.0
    """Fraction of the target's probability that is spread over all classes (label smoothing; Szegedy et al. 2016)."""
    z_loss: Weight = 0.0
    """Weight of log(Z)^2, which keeps logits from drifting (PaLM, section 5)."""

    def score(self, logits: jax.Array, targets: jax.Array) -> Scores:
        """Return the sums over all targets that count."""
        return cross_entropy(logits, targets, self.label_smoothing, self.z_loss)


def forward(
    task_model: tuple[str, Model], params: Params, stats: Params, *args: Any, train: bool = False, **kwargs: Any
) -> tuple[Any, Params]:
    """Apply one of a task's networks and thread its batch statistics: returns (outputs, all statistics)."""
    name, model = task_model
    if name not in stats:
        return model.apply(params[name], *args, train=train, **kwargs), stats
    out, new = model.apply(params[name], *args, stats=stats[name], train=train, **kwargs)
    return out, {**stats, name: new}


def scored(score: Callable[..., tuple[Scores, Params]]) -> tuple[Callable[..., Any], Callable[..., Sums]]:
    """Build loss and metrics of a task that has one set of scores: `score(params, stats, batch, train=…, rng=…)`."""

    def loss(params: Params, stats: Params, batch: Batch, rng: jax.Array, step: Any = 0) -> tuple[jax.Array, Aux]:
        s, stats = score(params, stats, batch, train=True, rng=rng)
        return s.objective, Aux(s.count, {"loss": (s.objective, s.count), "accuracy": (s.correct, s.count)}, stats)

    def metrics(params: Params, stats: Params, batch: Batch) -> Sums:
        s, _ = score(params, stats, batch)
        return {"loss": (s.loss, s.count), "accuracy": (s.correct, s.count)}

    return loss, metrics


OF_LANGUAGE: Mapping[str, Better] = {"accuracy": "max", "perplexity": "min", "bits_per_byte": "min"}
"""Which values of a language model's metrics are better."""


def perplexity(totals: Totals, classes: Sequence[str] = ()) -> dict[str, float]:
    """Add the perplexity of a loss in nats to the metrics; for a language model's `summarize`."""
    values = divide(totals)
    if values.get("loss", np.inf) < np.log(np.finfo(float).max):  # beyond that it overflows
        values["perplexity"] = float(np.exp(values["loss"]))
    return values


def language_task(model: Model, loss: Loss, metrics: Callable[..., Sums], fields: Contract, **more: Any) -> Task:
    """Join a language model with its loss: what is counted are tokens, and its perplexity is reported."""
    counts: dict[str, Any] = {"unit": "tokens", "needs": "a target of 0 or above"}
    return Task({"model": model}, (loss,), metrics, fields, summarize=perplexity, better=OF_LANGUAGE, **counts, **more)


def divide(totals: Mapping[str, tuple[Any, Any]]) -> dict[str, float]:
    """Divide sums into metrics; a mean over nothing is left out."""
    for name, (total, _) in totals.items():
        if np.size(total) != 1:
            raise UserError(f"got a sum of shape {np.shape(total)} as metric {name!r}, expected a number, try its sum")
    return {name: float(total) / float(count) for name, (total, count) in totals.items() if count > 0}


def tokens(data: DataConfig, below: int | None = None, optional: bool = False, usual: bool = False) -> BatchField:
    """Token ids (T,), or something that goes with each token."""
    return BatchField((data.seq_len,), np.int32, ("seq",), below, optional=optional, usual=usual)


def packed(data: DataConfig) -> dict[str, BatchField]:
    """Fields that a row of several texts has besides its tokens; batches of windows lack them."""
    return {name: tokens(data, optional=not data.pack) for name in ("segment_ids", "positions")}


def numbers(shape: Sequence[int]) -> BatchField:
    """Numbers of an example; with height, width and channels they are pixels, which the data have as bytes."""
    return BatchField(tuple(shape), np.float32, stored=np.uint8 if len(shape) == 3 else None)


def floats(x: jax.Array) -> jax.Array:
    """Scale bytes (images as stored) to [0, 1] and 16 bits (sounds) to [-1, 1]; return anything else unchanged."""
    scale = {jnp.dtype(jnp.uint8): 255.0, jnp.dtype(jnp.int16): 32768.0}.get(x.dtype)
    return x if scale is None else x.astype(jnp.float32) / scale


def normalized(x: jax.Array, data: DataConfig) -> jax.Array:
    """Normalize images (B, H, W, C) of bytes or in [0, 1]: subtract `data.mean` per channel, divide by `data.std`."""
    x = floats(x)
    return (x - jnp.array(data.mean, x.dtype)) / jnp.array(data.std, x.dtype) if data.mean else x


def rows(batch: Batch) -> jax.Array:
    """Return 1 for each example that counts, (B,) float32: 0 if its weight is 0, its label below 0, or all of several.

    Labels (B,) that are not integers are numbers to predict, which may be below 0.
    """
    size = len(next(iter(batch.values())))
    labels = batch.get("labels", jnp.zeros(size, int))
    if labels.ndim == 1 and jnp.issubdtype(labels.dtype, jnp.floating):
        labels = jnp.zeros(size, int)
    return (counted(batch, labels.reshape(size, -1).max(-1)) >= 0).astype(jnp.float32)


def counted(batch: Batch, labels: jax.Array) -> jax.Array:
    """Return labels or targets (B, …), set to IGNORED in the batch's rows of weight 0."""
    if "weight" not in batch:
        return labels
    return jnp.where(batch["weight"].reshape(-1, *(1,) * (labels.ndim - 1)) > 0, labels, IGNORED)


def seeds(inputs: jax.Array) -> jax.Array:
    """Hash each example to a number, (B,) uint32."""
    words = jax.lax.bitcast_convert_type(inputs.astype(jnp.float32), jnp.uint32).reshape(len(inputs), -1)
    words = words ^ (words >> 16)  # short fractions have low bits of 0
    odd = (2 * jnp.arange(words.shape[1], dtype=jnp.uint32) + 1) * jnp.uint32(2654435769)
    return (words * odd).sum(1, dtype=jnp.uint32)


def uniform_of(inputs: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draw numbers (B, …) in [0, 1) as a function of each example alone."""
    key = jax.random.key(1)
    return jax.vmap(lambda seed: jax.random.uniform(jax.random.fold_in(key, seed), shape))(seeds(inputs))


def noise_of(inputs: jax.Array, size: int) -> jax.Array:
    """Draw standard normal noise (B, size) as a function of each example alone, so that evaluation is one too."""
    key = jax.random.key(0)
    return jax.vmap(lambda seed: jax.random.normal(jax.random.fold_in(key, seed), (size,)))(seeds(inputs))
