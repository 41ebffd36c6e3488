"""Tokenizers: text to token ids and back."""

from __future__ import annotations

import difflib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

from jaxmodels.data import special, tokenizer_config, vocabulary
from jaxmodels.data.special import Special
from jaxmodels.errors import UserError
from jaxmodels.registry import OUTSIDE, Registry, subclass_of

FILE = "tokenizer.json"

_PIECE = 1 << 18


class Tokenizer(Protocol):
    """Text to token ids and back."""

    special: Special
    """Ids that begin and end texts."""
    before: tuple[int, ...]
    """Precedes a whole text, such as [CLS] or <s>; generated text begins with it too."""
    after: tuple[int, ...]
    """Follows a whole text, such as [SEP]."""

    @property
    def end(self) -> int | None:
        """The token that closes a document, if the vocabulary has one."""
        ...

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str) -> np.ndarray:
        """int32 (T,)."""
        ...

    def encode_many(self, texts: Sequence[str], special: bool = False, length: int | None = None) -> list[np.ndarray]:
        """Encode texts; with `special`, between `before` and `after`, which stay when a text is cut to `length` tokens.

        Raises: UserError if `length` leaves no room for a text.
        """
        ...

    def ids(self, tokens: Sequence[str]) -> list[int | None]:
        """Return the id of each token, spelled as in the vocabulary."""
        ...

    def decode(self, ids: Any) -> str:
        """Decode `ids`; ids outside the vocabulary become the replacement character or nothing."""
        ...

    def sizes(self) -> np.ndarray | None:
        """Return how many bytes of text each token stands for, int32 (V,); None if unknown."""
        ...

    def to_json(self) -> str: ...

    def save(self, directory: Path) -> None: ...


class BaseTokenizer(ABC):
    """What tokenizers have in common. Your own derives from this class, and is named `package.module:Name`.

    `learn` makes it for a set of texts. It is made again from its `settings`, which a run stores: they are the
    arguments of its class.
    """

    vocab_size: int
    special = Special()
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    @classmethod
    def learn(cls, documents: Callable[[], Iterable[str]]) -> Self:
        """Make the tokenizer for these texts; the default ignores them."""
        return cls()

    def settings(self) -> dict[str, Any]:
        """The arguments that make the tokenizer again, as JSON values."""
        return {}

    @property
    def end(self) -> int | None:
        return self.special.end

    @abstractmethod
    def encode(self, text: str) -> np.ndarray: ...

    @abstractmethod
    def decode(self, ids: Any) -> str: ...

    def sizes(self) -> np.ndarray | None:
        return None

    def to_json(self) -> str:
        return json.dumps({"kind": TOKENIZERS.name_of(type(self)), **self.settings()})

    def __str__(self) -> str:
        return f"{TOKENIZERS.name_of(type(self))} ({self.vocab_size:,})"

    def ids(self, tokens: Sequence[str]) -> list[int | None]:
        return [None for _ in tokens]

    def encode_many(self, texts: Sequence[str], special: bool = False, length: int | None = None) -> list[np.ndarray]:
        return [self.encode(text)[:length] for text in texts]

    def save(self, directory: Path) -> None:
        """Write `tokenizer.json`, and the special ids that it does not state; `load_tokenizer` reads them."""
        (directory / FILE).write_text(self.to_json(), encoding="utf-8")
        if self.special == Special():
            (directory / special.FILE).unlink(missing_ok=True)
        else:
            self.special.save(directory)


TOKENIZERS = Registry(
    "tokenizer",
    "jaxmodels.tokenizers",
    {"bytes": "jaxmodels.data.tokenizer:Bytes", "chars": "jaxmodels.data.tokenizer:Chars"},
    subclass_of(BaseTokenizer),
)


class Bytes(BaseTokenizer):
    """The bytes of UTF-8."""

    vocab_size = 256

    def encode(self, text: str) -> np.ndarray:
        try:
            return np.frombuffer(text.encode("utf-8", "surrogateescape"), np.uint8).astype(np.int32)
        except UnicodeEncodeError:
            raise _no_text([text]) from None

    def decode(self, ids: Any) -> str:
        ids = np.asarray(ids, np.int64).reshape(-1)
        # 0xFF never occurs in UTF-8, so an id that is not a byte decodes to the replacement character
        return np.where((ids >= 0) & (ids < 256), ids, 0xFF).astype(np.uint8).tobytes().decode("utf-8", "replace")

    def sizes(self) -> np.ndarray:
        return np.ones(self.vocab_size, np.int32)


