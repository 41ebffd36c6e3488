"""The sections of an experiment, as frozen dataclasses."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from jaxmodels.errors import UserError


def _at_least(name: str, least: int, **fields: float | None) -> None:
    """Check numbers of a section; for its `__post_init__`."""
    for field, value in fields.items():
        if value is not None and value < least:
            raise UserError(
                f"got {name}.{field} {value}, expected at least {least}, try --{name}.{field.replace('_', '-')} {least}"
            )


def _shares(section: str, **fields: float) -> None:
    """Check that fields of a section lie in [0, 1); for its `__post_init__`."""
    for field, value in fields.items():
        if not 0 <= value < 1:
            raise UserError(
                f"got {section}.{field} {value}, expected a share from 0 up to 1, "
                f"try --{section}.{field.replace('_', '-')} 0.1"
            )


@dataclass(frozen=True)
class TaskConfig:
    """What the model is trained to do."""

    name: Literal["causal_lm", "masked_lm", "classification", "seq2seq", "contrastive", "vae", "gan"] = "causal_lm"
    """causal_lm: predict each next token; masked_lm: tokens taken out of a text; classification: one label an example;
    seq2seq: each next token of a target, from a source; contrastive: which text goes with which image;
    vae: a code for each image; gan: a generator of images."""
    label_smoothing: float = 0.0
    """Share of the target's probability spread over all classes (Szegedy et al. 2016)."""
    z_loss: float = 0.0
    """Weight of log(Z)^2, which keeps logits from drifting (PaLM, section 5)."""
    multi_label: bool = False
    """Whether an example may have any number of classes, each judged by itself (classification)."""
    mixup: float = 0.0
    """Examples are blended in pairs, by shares of Beta(mixup, mixup) (classification; Zhang et al. 2018); 0: never."""
    cutmix: float = 0.0
    """A rectangle of each image is another's, of a share of Beta(cutmix, cutmix) (Yun et al. 2019); 0: never. With
    mixup too, each batch has one of them."""
    mask_fraction: float = 0.15
    """Share of a text's tokens that are taken out (masked_lm; Devlin et al. 2018)."""
    mask_token: int | None = None
    """Id that stands in their places (masked_lm); None: the last of the vocabulary."""
    keep: tuple[int, ...] = ()
    """Ids that are never taken out (masked_lm), such as those of [PAD], [CLS] and [SEP]."""
    pixels: Literal["bernoulli", "gaussian"] = "bernoulli"
    """How pixels spread around what a vae decodes: bernoulli: cross-entropy; gaussian, of variance 1: half the squared
    error and a constant."""
    binarise: bool = False
    """Whether a vae sees each pixel as 0 or 1, drawn anew with its brightness as the probability."""
    beta: float = 1.0
    """Weight of the divergence of the codes from the prior (vae; Higgins et al. 2017)."""
    beta_warmup_steps: int = 0
    """Steps over which that weight grows from 0 (vae; Bowman et al. 2016)."""
    critic_steps: int = 1
    """Updates of the discriminator for each one of the generator, each on its own share of the batch (gan)."""
    gradient_penalty: float = 10.0
    """Weight of the penalty on the critic's gradient (gan of kind wgan-gp; Gulrajani et al. 2017)."""

    def __post_init__(self) -> None:
        if not 0 < self.mask_fraction < 1:
            raise UserError(
                f"got task.mask_fraction {self.mask_fraction}, expected a share above 0 and below 1, "
                "try --task.mask-fraction 0.15"
            )
        _shares("task", label_smoothing=self.label_smoothing)
        _at_least("task", 1, critic_steps=self.critic_steps)
        _at_least("task", 0, mixup=self.mixup, cutmix=self.cutmix, beta_warmup_steps=self.beta_warmup_steps)


