"""Cleaning texts for training: normalize, filter, remove duplicates, and report what was left out and why."""

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
from jaxmodels.parts import locked

_AT_ONCE = 512
_EXAMPLES = 3
_SHINGLE = 5
_PERMUTATIONS = 128
# invisible: byte order mark, zero-width space, word joiner
_INVISIBLE = "\ufeff\u200b\u2060"
_LINE_ENDS = re.compile("\r\n|[\r\v\f\x1c-\x1e\x85\u2028\u2029]")
_SPACES = re.compile(r"[^\S\n]+")


@dataclass(frozen=True)
class Rules(Section):
    """Which texts are kept, and how they are normalized."""

    form: Literal["NFC", "NFKC", "none"] = "NFC"
    """Unicode normalization; NFKC also replaces ligatures, full-width letters and the like."""
    collapse: bool = True
    """Collapse runs of spaces into one. False: only trim the ends of lines (for code)."""
    min_characters: Natural = 1
    """Smallest number of characters in a text."""
    max_characters: Natural | None = None
    """Largest number of characters in a text."""
    min_words: Natural = 0
    """Smallest number of words in a text."""
    max_words: Natural | None = None
    """Largest number of words in a text."""
    letters: Share = 0.0
    """Smallest fraction of a text's characters, not counting spaces, that are letters."""
    script: tuple[str, ...] = ()
    """Scripts that a text's letters must belong to, such as latin or cyrillic. Empty: any."""
    script_share: Share = 0.9
    """Smallest fraction of a text's letters that belong to those scripts."""
    repeated_lines: Share = 0.3
    """Largest fraction of a text's lines that repeat earlier ones (Rae et al. 2021, table A1)."""
    near: Share = 0.8
    """Leave out texts this similar to an earlier one (Jaccard similarity of their shingles). 0: keep them."""
    shingles: Literal["characters", "words"] = "characters"
    """Units of the shingles, which are runs of five: characters find a changed word in a sentence, words one in a
    document."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.script:
            if name.upper() not in _scripts():
                near = nearest(name.lower(), [s.lower() for s in _scripts()]) or ", try --script latin"
                raise UserError(f"got --script {name!r}, expected a script of Unicode such as latin or cyrillic{near}")

    def normalize(self, text: str) -> str:
        """Normalize a text and remove invisible characters; idempotent."""
        text = _LINE_ENDS.sub("\n", text)
        if not text.isascii() or not text.replace("\n", "").isprintable():
            text = "".join(c for c in text if c in "\n\t" or not _unseen(c))
        if self.form != "none":
            text = unicodedata.normalize(self.form, text)
        lines = (_SPACES.sub(" ", line).strip() if self.collapse else line.rstrip() for line in text.split("\n"))
        return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n" if not self.collapse else None)

    def refuse(self, text: str) -> tuple[str, str] | None:
        """Return why a normalized text is left out, as reason and detail; None if it is kept."""
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
    """Return the first word of a letter's Unicode name, which is its script (CJK for Chinese characters)."""
    return unicodedata.name(letter, "").split(" ")[0].split("-")[0]


@functools.cache
def _scripts() -> frozenset[str]:
    return frozenset(_script(c) for c in map(chr, range(0x20000)) if c.isalpha()) - {""}


@dataclass(frozen=True)
class Text:
    """A text, where it comes from, and its other fields; or why it cannot be read (`broken`)."""

    where: str
    text: str
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    broken: str = ""


