"""Texts made fit to train on: normalized, filtered, without duplicates; and a report of what went out and why."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal

from jaxmodels.data import corpus
from jaxmodels.data.fields import unknown
from jaxmodels.data.files import TABLES, open_file, shown
from jaxmodels.errors import UserError, check_place, nearest
from jaxmodels.fields import Natural, Section, Share

_AT_ONCE = 512
_EXAMPLES = 3
_SHINGLE = 5
_PERMUTATIONS = 128
# seen by no one: byte order mark, zero-width space, word joiner
_INVISIBLE = "\ufeff\u200b\u2060"
_LINE_ENDS = re.compile("\r\n|[\r\v\f\x1c-\x1e\x85\u2028\u2029]")
_SPACES = re.compile(r"[^\S\n]+")


@dataclass(frozen=True)
class Rules(Section):
    """What a text must be to be kept, and how it is written then."""

    form: Literal["NFC", "NFKC", "none"] = "NFC"
    """Unicode normalization; NFKC also replaces ligatures, full-width letters and the like."""
    collapse: bool = True
    """Whether runs of spaces become one; else only the ends of lines are trimmed (for code)."""
    min_characters: Natural = 1
    """Characters of a text, at least."""
    max_characters: Natural | None = None
    """Characters of a text, at most."""
    min_words: Natural = 0
    """Words of a text, at least."""
    max_words: Natural | None = None
    """Words of a text, at most."""
    letters: Share = 0.0
    """Share of a text's characters, spaces not counted, that must be letters."""
    script: tuple[str, ...] = ()
    """Scripts that a text's letters must be of, such as latin or cyrillic; any when not given."""
    script_share: Share = 0.9
    """Share of a text's letters that must be of those scripts."""
    repeated_lines: Share = 0.3
    """Share of a text's lines that may be repetitions of earlier ones (Rae et al. 2021, table A1)."""
    near: Share = 0.8
    """Texts that share so much with one before them go out (Jaccard similarity of their shingles); 0: none do."""
    shingles: Literal["characters", "words"] = "characters"
    """What runs of five are compared of: characters find a changed word in a sentence, words one in a document."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.script:
            if name.upper() not in _scripts():
                near = nearest(name.lower(), [s.lower() for s in _scripts()]) or ", try --script latin"
                raise UserError(f"got --script {name!r}, expected a script of Unicode such as latin or cyrillic{near}")

    def normalize(self, text: str) -> str:
        """The text in one form, without characters that no one sees; what is normalized stays as it is."""
        text = _LINE_ENDS.sub("\n", text)
        if not text.isascii() or not text.replace("\n", "").isprintable():
            text = "".join(c for c in text if c in "\n\t" or not _unseen(c))
        if self.form != "none":
            text = unicodedata.normalize(self.form, text)
        lines = (_SPACES.sub(" ", line).strip() if self.collapse else line.rstrip() for line in text.split("\n"))
        return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n" if not self.collapse else None)

    def refuse(self, text: str) -> tuple[str, str] | None:
        """Why a normalized text goes out, in general and in particular; None: it does not."""
        words = len(text.split())
        if not words:
            return "empty", ""
        if not self.min_characters <= len(text) <= (self.max_characters or len(text)):
            return ("too short" if len(text) < self.min_characters else "too long"), f"{len(text):,} characters"
        if not self.min_words <= words <= (self.max_words or words):
            return ("too short" if words < self.min_words else "too long"), f"{words:,} words"
        lines = [line for line in text.split("\n") if line.strip()]
        if (share := 1 - len(set(lines)) / len(lines)) > self.repeated_lines:
            return "repeated lines", f"{share:.0%} of {len(lines):,} lines"
        if self.letters or self.script:
            letters = [c for c in text if c.isalpha()]
            if (share := len(letters) / sum(not c.isspace() for c in text)) < self.letters:
                return "few letters", f"{share:.0%} letters"
            wanted = {name.upper() for name in self.script}
            share = sum(_script(c) in wanted for c in letters) / max(len(letters), 1)
            if self.script and share < self.script_share:
                return "other script", f"{share:.0%} {' or '.join(self.script)}"
        return None


def _unseen(c: str) -> bool:
    return unicodedata.category(c) in ("Cc", "Cs") or c in _INVISIBLE


@functools.cache
def _script(letter: str) -> str:
    """The first word of a letter's name, which is its script (CJK for Chinese characters)."""
    return unicodedata.name(letter, "").split(" ")[0].split("-")[0]


@functools.cache
def _scripts() -> frozenset[str]:
    return frozenset(_script(c) for c in map(chr, range(0x20000)) if c.isalpha()) - {""}


@dataclass(frozen=True)
class Text:
    """A text, where it is from, and the other fields that it came with; or why there is none (`broken`)."""

    where: str
    text: str
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    broken: str = ""


