"""An experiment as data: frozen dataclasses, and how they are loaded, overridden, explained and saved.

A config file defines `get_config() -> Config`; every field can be overridden as `--section.field value`.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import inspect
import itertools
import json
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

from jaxmodels.errors import UserError, nearest


def _at_least(name: str, least: int, **fields: int | None) -> None:
    """Check numbers of a section; for its `__post_init__`."""
    for field, value in fields.items():
        if value is not None and value < least:
            raise UserError(
                f"got {name}.{field} {value}, expected at least {least}, try --{name}.{field.replace('_', '-')} {least}"
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
    mask_fraction: float = 0.15
    """Share of a text's tokens that are taken out (masked_lm; Devlin et al. 2018)."""
    mask_token: int | None = None
    """Id that stands in their places (masked_lm); None: the last of the vocabulary."""
    keep: tuple[int, ...] = ()
    """Ids that are never taken out (masked_lm), such as those of [PAD], [CLS] and [SEP]."""
    beta: float = 1.0
    """Weight of the divergence of the codes from the prior (vae; Higgins et al. 2017)."""
    gradient_penalty: float = 10.0
    """Weight of the penalty on the critic's gradient (gan of kind wgan-gp; Gulrajani et al. 2017)."""

    def __post_init__(self) -> None:
        if not 0 < self.mask_fraction < 1:
            raise UserError(
                f"got task.mask_fraction {self.mask_fraction}, expected a share above 0 and below 1, "
                "try --task.mask-fraction 0.15"
            )


@dataclass(frozen=True)
class DataConfig:
    """Where batches come from."""

    source: Literal["stdlib", "text", "tfds", "tokens", "synthetic"] = "stdlib"
    """stdlib: Python's own standard library as text; text: files; tfds: a TensorFlow Datasets set;
    tokens: a memory-mapped token file; synthetic: random batches of the right shape."""
    path: tuple[str, ...] = ()
    """Files or globs (source=text), or token files (source=tokens)."""
    dir: str | None = None
    """TFDS data directory (source=tfds); TFDS's own default when not given."""
    name: str = ""
    """Name of the TFDS set, with or without a version: mnist, sst2/1.0.0."""
    train_split: str = "train"
    """Split to train on, in TFDS's own notation (source=tfds)."""
    eval_split: str = "validation"
    """Split to evaluate on, in TFDS's own notation (source=tfds): validation, test, train[90%:]."""
    input_field: str = ""
    """Field of a TFDS record that is the model's input; found by itself where there is only one."""
    label_field: str = "label"
    """Field of a TFDS record that holds the class."""
    eval_fraction: float = 0.1
    """Share held out for evaluation where the source has no splits: by file (stdlib, text of several
    files) or the last part (text of one file, tokens)."""
    tokenizer: str = "bytes"
    """bytes, chars, or the path of a Hugging Face tokenizer.json."""
    seq_len: int = 256
    """Tokens an example (T)."""
    batch_size: int = 16
    """Examples a step, over all devices and hosts (B)."""
    prefetch: int = 2
    """Batches made ahead of the step."""

    def __post_init__(self) -> None:
        _at_least("data", 1, seq_len=self.seq_len, batch_size=self.batch_size)


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
    """Steps of linear warm-up from 0."""
    final_lr_fraction: float = 0.1
    """Learning rate at the last step as a share of the peak (cosine, linear, wsd)."""
    decay_fraction: float = 0.2
    """Share of the steps that wsd decays over."""
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

    def __post_init__(self) -> None:
        _at_least("train", 1, steps=self.steps, accumulate=self.accumulate)


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
    """How devices are divided. One axis may be -1: the devices that are left."""

    data: int = -1
    """Replicas, each with its own share of the batch."""
    fsdp: int = 1
    """Shards of parameters and optimizer state, and of the batch (ZeRO-3)."""
    expert: int = 1
    """Shards of the experts of a mixture, and of the batch."""
    tensor: int = 1
    """Shards of heads, hidden units and vocabulary (Megatron)."""


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
    """A run directory whose parameters to start from; None: random."""


@dataclass(frozen=True)
class Config:
    """An experiment."""

    model: Any
    """The model: a family's config, such as GPT2Config(layers=6)."""
    task: TaskConfig = TaskConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    mesh: MeshConfig = MeshConfig()
    metrics: MetricsConfig = MetricsConfig()
    profile: ProfileConfig = ProfileConfig()
    init: InitConfig = InitConfig()


