"""The section `data` of an experiment: the fields that sources share, and what each source gives."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from jaxmodels.errors import UserError
from jaxmodels.fields import Dim, Dropped, Named, Natural, Positive, Range, Section, Share, Workers
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
        "huggingface": "jaxmodels.data.huggingface:HuggingFace",
        "tokens": "jaxmodels.data.tokens:Tokens",
        "synthetic": "jaxmodels.data.synthetic:Synthetic",
    },
)
TRANSFORMS = Registry("transform", "jaxmodels.transforms", {}, function_of("image", "rng"))


@dataclass(frozen=True)
class DataConfig(Section, section="data", kinds=SOURCES):
    """Where examples come from, and how many make a batch.

    A source gives records, or texts, or tokens, and a task makes its examples of them; a method that a source does not
    have refuses the tasks that need it. Most sources of one's own derive from `RecordsConfig` and have one method.
    """

    seq_len: Dim = 256
    """Tokens an example (T)."""
    mean: tuple[float, ...] = ()
    """Taken from each channel of images in [0, 1], before `std` divides."""
    std: tuple[Positive, ...] = ()
    """What each channel is divided by."""
    batch_size: Dim = 16
    """Examples a step, over all devices and hosts (B)."""
    prefetch: Annotated[int, Range(0, 1024)] = 2
    """Batches made ahead of the step."""

    # what others read of any source; fields of those that have a use for them
    name = ""
    tokenizer = ""
    pack = False
    threads = 4
    pixels: ClassVar[Any] = "pillow"
    input_field = ""
    captions: ClassVar[Any] = ()
    class_names: ClassVar[Any] = ()
    prompt: ClassVar[str] = "\n"
    """What a sample from a model of its texts begins with."""
    real: ClassVar[bool] = True
    """Whether its examples mean anything."""
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

    def windows(self, split: Split, vocab_size: int | None) -> Windows:
        """Open the tokens of all texts of a split, one text after the other, in windows of `seq_len`."""
        from jaxmodels.data import corpus

        return corpus.windows(self.corpus(), self, split, vocab_size)

    def examples(self, opening: Opening, task: Any) -> Source:
        """Make the examples of a split for a task."""
        return task.examples(opening)

    def of_kind(self, name: str) -> DataConfig:
        """Another source, by its name, with the fields that say how a model sees what it is given."""
        kind: type[DataConfig] = SOURCES.find(name)
        own, theirs = ({field.name for field in dataclasses.fields(each)} for each in (self, kind))
        return kind(**{name: getattr(self, name) for name in _SEEN if name in own & theirs})

    def evaluated_on(self, fields: Mapping[str, Any]) -> DataConfig:
        """The source with these fields changed, to evaluate on all that they name."""
        return dataclasses.replace(self, **fields)


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
    transforms: tuple[Annotated[str, Named(TRANSFORMS)], ...] = ()
    """Changes of your own behind all others, package.module:name: functions of an image, uint8 (H, W, C), and a
    `numpy.random.Generator`, which give such an image."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.magnitude != (usual := default(self, "magnitude")) and not self.randaugment:
            raise UserError(
                f"got augment.magnitude {self.magnitude} without augment.randaugment, whose strength it is, expected "
                f"both, try --augment.randaugment 2 or --augment.magnitude {usual}"
            )


@dataclass(frozen=True)
class TextsConfig(DataConfig):
    """A source of texts."""

    tokenizer: str = "bytes"
    """bytes, chars, the path of a Hugging Face tokenizer.json or of a folder with one; bpe:8000 or words:8000: a
    vocabulary of at most that size, made from the texts to train on; package.module:Name: one of your own."""
    pack: bool = False
    """Whether rows hold as many whole texts as fit, kept apart by segment ids, instead of one text, or a window of all
    texts joined (causal_lm, masked_lm, seq2seq)."""


@dataclass(frozen=True)
class RecordsConfig(TextsConfig):
    """A source of records with fields; one of its own has its fields, and `records(split)`."""

    input_field: str = ""
    """Field of a record that is the model's input; found by itself where there is only one; sentence+en: one for each
    of several sets."""
    label_field: str = "label"
    """Field of a record that holds the class, or several."""
    target_field: str = ""
    """Field of a record that holds the translation (seq2seq)."""
    group_field: str = ""
    """Field of a record that names its group: each metric is given for each group too, and the largest difference."""
    class_names: tuple[str, ...] = ()  # pyright: ignore[reportIncompatibleVariableOverride]
    """Names of the classes in captions, where the set's own will not do."""
    captions: tuple[str, ...] = ()  # pyright: ignore[reportIncompatibleVariableOverride]
    """Captions of an image by its class (contrastive): "the digit {label}"; each example has one of them."""
    bad_records: Natural = 100
    """Records that cannot be read are named, counted and left out, up to so many."""
    balance: bool = False
    """Whether each class comes equally often in training, examples of the smaller ones more than once an epoch."""
    threads: Workers = 4
    """Threads that decode and change images."""
    pixels: Literal["pillow", "opencv"] = "pillow"  # pyright: ignore[reportIncompatibleVariableOverride]
    """What decodes JPEG and resizes images: pillow, which averages all pixels that shrink into one; opencv (extra
    `opencv`), in half the time, from the four nearest pixels where an image shrinks to more than half."""

    @abstractmethod
    def records(self, split: Split) -> Records: ...

    def corpus(self) -> Corpus:
        from jaxmodels.data import examples

        return examples.corpus_of(self)


@dataclass(frozen=True)
class FilesConfig(DataConfig):
    """A source in files, of which a share is held out."""

    instead: ClassVar[str] = "--data.path FILE"

    path: tuple[str, ...] = ()
    """Files or globs; for images the folder, of a folder of images a class or of MNIST's own idx files."""
    eval_path: tuple[str, ...] = ()
    """The same, to evaluate on; where not given, a share of `path` is (`eval_fraction`)."""
    eval_fraction: Dropped = 0.1
    """Share held out for evaluation where there is no `eval_path`: by a hash of the record (images, table) or file
    (text of several files), so that none ever changes side; else the last part (text of one file, tokens)."""

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

    instead: ClassVar[str] = "--split test"

    name: str = ""
    """Name of the set: mnist, sst2/1.0.0, of several texts with + (tfds); of the hub, or a folder (huggingface)."""
    train_split: str = "train"
    """Split to train on, in TFDS's own notation."""
    eval_split: str = "validation"
    """Split to evaluate on, in TFDS's own notation: validation, test, train[90%:]."""

    def evaluated_on(self, fields: Mapping[str, Any]) -> DataConfig:
        if {"name", "eval_split", "dir"} & set(fields):
            # a set that is evaluated on need not have the split that was trained on
            fields = {"train_split": fields.get("eval_split", self.eval_split), **fields}
        return dataclasses.replace(self, **fields)


def default(section: Any, name: str) -> Any:
    """What a field of a section is where it has not been set."""
    return next(field.default for field in dataclasses.fields(section) if field.name == name)


_SEEN = ("seq_len", "pack", "mean", "std", "batch_size", "prefetch", "threads", "pixels", "captions", "class_names")

SHARED: Sequence[str] = tuple(
    field.name for field in dataclasses.fields(RecordsConfig) if field.name not in ("batch_size", "prefetch")
)
"""Fields that not every task has a use for: who makes its examples says which he reads."""
