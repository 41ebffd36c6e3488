"""`jaxmodels compress RUN METHOD --out RUN2`: a smaller run, by pruning or quantization."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from json import dumps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import tyro

from jaxmodels.commands.eval import OtherData
from jaxmodels.commands.parsing import HELP, Given, parse
from jaxmodels.compress.methods import METHODS, MethodConfig
from jaxmodels.errors import UserError, check_place, printable
from jaxmodels.fields import MOST, Range, Section, docs

PROG = "jaxmodels compress RUN METHOD --out RUN2"


@dataclass(frozen=True)
class CompressOptions(Section):
    """The result is a run like any other, with a record in compress.json; of other data it is calibrated with these."""

    run: Annotated[str, tyro.conf.Positional]
    """Run directory."""
    method: Annotated[str, tyro.conf.Positional]
    """How to compress it."""
    out: Path
    """The run directory to create."""
    batches: Annotated[int, Range(1, MOST)] = 16
    """Batches of data on which the inputs of matrices are measured."""
    best: bool = False
    """Compress the best checkpoint instead of the newest."""


@dataclass(frozen=True)
class TableOptions(Section):
    """Runs of one task beside each other: what they take, how fast they are here, and how good they are."""

    table: Annotated[tuple[str, ...], tyro.conf.arg(help="run directories, that of the whole model first")]
    batches: Annotated[int, Range(1, MOST)] = 16
    """Batches of the first run's evaluation data to measure on."""
    json: Path | None = None
    """Also write the rows to this file."""
    picture: Path | None = None
    """Also draw quality over size, memory and speed, as a PNG in this file."""


@dataclass(frozen=True)
class Chosen(Given):
    """The method that was chosen, and the data to calibrate with if they are not the run's own; or what to compare."""

    method: MethodConfig | None
    data: OtherData

    @classmethod
    def read(cls, argv: list[str], prog: str, more: type) -> tuple[Chosen, Any]:
        if "--table" in argv:
            return cls(None, OtherData(None, {})), parse(TableOptions, argv, prog)
        named = [each for each in argv[:2] if not each.startswith("-")]
        if HELP & set(argv) and len(named) < 2:
            print(f"usage: {PROG}\n       {prog} --table RUN RUN2 ...\n\n{__doc__}\n")
            print(f"methods, each with options of its own ({prog} RUN METHOD --help):")
            for name in METHODS.names():
                print(f"  {name:12}  {_first_line(METHODS.find(name))}")
            raise SystemExit(0)
        if len(named) < 2:
            known, got = ", ".join(METHODS.names()), " ".join(argv[:2]) or "no arguments"
            raise UserError(f"got {got}, expected a run and one of {known}, try {PROG}")
        kind = METHODS.find(named[1])
        hints, about = get_type_hints(kind, include_extras=True), docs(kind)
        fields: list[Any] = [
            (
                field.name,
                Annotated[hints[field.name], tyro.conf.arg(help=about.get(field.name, ""))],
                dataclasses.field(default=field.default),
            )
            for field in dataclasses.fields(kind)
        ]
        both = dataclasses.make_dataclass("Options", fields, bases=(more,), frozen=True, kw_only=True)
        both.__doc__ = f"{kind.__doc__} {more.__doc__}"
        data, found = OtherData.read(argv, f"{prog} {' '.join(named)}", both)
        method = kind(**{name: getattr(found, name) for name, *_ in fields})
        return cls(method, data), more(**{field.name: getattr(found, field.name) for field in dataclasses.fields(more)})


def compress(given: Chosen, options: CompressOptions) -> None:
    """Compress a run and say what was done, or compare runs."""
    from jaxmodels.compress import runs, table
    from jaxmodels.parallel import progress
    from jaxmodels.train.run import compilation_cache

    progress.begin()
    compilation_cache()
    method, data = given.method, given.data
    if method is None:
        chosen: Any = options
        if not chosen.table:
            raise UserError(
                "got --table without a run, expected some to compare, try jaxmodels compress --table RUN RUN2"
            )
        for place, option in ((chosen.json, "--json"), (chosen.picture, "--picture")):
            if place is not None:
                check_place(place, option)
        found = table.compare([Path(each) for each in chosen.table], chosen.batches)
        print(printable(table.formatted(found)))
        if chosen.json is not None:
            chosen.json.write_text(dumps({**found._asdict(), "rows": [row._asdict() for row in found.rows]}) + "\n")
        if chosen.picture is not None:
            from jaxmodels.report import pareto

            pareto.draw(chosen.picture, found)
            print(f"picture: {printable(str(chosen.picture))}")
        return
    record = runs.compress(
        Path(options.run),
        method,
        options.out,
        batches=options.batches,
        best=options.best,
        data=data.fields,
        kind=data.kind,
    )
    print(printable(f"{options.out}: {in_words(record)}"))


def in_words(record: dict[str, Any]) -> str:
    """Say in a few lines what was done."""
    zeros, parameters = record["zeros"], record["compressed"]
    lines = [
        f"step {record['step']} of {record['source']} by {record['method']}, {parameters:,} parameters, "
        f"{zeros:,} of them 0 ({zeros / max(1, parameters):.1%})"
    ]
    width = max(map(len, record["matrices"]), default=0)
    for name, facts in record["matrices"].items():
        lines.append(f"  {name:{width}}  " + "  ".join(f"{key} {value:.4g}" for key, value in facts.items()))
    lines += [f"  {name:{width}}  as it was: {why}" for name, why in record["left"].items()]
    return "\n".join(lines)


def _first_line(kind: type) -> str:
    return (kind.__doc__ or "").strip().partition("\n")[0]
