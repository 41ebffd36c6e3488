"""`jaxmodels eval RUN`: metrics of a run on held-out data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from json import dumps
from pathlib import Path
from typing import Annotated, Any, get_origin, get_type_hints

import tyro

from jaxmodels.commands.parsing import Given, parse
from jaxmodels.config import TFDS, docs, read
from jaxmodels.data.section import SOURCES, DataConfig, FilesConfig, RecordsConfig, SplitsConfig
from jaxmodels.errors import UserError, check_place, printable
from jaxmodels.fields import Beams, Section

_OWNERS: tuple[type[DataConfig], ...] = (FilesConfig, SplitsConfig, TFDS, RecordsConfig)
"""The classes of this package with fields that say which data a run is evaluated on."""


@dataclass(frozen=True)
class EvalOptions(Section):
    """Metrics of a run on held-out data, its own or other data; for a translation run, also BLEU, for one that sums
    up, ROUGE, and for one whose decoder transcribes sounds, word and character error rates."""

    run: Annotated[str, tyro.conf.Positional]
    """Run directory."""
    split: str | None = None
    """Split to evaluate on instead of the run's own, for data with named splits."""
    best: bool = False
    """Use the best checkpoint instead of the newest."""
    json: Path | None = None
    """Also write the metrics to this file."""
    data_dir: str | None = None
    """TFDS data directory to use instead of the run's own."""
    classifier: Path | None = None
    """A classifier's run, which judges 1,000 images that a generative model generates, and compares them with the
    data's."""
    beams: Beams | None = None
    """Width of the beam search for translations and summaries; default: what the files of an imported model ask for, or
    4; 1: greedy."""


@dataclass(frozen=True)
class OtherData(Given):
    """Data to evaluate on instead of the run's own. Classes and tokenizer stay the run's."""

    kind: str | None
    """Kind of data; None: the run's."""
    fields: Mapping[str, Any]
    """The fields that differ from the run's."""

    @classmethod
    def read(cls, argv: list[str], prog: str, more: type) -> tuple[OtherData, Any]:
        section = _options(_kind_of_data(argv))
        options = [("data", section, dataclasses.field(default=section()))]
        both = dataclasses.make_dataclass("Options", options, bases=(more,), frozen=True, kw_only=True)
        both.__doc__ = more.__doc__
        found = parse(both, argv, prog)
        given = {name: value for name, value in vars(found.data).items() if value not in (None, ())}
        own = more(**{field.name: getattr(found, field.name) for field in dataclasses.fields(more)})
        return cls(given.pop(_KIND, None), given), own


_KIND = "of_kind"
"""The option `--data` among the fields of a section; no field of data can have the name of this method."""


def _kind_of_data(argv: list[str]) -> type[DataConfig]:
    """Return the kind of data that the arguments are about: the one of `--data`, or else the run's."""
    for argument, value in zip(argv, [*argv[1:], ""], strict=True):
        if argument == "--data" or argument.startswith("--data="):
            return SOURCES.find(argument.partition("=")[2] or value)
    run = next((each for each in argv if (Path(each) / "config.json").is_file()), None)
    return DataConfig if run is None else type(read(run)[0].data)


def _options(kind: type[DataConfig]) -> type:
    """Make a section of optional fields, for those that a kind of data can be evaluated with.

    It has the fields of other kinds too, which are refused later, with the reason; and those that no kind of this
    package has, unless their class names others (`evaluated_by`).
    """
    owners = {name: owner for owner in _OWNERS for name in vars(owner)["evaluated_by"]}
    shared = {field.name for owner in (*_OWNERS, DataConfig) for field in dataclasses.fields(owner)}
    names = [field.name for field in dataclasses.fields(kind)]
    own_names = vars(kind).get("evaluated_by", [name for name in names if name not in shared])
    own = {name: kind for name in names if name in owners or name in own_names}
    kinds = f"{', '.join(SOURCES.names())}, or package.module:Name"
    about = f"Kind of data, if it differs from the run's: {kinds}. Its fields are options."
    named = tyro.conf.arg(name="data", prefix_name=False, help=about)
    fields: list[Any] = [(_KIND, Annotated[str | None, named], dataclasses.field(default=None))]
    for name, owner in (owners | own).items():
        hint = get_type_hints(owner, include_extras=True)[name]
        several = get_origin(hint) is tuple
        hint = hint if several else hint | None
        about = tyro.conf.arg(help=docs(owner).get(name, ""))
        fields.append((name, Annotated[hint, about], dataclasses.field(default=() if several else None)))
    made = dataclasses.make_dataclass("EvalData", fields, bases=(Section,), frozen=True)
    made.section, made.__doc__ = "data", OtherData.__doc__
    return made


