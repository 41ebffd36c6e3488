"""The config section `data`: the fields that sources share, and the methods that each source implements."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast

from jaxmodels.errors import UserError
from jaxmodels.fields import Dim, Dropped, Named, Natural, Positive, Range, Section, Share, Workers, default_of
from jaxmodels.registry import Registry, function_of

if TYPE_CHECKING:
    from jaxmodels.data.corpus import Corpus
    from jaxmodels.data.opening import Opening
    from jaxmodels.data.records import Records
    from jaxmodels.data.source import Source, Split, Windows

SOURCES = Registry(
    "data source",
    "jaxmodels.sources",
    {
        "stdlib": "jaxmodels.data.corpus:Stdlib",
        "text": "jaxmodels.data.corpus:Text",
        "tfds": "jaxmodels.data.tfds:TFDS",
        "images": "jaxmodels.data.folders:Images",
        "table": "jaxmodels.data.tables:Table",
        "squad": "jaxmodels.data.squad:SQuAD",
        "coco": "jaxmodels.data.coco:COCO",
        "huggingface": "jaxmodels.data.huggingface:HuggingFace",
        "tokens": "jaxmodels.data.tokens:Tokens",
        "interactions": "jaxmodels.data.interactions:Interactions",
        "synthetic": "jaxmodels.data.synthetic:Synthetic",
    },
)
TRANSFORMS = Registry("transform", "jaxmodels.transforms", {}, function_of("image", "rng"))


@dataclass(frozen=True)
class DataConfig(Section, section="data", kinds=SOURCES):
    """Where examples come from, and how many make a batch.

    A source has records, texts or tokens, from which a task makes its examples. A method that a source lacks refuses
    the tasks that need it. Most sources of your own derive from `RecordsConfig` and implement one method.
    """

    seq_len: Dim = 256
    """Tokens per example (T)."""
    mean: tuple[float, ...] = ()
    """Subtracted from each channel of images, scaled to [0, 1], before division by `std`."""
    std: tuple[Positive, ...] = ()
    """Each channel is divided by this."""
    batch_size: Dim = 16
    """Examples per step, over all devices and hosts (B)."""
    prefetch: Annotated[int, Range(0, 1024)] = 2
    """Batches prepared ahead of the step."""

    # read by others from any source; fields of those sources that use them, and so without annotations here
    name = ""
    tokenizer = ""
    pack = False
    threads = 4
    pixels = cast("Any", "pillow")
    input_field = ""
    captions = cast("Any", ())
    class_names = cast("Any", ())
    prompt: ClassVar[str] = "\n"
    """How a sample from a language model of its texts begins."""
    real: ClassVar[bool] = True
    """Whether its examples mean anything."""
    evaluated_by: ClassVar[tuple[str, ...]] = ()
    """Those of its own fields that say which data `jaxmodels eval` takes; the others say what a model sees of them. A
    kind of yours need not say so: all fields that only it has can then be given."""
    instead: ClassVar[str] = "--data table --data.path FILE"
    """Options that name other data to evaluate on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.mean) != len(self.std):
            raise UserError(
                f"got data.mean {self.mean} and data.std {self.std}, expected one number of each for a channel, "
                "try --data.mean 0.5 --data.std 0.5"
            )

    @property
    def kind(self) -> str:
        """The source's name, such as tfds."""
        return SOURCES.name_of(type(self))

    def records(self, split: Split) -> Records:
        """Open the records of a split.

        Raises:
            UserError: the source has none, or they cannot be read.
        """
        raise UserError(f"got data {self.kind}, expected a source of records, try --data tfds")

    def corpus(self) -> Corpus:
        """Open the source's texts.

        Raises:
            UserError: the source has none, or they cannot be read.
        """
        raise UserError(f"got data {self.kind}, expected a source of texts, try --data stdlib")

    def windows(self, split: Split, vocab_size: int | None) -> Windows | None:
        """Open the tokens of a split in windows of `seq_len`; None if it has no tokens, but texts."""
        return None

    def examples(self, opening: Opening, task: Any) -> Source:
        """Make the examples of a split for a task."""
        return task.examples(opening)

    def of_kind(self, name: str) -> DataConfig:
        """Build another source by its name, with those fields that say how a model sees its inputs."""
        kind: type[DataConfig] = SOURCES.find(name)
        own, theirs = ({field.name for field in dataclasses.fields(each)} for each in (self, kind))
        return kind(**{name: getattr(self, name) for name in _SEEN if name in own & theirs})

    def evaluated_on(self, fields: Mapping[str, Any]) -> DataConfig:
        """Return the source with these fields changed, to evaluate on everything they name."""
        return dataclasses.replace(self, **fields)