def load(path: str | Path) -> Config:
    """The config that a file's `get_config()` returns.

    Raises:
        UserError: no such file, no `get_config`, or an error inside it.
    """
    path = Path(path)
    if not path.is_file():
        near = [str(p) for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise UserError(f"got config {str(path)!r}, expected a Python file with get_config(){nearest(str(path), near)}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UserError(f"got config {str(path)!r}, expected a Python file with get_config()")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))  # so that a config can build on its neighbour
    try:
        spec.loader.exec_module(module)
    except (SyntaxError, ImportError, AttributeError, TypeError) as error:
        raise UserError(f"got config {str(path)!r} that fails with {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)
    if not hasattr(module, "get_config"):
        raise UserError(f"got config {str(path)!r} without get_config(), expected get_config() -> Config")
    config = module.get_config()
    if not isinstance(config, Config):
        raise UserError(f"got {type(config).__name__} from get_config() in {path}, expected jaxmodels.config.Config")
    return config


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every field by its dotted name."""
    found: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        found |= flatten(value, f"{prefix}{f.name}.") if dataclasses.is_dataclass(value) else {prefix + f.name: value}
    return found


def differences(a: Config, b: Config) -> dict[str, tuple[Any, Any]]:
    """Fields that differ, by dotted name: (in a, in b)."""
    left, right = flatten(a), flatten(b)
    return {
        name: (left.get(name), right.get(name)) for name in sorted(left | right) if left.get(name) != right.get(name)
    }


def to_json(config: Config) -> dict[str, Any]:
    """The config as JSON values, with the model's family."""
    from jaxmodels.models.functional import family_of

    return {
        **dataclasses.asdict(config),
        "model": {"family": family_of(config.model).name, **dataclasses.asdict(config.model)},
    }


def from_json(value: Mapping[str, Any]) -> Config:
    """The config that `to_json` wrote."""
    from jaxmodels.models.functional import family

    model = dict(value["model"])
    kind = family(model.pop("family")).config
    sections = {
        f.name: _decode(get_type_hints(Config)[f.name], value[f.name])
        for f in dataclasses.fields(Config)
        if f.name != "model" and f.name in value
    }
    return Config(model=_decode(kind, model), **sections)


def _decode(kind: Any, value: Any) -> Any:
    options = [arg for arg in getattr(kind, "__args__", ()) if dataclasses.is_dataclass(arg)]
    kind = options[0] if options and isinstance(value, Mapping) else kind
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        hints = get_type_hints(kind)
        known = {f.name for f in dataclasses.fields(kind)}
        if extra := set(value) - known:
            raise UserError(
                f"got unknown field {sorted(extra)[0]!r} for {kind.__name__}, expected one of "
                f"{', '.join(sorted(known))}, try the version that wrote this config"
            )
        return kind(**{name: _decode(hints[name], item) for name, item in value.items()})
    return tuple(_decode(None, item) for item in value) if isinstance(value, list) else value


def save(config: Config, path: Path, origin: Mapping[str, Any]) -> None:
    """Write config.json: all fields, and where they came from (file, overrides, versions, commit)."""
    path.write_text(json.dumps({**to_json(config), "origin": origin}, indent=2) + "\n")


def read(run: str | Path) -> tuple[Config, dict[str, Any]]:
    """The config of a run directory, and its origin.

    Raises:
        UserError: no run there.
    """
    path = Path(run) / "config.json"
    if not path.is_file():
        near = [str(p.parent) for p in Path(run).parent.glob("*/config.json")]
        raise UserError(f"got run {str(run)!r}, expected a directory with config.json{nearest(str(run), near)}")
    value = json.loads(path.read_text())
    return from_json(value), value.get("origin", {})


def provenance(config: Config, name: str, origin: Mapping[str, Any]) -> str:
    """Where a field's value came from: the command line, the config file, or the default."""
    option = "--" + name.replace("_", "-")
    given = {arg.split("=")[0].replace("_", "-") for arg in origin.get("overrides", [])}
    if option in given:
        return "command line"
    section, _, field = name.partition(".")
    default = flatten(type(getattr(config, section))())[field]
    return "default" if default == flatten(config)[name] else f"config file {origin.get('file')}"


def documentation(config: Config, name: str) -> str:
    """The text under a field's definition."""
    *path, field = name.split(".")
    owner: Any = config
    for part in path:
        owner = getattr(owner, part)
    return docs(type(owner)).get(field, "")


def docs(kind: type) -> dict[str, str]:
    """The documentation string under each field of a dataclass."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0].body  # type: ignore[attr-defined]
    found: dict[str, str] = {}
    for node, after in itertools.pairwise(body):
        if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            found[node.target.id] = " ".join(str(after.value.value).split())  # type: ignore[union-attr]
    return found