@dataclass(frozen=True)
class DataConfig:
    """Where batches come from."""

    source: Literal["stdlib", "text", "tfds", "images", "table", "huggingface", "tokens", "synthetic"] = "stdlib"
    """stdlib: Python's own standard library as text; text: files; tfds: TensorFlow Datasets; images: a folder with one
    folder of images a class; table: CSV, JSON lines or Parquet; huggingface: a set of the `datasets` library;
    tokens: a memory-mapped token file; synthetic: random batches of the right shape."""
    path: tuple[str, ...] = ()
    """Files or globs (text, table), token files (tokens), or the folder (images): of a folder of images a class, or of
    MNIST's own idx files."""
    eval_path: tuple[str, ...] = ()
    """The same, to evaluate on; where not given, a share of `path` is (`eval_fraction`)."""
    dir: str | None = None
    """TFDS data directory (source=tfds); TFDS's own default when not given."""
    name: str = ""
    """Name of the set, with or without a version: mnist, sst2/1.0.0 (tfds); of several texts with + (sst2+multi30k);
    a name of the hub or a folder (huggingface)."""
    train_split: str = "train"
    """Split to train on, in TFDS's own notation (tfds, huggingface)."""
    eval_split: str = "validation"
    """Split to evaluate on, in TFDS's own notation (tfds, huggingface): validation, test, train[90%:]."""
    input_field: str = ""
    """Field of a record that is the model's input; found by itself where there is only one; sentence+en: one for each
    of several sets."""
    label_field: str = "label"
    """Field of a record that holds the class, or several."""
    target_field: str = ""
    """Field of a record that holds the translation (seq2seq)."""
    group_field: str = ""
    """Field of a record that names its group: each metric is given for each group too, and the largest difference."""
    class_names: tuple[str, ...] = ()
    """Names of the classes in captions, where the set's own will not do."""
    captions: tuple[str, ...] = ()
    """Captions of an image by its class (contrastive): "the digit {label}"; each example has one of them."""
    eval_fraction: float = 0.1
    """Share held out for evaluation where the source has no splits: by a hash of the record (images, table) or file
    (stdlib, text of several files), so that none ever changes side; else the last part (text of one file, tokens)."""
    bad_records: int = 100
    """Records that cannot be read are named, counted and left out, up to so many."""
    balance: bool = False
    """Whether each class comes equally often in training, examples of the smaller ones more than once an epoch."""
    tokenizer: str = "bytes"
    """bytes, chars, the path of a Hugging Face tokenizer.json or of a folder with one; bpe:8000 or words:8000: a
    vocabulary of at most that size, made from the texts to train on."""
    seq_len: int = 256
    """Tokens an example (T)."""
    pack: bool = False
    """Whether rows hold as many whole texts as fit, kept apart by segment ids, instead of one text, or a window of all
    texts joined (causal_lm, masked_lm, seq2seq)."""
    mean: tuple[float, ...] = ()
    """Taken from each channel of images in [0, 1], before `std` divides."""
    std: tuple[float, ...] = ()
    """What each channel is divided by."""
    batch_size: int = 16
    """Examples a step, over all devices and hosts (B)."""
    prefetch: int = 2
    """Batches made ahead of the step."""
    threads: int = 4
    """Threads that decode and change images."""
    pixels: Literal["pillow", "opencv"] = "pillow"
    """What decodes JPEG and resizes images: pillow, which averages all pixels that shrink into one; opencv (extra
    `opencv`), in half the time, from the four nearest pixels where an image shrinks to more than half."""

    def __post_init__(self) -> None:
        _at_least("data", 1, seq_len=self.seq_len, batch_size=self.batch_size, threads=self.threads)
        _at_least("data", 0, bad_records=self.bad_records)
        if len(self.mean) != len(self.std):
            raise UserError(
                f"got data.mean {self.mean} and data.std {self.std}, expected one number of each for a channel, "
                "try --data.mean 0.5 --data.std 0.5"
            )