def evaluate(given: OtherData, options: EvalOptions) -> None:
    """Measure the run and print its metrics."""
    from jaxmodels.data import contract
    from jaxmodels.generate import judge
    from jaxmodels.parallel import progress
    from jaxmodels.train import load_run
    from jaxmodels.train import run as runs

    progress.begin()
    runs.compilation_cache()
    if options.json is not None:
        check_place(options.json, "--json")
    named = {"eval_split": ("--split", options.split), "dir": ("--data-dir", options.data_dir)}
    fields = dict(given.fields)
    for name, (flag, value) in named.items():
        if value is not None and name in fields:
            raise UserError(
                f"got {flag} {value} and --data.{name.replace('_', '-')} {fields[name]}, expected one of them"
            )
        if value is not None:
            fields[name] = value
    evaluation = load_run(options.run, best=options.best).evaluation(fields, kind=given.kind)
    run = evaluation.run
    translates = run.config.task.answers == "translation" and run.config.data.real
    if options.beams is not None and not translates:
        raise UserError(f"got --beams {options.beams} for a run of task {run.config.task.kind}, try it without")
    judged = {}
    if options.classifier is not None:
        images = contract.images(run.task.fields)
        real = (batch[name] for batch in evaluation.batches() for name in images)
        judged = judge.judge_images(run, options.classifier, real=real)
    found = evaluation.measure()
    if run.config.task.answers == "transcript" and run.task.predicts is None:
        found |= judge.judge_transcripts(evaluation)
    if translates:
        found |= judge.judge_texts(run, options.beams)
    found |= judged
    print(printable(f"{options.run}, step {run.step}, on {evaluation.source.describe()}\n{table(found)}"))
    if options.json is not None:
        facts = {"run": options.run, "step": run.step, "data": evaluation.source.describe()}
        options.json.write_text(dumps({**facts, **found}, indent=2) + "\n")


def table(found: dict[str, float]) -> str:
    """Format metrics: single ones in a column, those of classes and groups as rows of a table."""
    lines = [f"  {name:18s} {value:.6g}" for name, value in found.items() if "/" not in name]
    nested = [name for name in found if "/" in name]
    for kind in dict.fromkeys("group" if name.startswith("group/") else "class" for name in nested):
        cells: dict[str, dict[str, float]] = {}
        for name in nested:
            if name.startswith("group/") != (kind == "group"):
                continue
            first, second = name.split("/", 1)
            if kind == "group":
                first, second = second.split("/", 1)
                if "/" in second:  # classes within a group are only in the file
                    continue
            row, column = (first, second) if kind == "group" else (second, first)
            if column == "gap" or first == "gap":
                row, column = (f"gap in {second}", "difference")
                if "/" in second:
                    continue
            cells.setdefault(row, {})[column] = found[name]
        columns = list(dict.fromkeys(column for row in cells.values() for column in row))
        width = max(map(len, [kind, *cells]))
        lines.append("\n  " + "  ".join([f"{kind:{width}s}", *(f"{column:>12s}" for column in columns)]))
        for row, values in cells.items():
            shown = (f"{values[column]:12.4f}" if column in values else " " * 12 for column in columns)
            lines.append("  " + "  ".join([f"{row:{width}s}", *shown]))
    return "\n".join(lines)
