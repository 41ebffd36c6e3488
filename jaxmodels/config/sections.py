"""The sections of an experiment, as frozen dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, is_dataclass
from typing import Annotated, Any, Literal

from jaxmodels.errors import UserError
from jaxmodels.fields import (
    Dim,
    Dropped,
    Natural,
    Positive,
    Range,
    Section,
    Share,
    Weight,
    Workers,
    shown,
)
from jaxmodels.models.config import ModelConfig
from jaxmodels.parallel.mesh import Mesh
from jaxmodels.train.optim import AdamW, OptimConfig
from jaxmodels.train.sections import Checkpoint, Eval, Init, Metrics, Profile, Train


@dataclass(frozen=True)
class TaskConfig(Section, section="task"):
    """What the model is trained to do."""

    name: Literal["causal_lm", "masked_lm", "classification", "seq2seq", "contrastive", "vae", "gan"] = "causal_lm"
    """causal_lm: predict each next token; masked_lm: tokens taken out of a text; classification: one label an example;
    seq2seq: each next token of a target, from a source; contrastive: which text goes with which image;
    vae: a code for each image; gan: a generator of images."""
    label_smoothing: Dropped = 0.0
    """Share of the target's probability spread over all classes (Szegedy et al. 2016)."""
    z_loss: Weight = 0.0
    """Weight of log(Z)^2, which keeps logits from drifting (PaLM, section 5)."""
    multi_label: bool = False
    """Whether an example may have any number of classes, each judged by itself (classification)."""
    mixup: Weight = 0.0
    """Examples are blended in pairs, by shares of Beta(mixup, mixup) (classification; Zhang et al. 2018); 0: never."""
    cutmix: Weight = 0.0
    """A rectangle of each image is another's, of a share of Beta(cutmix, cutmix) (Yun et al. 2019); 0: never. With
    mixup too, each batch has one of them."""
    mask_fraction: Annotated[float, Range(above=0, below=1)] = 0.15
    """Share of a text's tokens that are taken out (masked_lm; Devlin et al. 2018)."""
    mask_token: Natural | None = None
    """Id that stands in their places (masked_lm); None: the last of the vocabulary."""
    keep: tuple[Natural, ...] = ()
    """Ids that are never taken out (masked_lm), such as those of [PAD], [CLS] and [SEP]."""
    pixels: Literal["bernoulli", "gaussian"] = "bernoulli"
    """How pixels spread around what a vae decodes: bernoulli: cross-entropy; gaussian, of variance 1: half the squared
    error and a constant."""
    binarise: bool = False
    """Whether a vae sees each pixel as 0 or 1, drawn anew with its brightness as the probability."""
    beta: Weight = 1.0
    """Weight of the divergence of the codes from the prior (vae; Higgins et al. 2017)."""
    beta_warmup_steps: Natural = 0
    """Steps over which that weight grows from 0 (vae; Bowman et al. 2016)."""
    critic_steps: Annotated[int, Range(1, 1000)] = 1
    """Updates of the discriminator for each one of the generator, each on its own share of the batch (gan)."""
    gradient_penalty: Weight = 10.0
    """Weight of the penalty on the critic's gradient (gan of kind wgan-gp; Gulrajani et al. 2017)."""


@dataclass(frozen=True)
class DataConfig(Section, section="data"):
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
    eval_fraction: Dropped = 0.1
    """Share held out for evaluation where the source has no splits: by a hash of the record (images, table) or file
    (stdlib, text of several files), so that none ever changes side; else the last part (text of one file, tokens)."""
    bad_records: Natural = 100
    """Records that cannot be read are named, counted and left out, up to so many."""
    balance: bool = False
    """Whether each class comes equally often in training, examples of the smaller ones more than once an epoch."""
    tokenizer: str = "bytes"
    """bytes, chars, the path of a Hugging Face tokenizer.json or of a folder with one; bpe:8000 or words:8000: a
    vocabulary of at most that size, made from the texts to train on."""
    seq_len: Dim = 256
    """Tokens an example (T)."""
    pack: bool = False
    """Whether rows hold as many whole texts as fit, kept apart by segment ids, instead of one text, or a window of all
    texts joined (causal_lm, masked_lm, seq2seq)."""
    mean: tuple[float, ...] = ()
    """Taken from each channel of images in [0, 1], before `std` divides."""
    std: tuple[Positive, ...] = ()
    """What each channel is divided by."""
    batch_size: Dim = 16
    """Examples a step, over all devices and hosts (B)."""
    prefetch: Annotated[int, Range(0, 1024)] = 2
    """Batches made ahead of the step."""
    threads: Workers = 4
    """Threads that decode and change images."""
    pixels: Literal["pillow", "opencv"] = "pillow"
    """What decodes JPEG and resizes images: pillow, which averages all pixels that shrink into one; opencv (extra
    `opencv`), in half the time, from the four nearest pixels where an image shrinks to more than half."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.mean) != len(self.std):
            raise UserError(
                f"got data.mean {self.mean} and data.std {self.std}, expected one number of each for a channel, "
                "try --data.mean 0.5 --data.std 0.5"
            )


@dataclass(frozen=True)
class Augment(Section, section="augment"):
    """How images of the training set are changed, in this order, at random in each epoch. Evaluation has none of it."""

    crop: Annotated[float, Range(above=0, most=1)] | None = None
    """Smallest share of an image's area that a random crop has, between 3:4 and 4:3, resized to the model's input
    (Szegedy et al. 2014); None: whole images. Evaluation then sees the central 7/8."""
    flip: bool = False
    """Whether half of the images are mirrored."""
    shift: Natural = 0
    """Pixels that an image moves by, at most, in each direction."""
    rotate: Annotated[float, Range(0, 180)] = 0.0
    """Degrees that an image turns by, at most, either way."""
    colour: Share = 0.0
    """Change of brightness, contrast and saturation, at most (0.4: factors from 0.6 to 1.4)."""
    randaugment: Annotated[int, Range(0, 100)] = 0
    """Operations drawn for each image (Cubuk et al. 2020)."""
    magnitude: Annotated[float, Range(0, 10)] = 9.0
    """Strength of those operations, from 0 to 10."""
    cutout: Natural = 0
    """Side of a square that is blanked (DeVries & Taylor 2017)."""


@dataclass(frozen=True)
class AnyModel(ModelConfig):
    """The model's fields, which depend on its family: name a config first."""


@dataclass(frozen=True)
class Config(Section):
    """An experiment."""

    model: Any
    """The model: a family's config, such as GPT2Config(layers=6)."""
    task: TaskConfig = TaskConfig()
    """What the model is trained to do."""
    data: DataConfig = DataConfig()
    """Where batches come from."""
    augment: Augment = Augment()
    """How images of the training set are changed at random."""
    optim: OptimConfig = AdamW()
    """How the loss is minimised."""
    train: Train = Train()
    """Length, precision and strategy of training."""
    eval: Eval = Eval()
    """Evaluation while training."""
    checkpoint: Checkpoint = Checkpoint()
    """What is saved, and when."""
    mesh: Mesh = Mesh()
    """How devices are divided."""
    metrics: Metrics = Metrics()
    """What is reported."""
    profile: Profile = Profile()
    """A trace of chosen steps, for TensorBoard or Perfetto."""
    init: Init = Init()
    """Where the parameters start."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_dataclass(self.model) or isinstance(self.model, type):
            raise UserError(f"got model {shown(self.model)}, expected a family's config, such as GPT2Config(layers=6)")
