"""`jaxmodels predict RUN FILE...`: labels, masks, texts or translations of new records."""

from __future__ import annotations

import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxmodels.data import given
from jaxmodels.errors import UserError
from jaxmodels.fields import Beams, Count
from jaxmodels.generate.masks import Folder
from jaxmodels.generate.predict import answered, predictor
from jaxmodels.generate.prepare import Answer, Options, kind_of
from jaxmodels.tasks.task import Answers, tasks_that_answer
from jaxmodels.train.saved import load_run


def predict(
    run: str,
    files: tuple[str, ...],
    /,
    input_field: str | None = None,
    tokens: Count | None = None,
    beams: Beams | None = None,
    captions: tuple[str, ...] = (),
    class_names: tuple[str, ...] = (),
    out: Path | None = None,
    best: bool = False,
) -> None:
    """Predict labels, masks, texts or translations of new records: one line of JSON for each, in order.

    Records are the rows of a table, the images of a folder, the lines of any other file, or with - those of standard
    input. A line is a text, the path of an image, or a list of numbers. The training data need not be present.
    For a record that cannot be read, the line says why.

    Args:
        run: run directory.
        files: images, folders of images, tables (CSV, JSON lines, Parquet), text files, or -.
        input_field: table column to read, if its name differs from that in training.
        tokens: largest number of tokens to continue a text by, or of a reply, for a language model; default 100.
        beams: width of the beam search, for a translator; default: what the files of an imported model ask for, or 4.
        captions: texts of an image's class, one or several, such as 'a photo of a {label}', for a model of images and
            texts; those of the training when not given.
        class_names: names of the classes that captions are of; those of the training when not given.
        out: folder for the masks that a model of pixels predicts, PNG files of each image's own size.
        best: use the best checkpoint instead of the newest.
    """
    from jaxmodels.train.run import compilation_cache

    compilation_cache()
    opened = load_run(run, best=best)
    own = opened.config.task
    options: tuple[tuple[str, Any, Answers], ...] = (
        ("tokens", tokens, "reply" if own.answers == "reply" else "continuation"),
        ("beams", beams, "translation"),
        ("captions", " ".join(captions) or None, "caption"),
        ("class-names", " ".join(class_names) or None, "caption"),
        ("out", out, "mask"),
    )
    for name, value, answer in options:
        if value is not None and own.answers != answer:
            raise UserError(
                f"got --{name} {value} for a run of {own.kind}, expected it for {tasks_that_answer(answer)} alone, "
                "try it without"
            )
    if own.answers == "mask" and out is None:
        raise UserError(f"got no --out for a run of {own.kind}, expected a folder for its masks, try --out masks")
    if captions or class_names:
        section: Any = opened.config.data
        section = section if section.real else section.of_kind("images")  # an imported model has no data of its own
        seen = {"captions": captions or section.captions, "class_names": class_names or section.class_names}
        opened = replace(opened, config=replace(opened.config, data=replace(section, **seen)))
    ready, answers = predictor(opened, Options(tokens or 100, beams))
    known = opened.kept.field or opened.config.data.input_field
    found = given.records(files, kind_of(opened), input_field or "", known)
    size = opened.config.eval.batch_size or opened.config.data.batch_size
    keep = (lambda answer: answer) if out is None else Folder(out).keep
    count, bad = 0, []
    with ThreadPoolExecutor(opened.config.data.threads) as threads:
        for answer in answered(found, ready, answers, size, threads):
            count += 1
            if "error" in answer:
                bad.append(f"{answer['where']}: {answer['error']}")
            print(_line(keep(answer)), flush=count % size == 0)
    if bad:
        shortened = _plain("; ".join(bad[:3]) + ("; ..." if len(bad) > 3 else ""))
        if len(bad) == count:
            raise UserError(f"got {count:,} records, none of which can be read ({shortened}), expected some that can")
        print(f"{len(bad):,} of {count:,} records could not be read ({shortened})", file=sys.stderr)


def _line(answer: Answer) -> str:
    """Format an answer as JSON that is safe for a terminal, in characters that the output can encode."""
    plain = (sys.stdout.encoding or "").lower().replace("-", "") != "utf8"
    return _plain(json.dumps(answer, ensure_ascii=plain))


def _plain(text: str) -> str:
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text)