class Chars(BaseTokenizer):
    """The characters of a text, in the order of their code points."""

    def __init__(self, characters: str) -> None:
        self.characters = "".join(sorted(set(characters)))
        codes = _codes(self.characters)
        self._ids = np.full(int(codes.max(initial=0)) + 1, -1, np.int32)
        self._ids[codes] = np.arange(len(codes))

    @classmethod
    def learn(cls, documents: Callable[[], Iterable[str]]) -> Self:
        found: set[str] = set()
        for document in documents():
            found.update(document)
        return cls("".join(found))

    @property
    def vocab_size(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return len(self.characters)

    def encode(self, text: str) -> np.ndarray:
        codes = _codes(text)
        ids = np.where(codes < len(self._ids), self._ids[np.minimum(codes, len(self._ids) - 1)], -1)
        if (unknown := np.flatnonzero(ids < 0)).size:
            raise UserError(
                f"got the character {chr(int(codes[unknown[0]]))!r}, expected one of the {self.vocab_size} that the "
                "tokenizer was made from, try a text without it, or train with data.tokenizer bytes"
            )
        return ids.astype(np.int32)

    def decode(self, ids: Any) -> str:
        known = self.characters
        return "".join(known[i] if 0 <= i < len(known) else "\N{REPLACEMENT CHARACTER}" for i in np.ravel(ids).tolist())

    def sizes(self) -> np.ndarray:
        return np.array([len(c.encode("utf-8", "surrogatepass")) for c in self.characters], np.int32)

    def settings(self) -> dict[str, Any]:
        return {"characters": self.characters}


def _no_text(texts: Sequence[str]) -> UserError:
    """Build the error for texts with half of a surrogate pair, which undecodable bytes become."""
    half = next((c for text in texts for c in text if "\ud800" <= c <= "\udfff"), "")
    return UserError(
        f"got a text with {half!r}, half of a surrogate pair, expected characters of UTF-8, try without it"
    )


def _codes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


class HuggingFace(BaseTokenizer):
    """A Hugging Face `tokenizer.json`, run by the `tokenizers` library."""

    def __init__(self, serialized: str, directory: Path | None = None) -> None:
        """`directory`: where the files are that say what tokenizer.json does not, such as what ends a text."""
        from tokenizers import Tokenizer as Rust

        settings = tokenizer_config.settings_of(directory)
        self._rust = Rust.from_str(tokenizer_config.rewritten(serialized, settings, directory))
        tokenizer_config.add_tokens(self._rust, settings, directory)
        self._rust.no_truncation()
        self._rust.no_padding()
        self._bytewise = (json.loads(serialized).get("decoder") or {}).get("type") == "ByteLevel"
        # ids may have gaps; a model needs room for the largest
        vocabulary = self._rust.get_vocab(with_added_tokens=True)
        self.vocab_size = 1 + max(vocabulary.values())
        self.special = special.find_special(directory, vocabulary)
        self.before, self.after = self._around()

    def ids(self, tokens: Sequence[str]) -> list[int | None]:
        """Return the id of each token, spelled as in the vocabulary."""
        return [self._rust.token_to_id(token) for token in tokens]

    def wrap(self, before: str, after: str) -> None:
        """Put these tokens around a whole text, instead of those of tokenizer.json; none if empty."""
        from tokenizers import processors

        tokens = [(token, self._rust.token_to_id(token)) for token in dict.fromkeys((before, after)) if token]
        if unknown := [token for token, i in tokens if i is None]:
            raise UserError(f"got {unknown[0]!r} around texts, expected a token in the vocabulary, try another copy")
        parts = [part for part in (before, "$A", after) if part]
        self._rust.post_processor = processors.TemplateProcessing(parts, special_tokens=tokens)  # type: ignore
        self.before, self.after = self._around()

    def _around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        found = self._rust.encode("a")
        own = [i for i, token in enumerate(found.special_tokens_mask) if not token]
        first, last = (own[0], own[-1] + 1) if own else (0, 0)
        return tuple(found.ids[:first]), tuple(found.ids[last:])

    def encode(self, text: str) -> np.ndarray:
        return self.encode_many([text])[0]

    def encode_many(self, texts: Sequence[str], special: bool = False, length: int | None = None) -> list[np.ndarray]:
        cut = [[text] if special else list(pieces(text)) for text in texts]
        try:
            done = self._rust.encode_batch_fast([each for group in cut for each in group], add_special_tokens=special)
        except TypeError:  # it takes only text that UTF-8 can encode
            raise _no_text(texts) from None
        if special:
            return [self._cut(np.array(encoding.ids, np.int32), length) for encoding in done]
        ids = iter([np.array(encoding.ids, np.int32) for encoding in done])
        return [np.concatenate([next(ids) for _ in group])[:length] for group in cut]

    def _cut(self, ids: np.ndarray, length: int | None) -> np.ndarray:
        """Cut a whole text to this many tokens, keeping its final special tokens."""
        if length is None or len(ids) <= length:
            return ids
        if (room := length - len(self.after)) <= len(self.before):
            around = len(self.before) + len(self.after)
            raise UserError(
                f"got room for {length} tokens, expected more than the {around} that the tokenizer puts around a text, "
                f"try --data.seq-len {max(8, 2 * around)}"
            )
        return np.append(ids[:room], np.array(self.after, np.int32)) if self.after else ids[:room]

    def decode(self, ids: Any) -> str:
        known = [i for i in np.ravel(ids).tolist() if 0 <= i < self.vocab_size]
        return self._rust.decode(known, skip_special_tokens=False)

    def sizes(self) -> np.ndarray | None:
        if not self._bytewise:
            return None
        # in a byte-level vocabulary each byte is one character, and special tokens stand for no text
        found = np.zeros(self.vocab_size, np.int32)
        special = {i for i, token in self._rust.get_added_tokens_decoder().items() if token.special}
        for token, i in self._rust.get_vocab(with_added_tokens=True).items():
            found[i] = 0 if i in special else len(token)
        return found

    def to_json(self) -> str:
        return self._rust.to_str()

    def __str__(self) -> str:
        return f"tokenizer.json ({self.vocab_size:,})"


def pieces(text: str) -> list[str]:
    """Cut a long text at line ends into pieces of some 256,000 characters, which cores can share.

    It is cut between two nonblank lines, where byte-level BPE gives the same tokens as uncut.
    """
    out, start = [], 0
    while len(text) - start > _PIECE:
        cut = text.find("\n", start + _PIECE)
        while cut != -1 and (text[cut - 1].isspace() or text[cut + 1 : cut + 2].isspace()):
            cut = text.find("\n", cut + 1)
        if cut == -1:
            break
        out.append(text[start : cut + 1])
        start = cut + 1
    return [*out, text[start:]]


def build(
    name: str, documents: Callable[[], Iterable[str]], training: Callable[[], Iterable[str]] | None = None
) -> Tokenizer:
    """Build the tokenizer that `data.tokenizer` names.

    `documents` and `training` (the training texts; all by default) are read only if the vocabulary is made from them:
    chars has all characters of all texts, bpe and words see only the training texts.
    """
    kind, _, size = name.partition(":")
    if kind in ("bpe", "words") and size:
        if not size.isdecimal() or int(size) < 2:
            raise UserError(f"got data.tokenizer {name!r}, expected a number behind the colon, try {kind}:8000")
        learn = vocabulary.bpe if kind == "bpe" else vocabulary.words
        return HuggingFace(learn((training or documents)(), int(size)).to_str())
    if name in TOKENIZERS.names() or OUTSIDE.fullmatch(name):
        return TOKENIZERS.find(name).learn(documents)
    return load_tokenizer(Path(name).expanduser())


def load_tokenizer(path: Path) -> Tokenizer:
    """Load the tokenizer saved in a directory or a file."""
    file = path / FILE if path.is_dir() else path
    if path.is_dir() and not file.is_file():
        raise UserError(f"got {path} without {FILE}, expected a folder with one, try another run or folder")
    if not file.is_file():
        near = difflib.get_close_matches(str(path), ["bytes", "chars"], 1)
        known = "bytes, chars or the path of a tokenizer.json that exists"
        raise UserError(f"got tokenizer {str(path)!r}, expected {known}, try {near[0] if near else 'bytes'}")
    value = special.objects(file, "a Hugging Face tokenizer.json")
    try:
        if isinstance(kind := value.pop("kind", None), str):
            return TOKENIZERS.find(kind)(**value)
        return HuggingFace(file.read_text(encoding="utf-8"), file.parent if file.name == FILE else None)
    except UserError:
        raise
    except BaseException as error:  # the tokenizers library raises plain Exception, and worse where it panics
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"got {file}, expected a Hugging Face tokenizer.json ({reason}), try another file") from error


def train_bpe(texts: Iterable[str], vocab_size: int, out: Path) -> Tokenizer:
    """Train a byte-level BPE and save it to `out` as a tokenizer.json."""
    rust = vocabulary.bpe(texts, vocab_size)
    out.parent.mkdir(parents=True, exist_ok=True)
    rust.save(str(out))
    return load_tokenizer(out)