@dataclass(frozen=True)
class AugmentConfig:
    """How images of the training set are changed, in this order, at random in each epoch. Evaluation has none of it."""

    crop: float | None = None
    """Smallest share of an image's area that a random crop has, between 3:4 and 4:3, resized to the model's input
    (Szegedy et al. 2014); None: whole images. Evaluation then sees the central 7/8."""
    flip: bool = False
    """Whether half of the images are mirrored."""
    shift: int = 0
    """Pixels that an image moves by, at most, in each direction."""
    rotate: float = 0.0
    """Degrees that an image turns by, at most, either way."""
    colour: float = 0.0
    """Change of brightness, contrast and saturation, at most (0.4: factors from 0.6 to 1.4)."""
    randaugment: int = 0
    """Operations drawn for each image (Cubuk et al. 2020)."""
    magnitude: float = 9.0
    """Strength of those operations, from 0 to 10."""
    cutout: int = 0
    """Side of a square that is blanked (DeVries & Taylor 2017)."""

    def __post_init__(self) -> None:
        _at_least("augment", 0, shift=self.shift, randaugment=self.randaugment, cutout=self.cutout, rotate=self.rotate)
        _at_least("augment", 0, colour=self.colour, magnitude=self.magnitude)
        if self.crop is not None and not 0 < self.crop <= 1:
            raise UserError(
                f"got augment.crop {self.crop}, expected a share above 0 and up to 1, try --augment.crop 0.08"
            )


@dataclass(frozen=True)
class OptimConfig:
    """How the loss is minimised (Optax)."""

    name: Literal["adamw", "adam", "sgd", "momentum", "rmsprop", "adafactor", "lion", "muon"] = "adamw"
    """The update rule."""
    peak_lr: float = 1e-3
    """Learning rate after the warm-up."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape after the warm-up; wsd: constant, then linear decay over the last `decay_fraction` of the steps."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0: the first has 1 / warmup_steps of the peak, the last of them the peak."""
    final_lr_fraction: float = 0.1
    """Learning rate of the last step as a share of the peak (cosine, linear, wsd)."""
    decay_fraction: float = 0.2
    """Share of the steps, the last ones, that wsd decays over."""
    b1: float = 0.9
    """First-moment decay (momentum's and Muon's too)."""
    b2: float = 0.95
    """Second-moment decay (RMSprop's too)."""
    eps: float = 1e-8
    """Added to the denominator."""
    weight_decay: float = 0.1
    """Decoupled weight decay."""
    decay_on: tuple[Literal["matrix", "embedding", "bias", "norm"], ...] = ("matrix", "embedding")
    """Kinds of parameter that are decayed."""
    clip_norm: float | None = 1.0
    """Largest global norm of the gradient; None: no clipping."""
    freeze: tuple[str, ...] = ()
    """Patterns of parameters that stay as they are: embed/*, layers/*, layers[:6]/* (the first six of a stack)."""
    layer_decay: float = 1.0
    """Factor of the learning rate from each layer to the one below it (ELECTRA; Clark et al. 2020)."""
    offload: bool = False
    """Keep the optimizer's state in the hosts' memory; it comes to the devices for the update alone."""