@dataclass(frozen=True)
class Augment(Section, section="augment"):
    """Random changes of training images, in this order and new in each epoch. Evaluation applies none of them."""

    crop: Annotated[float, Range(above=0, most=1)] | None = None
    """Smallest fraction of an image's area in a random crop with sides between 3:4 and 4:3, resized to the model's
    input (Szegedy et al. 2014). None: whole images. With crops, evaluation sees the central 7/8, but all of an image
    with a mask or boxes."""
    flip: bool = False
    """Whether to mirror half of the images."""
    shift: Natural = 0
    """Largest shift of an image in each direction, in pixels."""
    rotate: Annotated[float, Range(0, 180)] = 0.0
    """Largest rotation either way, in degrees."""
    colour: Share = 0.0
    """Largest change of brightness, contrast and saturation (0.4: factors from 0.6 to 1.4)."""
    randaugment: Annotated[int, Range(0, 100)] = 0
    """Number of random operations per image (RandAugment; Cubuk et al. 2020)."""
    magnitude: Annotated[float, Range(0, 10)] = 9.0
    """Strength of those operations, from 0 to 10."""
    cutout: Natural = 0
    """Side of a square that is blanked (Cutout; DeVries & Taylor 2017)."""
    transforms: tuple[Annotated[str, Named(TRANSFORMS)], ...] = ()
    """Changes of your own after all others, as package.module:name: functions of an image, uint8 (H, W, C), and a
    `numpy.random.Generator` that return such an image."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.magnitude != (usual := default(self, "magnitude")) and not self.randaugment:
            raise UserError(
                f"got augment.magnitude {self.magnitude} without augment.randaugment, to which it applies, expected "
                f"both, try --augment.randaugment 2 or --augment.magnitude {usual}"
            )


@dataclass(frozen=True)
class TextsConfig(DataConfig):
    """A source of texts."""

    tokenizer: str = "bytes"
    """bytes, chars, or the path of a Hugging Face tokenizer.json or of a folder with one. bpe:8000 or words:8000: a
    vocabulary of at most that size, trained on the training texts. package.module:Name: your own."""
    pack: bool = False
    """Whether a row holds as many whole texts as fit, separated by segment ids, rather than one text or a window of all
    texts joined."""


@dataclass(frozen=True)
class RecordsConfig(TextsConfig):
    """A source of records with named fields. Your own source defines its fields and `records(split)`.

    Its texts, where a task asks for them, are those of one field.
    """

    evaluated_by: ClassVar[tuple[str, ...]] = (
        "input_field", "label_field", "target_field", "group_field", "captions", "class_names", "bad_records",
    )  # fmt: skip

    input_field: str = ""
    """Record field that is the model's input; found automatically if there is only one. sentence+en: one for each of
    several sets."""
    label_field: str = "label"
    """Record field that holds the class, or several classes."""
    target_field: str = ""
    """Record field that holds the translation or the transcript of the input."""
    group_field: str = ""
    """Record field that names its group. Each metric is reported for each group, with the largest difference."""
    class_names: tuple[str, ...] = ()
    """Names of the classes, in captions and of what is marked on images, if the data's own are unsuitable."""
    captions: tuple[str, ...] = ()
    """Captions of an image by its class: "the digit {label}". Each example gets one of them."""
    bad_records: Natural = 100
    """How many unreadable records to tolerate. Each is named in the log, counted and left out."""
    balance: bool = False
    """Whether each class appears equally often in training; examples of smaller classes recur within an epoch."""
    threads: Workers = 4
    """Threads that decode sounds, and decode and augment images."""
    pixels: Literal["pillow", "opencv"] = "pillow"
    """Library that decodes JPEG and resizes images. pillow averages all pixels that are merged into one. opencv (extra
    `opencv`) takes half the time, and uses the four nearest pixels unless an image shrinks to less than half."""

    @abstractmethod
    def records(self, split: Split) -> Records: ...


@dataclass(frozen=True)
class FilesConfig(DataConfig):
    """A source in files, a fraction of which is held out."""

    evaluated_by: ClassVar[tuple[str, ...]] = ("path",)
    instead: ClassVar[str] = "--data.path FILE"

    path: tuple[str, ...] = ()
    """Files or globs. For images: a folder that has one folder per class, or MNIST's own idx files."""
    eval_path: tuple[str, ...] = ()
    """Files or globs to evaluate on. Empty: a fraction of `path` (`eval_fraction`)."""
    eval_fraction: Dropped = 0.1
    """Fraction held out for evaluation if there is no `eval_path`: by a hash of the record (images, table) or file
    (text in several files), so that the split is stable; otherwise the last part (text in one file, tokens)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eval_path and self.eval_fraction != (usual := default(self, "eval_fraction")):
            raise UserError(
                f"got data.eval_fraction {self.eval_fraction} and data.eval_path, expected one of them, "
                f"try --data.eval-fraction {usual}"
            )

    def evaluated_on(self, fields: Mapping[str, Any]) -> DataConfig:
        if "path" in fields:
            whole = {"eval_path": fields["path"], "eval_fraction": default(self, "eval_fraction")}
            fields = {**whole, **fields}
        return dataclasses.replace(self, **fields)


@dataclass(frozen=True)
class SplitsConfig(DataConfig):
    """A source of named sets with splits."""

    evaluated_by: ClassVar[tuple[str, ...]] = ("name", "eval_split")
    instead: ClassVar[str] = "--split test"

    name: str = ""
    """Name of the set: mnist or sst2/1.0.0, several text sets joined by + (tfds); on the hub, or a folder
    (huggingface)."""
    train_split: str = "train"
    """Split to train on, in TFDS's notation."""
    eval_split: str = "validation"
    """Split to evaluate on, in TFDS's notation: validation, test, train[90%:]."""

    def evaluated_on(self, fields: Mapping[str, Any]) -> DataConfig:
        if {"name", "eval_split", "dir"} & set(fields):
            # a set to evaluate on need not have the split that was trained on
            fields = {"train_split": fields.get("eval_split", self.eval_split), **fields}
        return dataclasses.replace(self, **fields)


def default(section: Any, name: str) -> Any:
    """Return the default of a section's field."""
    return next(default_of(field) for field in dataclasses.fields(section) if field.name == name)


_SEEN = ("seq_len", "pack", "mean", "std", "batch_size", "prefetch", "threads", "pixels", "captions", "class_names")

SHARED: Sequence[str] = tuple(
    field.name for field in dataclasses.fields(RecordsConfig) if field.name not in ("batch_size", "prefetch")
)
"""Fields that not every task uses: whoever makes a task's examples says which ones it reads."""