def read(files: Sequence[Path], text_field: str, lines: bool) -> Iterator[Text]:
    """Read the texts of tables (their `text_field`) and of text files, whole or, with `lines`, line by line.

    Raises: UserError if a table has no such column.
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
    """The texts kept so far, searched for duplicates of the next one.

    Takes about 7 KB of memory per kept text for near duplicates, 100 bytes without; the texts themselves are in `out`.
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
        """Compute a MinHash of each text, or None if near duplicates are kept."""
        if self._near is None:
            return [None] * len(texts)
        from datasketch import MinHash

        encoded = ([run.encode() for run in self.shingled(text)] for text in texts)
        return MinHash.bulk(encoded, num_perm=_PERMUTATIONS)

    def find(self, text: str, sketch: Any) -> tuple[str, int, str] | None:
        """Find the kept text that this one repeats: the reason, its number from 0, and how similar it is."""
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
        """Remember a text that was written to `out` at this offset."""
        self._exact[_key(text)] = len(self._offsets)
        if sketch is not None:
            self._near.insert(len(self._offsets), sketch, check_duplication=False)
        self._offsets.append(offset)

    def shingled(self, text: str) -> set[str]:
        """Return the runs of five characters or words in a text, in lower case."""
        parts: Any = " ".join(text.casefold().split())
        if self._rules.shingles == "words":
            parts = parts.split(" ")
        runs = (parts[i : i + _SHINGLE] for i in range(max(len(parts) - _SHINGLE + 1, 1)))
        return set(runs) if isinstance(parts, str) else {" ".join(run) for run in runs}

    def text(self, number: int) -> str:
        """Read a kept text again from `out`."""
        end = self._out.tell()
        self._out.seek(self._offsets[number])
        text = json.loads(self._out.readline())[self._field]
        self._out.seek(end)
        return text


def bands(threshold: float) -> tuple[int, int]:
    """Choose bands and rows of a MinHash: as few bands as find 99 of 100 texts at the threshold itself."""
    for rows in range(_PERMUTATIONS, 1, -1):
        number = _PERMUTATIONS // rows
        if number > 1 and 1 - (1 - threshold**rows) ** number >= 0.99:
            return number, rows
    return _PERMUTATIONS, 1


def _key(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


@dataclass
class Report:
    """Counts of what was read, kept, changed and left out."""

    read: int = 0
    kept: int = 0
    changed: int = 0
    characters_read: int = 0
    characters_kept: int = 0
    removed: Counter[str] = dataclasses.field(default_factory=Counter)
    left_out: list[dict[str, str]] = dataclasses.field(default_factory=list)
    places: list[str] = dataclasses.field(default_factory=list)
    """Where each kept text comes from."""

    def facts(self) -> dict[str, Any]:
        """All numbers, and the place and reason of each text that was left out."""
        return {name: value for name, value in vars(self).items() if name != "places"}

    def remove(self, text: Text, reason: str, detail: str, other: str = "") -> None:
        """`other`: the text that this one duplicates."""
        self.removed[reason] += 1
        found = {"where": text.where, "reason": reason, "detail": detail}
        if self.removed[reason] <= _EXAMPLES and text.text:
            found["text"] = text.text[:200]
            if other:
                found["other"] = other[:200]
        self.left_out.append(found)

    def show(self) -> str:
        """Format the counts, and the first examples of each reason."""
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
    """Write the texts that the rules keep to `out`, in order, and a report beside it.

    Of duplicates the first is kept. The same input gives the same files, and cleaning `out` again gives `out`.

    Raises: UserError if there are no such files, or no such column.
    """
    here = Path.cwd()
    files = [f.relative_to(here) if f.is_relative_to(here) else f for f in corpus.expand(paths, "texts", "")]
    if out.resolve() in [f.resolve() for f in files]:
        raise UserError(f"got --out {out}, which is one of the files to read, expected another, try --out clean.jsonl")
    out.parent.mkdir(parents=True, exist_ok=True)
    check_place(out, "--out")
    part, report = out.with_name(out.name + ".part"), Report()
    with locked(part, out):
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
    """Write those of some texts that are kept."""
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
    """The file that reports what was left out of `out`."""
    return out.with_name(out.name + ".report.json")


def _encoded(value: Any, indent: int | None = None) -> bytes:
    # half of a surrogate pair stays the escape sequence that it was
    text = json.dumps(value, ensure_ascii=False, default=str, indent=indent) + "\n"
    return text.encode("utf-8", "backslashreplace")