@dataclass(frozen=True)
class TrainConfig:
    """The run."""

    steps: int = 1000
    """Optimizer steps."""
    seed: int = 0
    """Decides initial parameters, data order and dropout."""
    accumulate: int = 1
    """Microbatches a step; gradients are summed over them, so the result is that of the whole batch."""
    strategy: Literal["jit", "pmap"] = "jit"
    """jit: sharded by the mesh; pmap: replicated data parallelism, equal in result."""
    ema: float | None = None
    """Decay of the moving average of the parameters, which evaluation then uses; None: none."""
    quantize: Literal["none", "int8", "float8"] = "none"
    """Type of the products with the weights of blocks, forward and backward; parameters and optimizer stay float32."""
    quantize_axes: tuple[Literal["embed", "heads", "kv_heads", "head_dim", "mlp"], ...] = (
        "embed", "heads", "kv_heads", "head_dim", "mlp",
    )  # fmt: skip
    """Which of them: weights that have none but these logical axes; embed mlp: the MLPs alone."""
    xla: tuple[str, ...] = ()
    """Options of XLA for the step, as NAME=VALUE: xla_tpu_scoped_vmem_limit_kib=65536; plans are made with them too."""

    def __post_init__(self) -> None:
        _at_least("train", 1, steps=self.steps, accumulate=self.accumulate)
        for option in self.xla:
            if not re.fullmatch(r"xla_\w+=.+", option):
                raise UserError(
                    f"got train.xla {option!r}, expected NAME=VALUE, try xla_tpu_scoped_vmem_limit_kib=65536"
                )


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation while training."""

    every: int = 0
    """Steps between evaluations; 0: only after the last step."""
    batches: int | None = None
    """Batches of an evaluation; None: the whole set once."""
    batch_size: int | None = None
    """Examples a batch; None: as in training."""
    early_stop: int | None = None
    """Stop after so many evaluations without a better `metric`; None: never."""
    metric: str = "eval/loss"
    """What 'better' is judged by, for early stopping and for the best checkpoint."""
    mode: Literal["min", "max"] = "min"
    """Whether a lower or a higher `metric` is better."""

    def __post_init__(self) -> None:
        _at_least("eval", 1, batches=self.batches, batch_size=self.batch_size, early_stop=self.early_stop)


@dataclass(frozen=True)
class CheckpointConfig:
    """What is saved, and when."""

    every: int = 500
    """Steps between checkpoints; the last step is always saved; 0: only that one."""
    keep: int = 2
    """Newest checkpoints kept, beside the best one."""
    best: bool = False
    """Keep the checkpoint that is best by `eval.metric` (saved after each evaluation that improves on it)."""

    def __post_init__(self) -> None:
        _at_least("checkpoint", 1, keep=self.keep)


@dataclass(frozen=True)
class MeshConfig:
    """How devices are divided. One axis may be -1: the devices that are left.

    The first axes go across the slow network, between slices of TPUs or nodes of GPUs. So with data = slices or nodes,
    fsdp = -1 the state is cut inside each and replicated over all (HSDP); with data = 1, fsdp = -1 it is cut over all.
    """

    data: int = -1
    """Replicas, each with its own share of the batch."""
    stage: int = 1
    """Stages of a pipeline, each with its share of the layers; outside the layers, shards of the batch."""
    fsdp: int = 1
    """Shards of parameters and optimizer state, and of the batch (ZeRO-3)."""
    expert: int = 1
    """Shards of the experts of a mixture, and of the batch."""
    context: int = 1
    """Shards of the tokens of each sequence, joined by ring attention (or by --model.attention ulysses)."""
    tensor: int = 1
    """Shards of heads, hidden units and vocabulary (Megatron)."""
    sequence: bool = False
    """Whether between a block's products tokens are split over `tensor` too (Megatron's sequence parallelism)."""
    microbatches: int = 0
    """Parts of a batch that follow each other through the stages, a multiple of them; 0: up to four times as many, as
    the batch divides. The first and last wait for (stage - 1) / (microbatches * rounds + stage - 1) of the time."""
    rounds: int = 1
    """How often a microbatch goes round all stages, each time through another slice of a stage's layers: the wait is
    shorter, and more is sent."""

    def __post_init__(self) -> None:
        _at_least("mesh", 0, microbatches=self.microbatches)
        _at_least("mesh", 1, rounds=self.rounds)


@dataclass(frozen=True)
class MetricsConfig:
    """What is reported."""

    every: int = 10
    """Steps between lines in metrics.jsonl."""
    tensorboard: bool = True
    """Write TensorBoard events too."""
    progress: Literal["auto", "live", "plain", "none"] = "auto"
    """live: a display that redraws; plain: a line each `every` steps; auto: live on a terminal."""

    def __post_init__(self) -> None:
        _at_least("metrics", 1, every=self.every)


@dataclass(frozen=True)
class ProfileConfig:
    """A trace of chosen steps, for TensorBoard or Perfetto."""

    steps: str = ""
    """FIRST:LAST (last one not included), as in 10:15; empty: no trace."""


@dataclass(frozen=True)
class InitConfig:
    """Where the parameters start."""

    source: str | None = None
    """A run directory, or one in Hugging Face's format, whose parameters to start from; None: random."""
    fresh: tuple[str, ...] = ()
    """Patterns of parameters that start at random all the same, such as head/*: the rest must be in the source."""


@dataclass(frozen=True)
class Config:
    """An experiment."""

    model: Any
    """The model: a family's config, such as GPT2Config(layers=6)."""
    task: TaskConfig = TaskConfig()
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    mesh: MeshConfig = MeshConfig()
    metrics: MetricsConfig = MetricsConfig()
    profile: ProfileConfig = ProfileConfig()
    init: InitConfig = InitConfig()