def read(files: Sequence[Path], text_field: str, lines: bool) -> Iterator[Text]:
    """The texts of tables (their `text_field`) and of files of text, each one text or, by `lines`, one a line.

    Raises: UserError where a table has no such column.
    """
    for path in files:
        if path.suffix.lower() in TABLES:
            yield from _read_table(path, text_field)
        elif lines:
            with path.open("rb") as file:
                for number, raw in enumerate(file, 1):
                    if raw.strip():
                        yield _decoded(f"{path}:{number}", raw.rstrip(b"\r\n"))
        else:
            yield _decoded(str(path), path.read_bytes())


def _read_table(path: Path, text_field: str) -> Iterator[Text]:
    table, known = open_file(path), False
    for row, (values, _) in enumerate(table.rows()):
        where = f"{path}:{table.line(row)}"
        if isinstance(values, str):
            yield Text(where, "", broken=values)
            continue
        if not known and text_field not in values:
            raise UserError(unknown("--text-field", text_field, sorted(values), "--text-field", f" in {path}"))
        known = True
        text = values.get(text_field)
        if isinstance(text, str):
            yield Text(where, text, values)
        else:
            broken = f"{text_field} is missing" if text is None else f"{text_field} is {shown(text)}, expected text"
            yield Text(where, "", broken=broken)


def _decoded(where: str, raw: bytes) -> Text:
    try:
        return Text(where, raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Text(where, "", broken=f"byte {error.start} is not UTF-8")


class Duplicates:
    """Texts that were kept, and which of them another one repeats.

    Some 7 KB of memory a kept text for near ones, 100 bytes without; the texts themselves lie in `out`.
    """

    def __init__(self, rules: Rules, out: IO[bytes], text_field: str) -> None:
        self._rules, self._out, self._field = rules, out, text_field
        self._exact: dict[bytes, int] = {}
        self._offsets = array("q")
        self._near: Any = None
        if rules.near:
            try:
                from datasketch import MinHashLSH
            except ImportError:
                raise UserError(
                    "got --near without the library datasketch, expected it installed, "
                    "try pip install 'jaxmodels[text]' or --near 0"
                ) from None
            self._near = MinHashLSH(num_perm=_PERMUTATIONS, params=bands(rules.near))

    def sketch(self, texts: Sequence[str]) -> list[Any]:
        """A MinHash of each text, or None where near duplicates are not asked for."""
        if self._near is None:
            return [None] * len(texts)
        from datasketch import MinHash

        encoded = ([run.encode() for run in self.shingled(text)] for text in texts)
        return MinHash.bulk(encoded, num_perm=_PERMUTATIONS)

    def find(self, text: str, sketch: Any) -> tuple[str, int, str] | None:
        """The kept text that this one repeats: the reason to give, which text, counted from 0, and how near."""
        if (found := self._exact.get(_key(text))) is not None:
            return "duplicate", found, ""
        if sketch is None:
            return None
        here = self.shingled(text)
        for number in sorted(self._near.query(sketch)):
            other = self.shingled(self.text(number))
            if (share := len(here & other) / len(here | other)) >= self._rules.near:
                return "near duplicate", number, f"{share:.0%} "
        return None

    def keep(self, text: str, sketch: Any, offset: int) -> None:
        """Remember a text that is written to `out` at this offset."""
        self._exact[_key(text)] = len(self._offsets)
        if sketch is not None:
            self._near.insert(len(self._offsets), sketch, check_duplication=False)
        self._offsets.append(offset)

    def shingled(self, text: str) -> set[str]:
        """The runs of five characters or words of a text, in small letters."""
        parts: Any = " ".join(text.casefold().split())
        if self._rules.shingles == "words":
            parts = parts.split(" ")
        runs = (parts[i : i + _SHINGLE] for i in range(max(len(parts) - _SHINGLE + 1, 1)))
        return set(runs) if isinstance(parts, str) else {" ".join(run) for run in runs}

    def text(self, number: int) -> str:
        """A kept text, read again from `out`."""
        end = self._out.tell()
        self._out.seek(self._offsets[number])
        text = json.loads(self._out.readline())[self._field]
        self._out.seek(end)
        return text


def bands(threshold: float) -> tuple[int, int]:
    """How a MinHash is cut into bands, and their rows: as few as find 99 of 100 texts at the threshold itself."""
    for rows in range(_PERMUTATIONS, 1, -1):
        number = _PERMUTATIONS // rows
        if number > 1 and 1 - (1 - threshold**rows) ** number >= 0.99:
            return number, rows
    return _PERMUTATIONS, 1


def _key(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


@dataclass
class Report:
    """What was read, kept, changed and left out."""

    read: int = 0
    kept: int = 0
    changed: int = 0
    characters_read: int = 0
    characters_kept: int = 0
    removed: Counter[str] = dataclasses.field(default_factory=Counter)
    left_out: list[dict[str, str]] = dataclasses.field(default_factory=list)
    places: list[str] = dataclasses.field(default_factory=list)
    """Where each kept text is from."""

    def facts(self) -> dict[str, Any]:
        """All numbers, and the place and reason of each text that was left out."""
        return {name: value for name, value in vars(self).items() if name != "places"}

    def remove(self, text: Text, reason: str, detail: str, other: str = "") -> None:
        """`other`: the text that this one is too near to."""
        self.removed[reason] += 1
        found = {"where": text.where, "reason": reason, "detail": detail}
        if self.removed[reason] <= _EXAMPLES and text.text:
            found["text"] = text.text[:200]
            if other:
                found["other"] = other[:200]
        self.left_out.append(found)

    def show(self) -> str:
        """The counts, and the first examples of each reason, as lines of text."""
        share = self.characters_kept / max(self.characters_read, 1)
        lines = [
            f"read     {self.read:>10,}",
            f"kept     {self.kept:>10,}  {self.kept / max(self.read, 1):7.2%}, {share:.2%} of all characters",
            f"changed  {self.changed:>10,}  of the kept ones, by normalization",
            f"left out {self.read - self.kept:>10,}",
        ]
        for reason, count in self.removed.most_common():
            lines.append(f"  {reason:16s} {count:>8,}  {count / self.read:7.2%}")
            for found in [f for f in self.left_out if f["reason"] == reason][:_EXAMPLES]:
                detail = f" ({found['detail']})" if found["detail"] else ""
                lines.append(f"      {found['where']}{detail}")
                for text in (found[name] for name in ("text", "other") if name in found):
                    # a control character of the data must not reach the terminal
                    lines.append(f"        {repr(text[:90])[1:-1]}{' ...' if len(text) > 90 else ''}")
        return "\n".join(lines)


def clean(paths: Sequence[str], out: Path, text_field: str, lines: bool, rules: Rules) -> Report:
    """Writes the texts that the rules keep to `out`, in order, and a report beside it.

    Of texts that are alike the first is kept. The same input gives the same files, and `out` cleaned again is `out`.

    Raises: UserError where there are no such files, or no such column.
    """
    here = Path.cwd()
    files = [f.relative_to(here) if f.is_relative_to(here) else f for f in corpus.expand(paths, "texts", "")]
    if out.resolve() in [f.resolve() for f in files]:
        raise UserError(f"got --out {out}, which is one of the files to read, expected another, try --out clean.jsonl")
    out.parent.mkdir(parents=True, exist_ok=True)
    check_place(out, "--out")
    part, report = out.with_name(out.name + ".part"), Report()
    try:
        with part.open("w+b") as file:
            duplicates = Duplicates(rules, file, text_field)
            texts = read(files, text_field, lines)
            while chunk := list(islice(texts, _AT_ONCE)):
                _sift(chunk, rules, duplicates, report, file, text_field)
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)
    facts = {"inputs": [str(f) for f in files], "rules": dataclasses.asdict(rules), **report.facts()}
    beside(out).write_bytes(_encoded(facts, indent=1))
    return report


def _sift(
    chunk: Sequence[Text],
    rules: Rules,
    duplicates: Duplicates,
    report: Report,
    file: IO[bytes],
    text_field: str,
) -> None:
    """Writes those of some texts that are kept."""
    left: list[tuple[Text, str]] = []
    for text in chunk:
        report.read += 1
        report.characters_read += len(text.text)
        if text.broken:
            report.remove(text, "unreadable", text.broken)
            continue
        normal = rules.normalize(text.text)
        if refused := rules.refuse(normal):
            report.remove(text, *refused)
        else:
            left.append((text, normal))
    for (text, normal), sketch in zip(left, duplicates.sketch([normal for _, normal in left]), strict=True):
        if found := duplicates.find(normal, sketch):
            reason, number, how = found
            other = duplicates.text(number) if how and report.removed[reason] < _EXAMPLES else ""
            report.remove(text, reason, f"{how}of {report.places[number]}", other)
            continue
        duplicates.keep(normal, sketch, file.tell())
        file.write(_encoded({**text.fields, text_field: normal}))
        report.kept += 1
        report.places.append(text.where)
        report.changed += normal != text.text
        report.characters_kept += len(normal)


def beside(out: Path) -> Path:
    """The file of the report on what was left out of `out`."""
    return out.with_name(out.name + ".report.json")


def _encoded(value: Any, indent: int | None = None) -> bytes:
    # half of a surrogate pair, which is no character, stays the escape that it was
    text = json.dumps(value, ensure_ascii=False, default=str, indent=indent) + "\n"
    return text.encode("utf-8", "backslashreplace")
