"""What requests ask for: their bodies as checked objects. A field that is unknown, or would have no
effect, is refused."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, Self, get_args, get_type_hints

from jaxmodels.errors import UserError, nearest
from jaxmodels.fields import Count, Range, Section, docs, shown
from jaxmodels.generate.draw import TOLD, Draw, seeded
from jaxmodels.serve.errors import Refused
from jaxmodels.serve.forms import Form, Schema, fits, schema

IDLE = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")
"""Fields that say nothing about the answer."""
SAID = ("role", "content", "name")
"""The fields of a message that a chat template may read."""
MOST = 16
INPUTS = 2048
"""As many texts as OpenAI embeds at once."""

TEXT: Schema = {"type": "string"}
NOT_EMPTY: Schema = {"type": "string", "minLength": 1}
TOKENS: Schema = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}, "minItems": 1}


def _some(*kinds: Schema, most: int) -> Schema:
    """A value of one of some kinds, or a list of up to so many; of numbers, there are none without a list."""
    several = {"type": "array", "items": {"anyOf": kinds}, "minItems": 1, "maxItems": most}
    return {"anyOf": [*kinds, several]}


_STOP = {**NOT_EMPTY, "maxLength": 1000}
STOP = Form(
    f"a text, or up to {MOST}, none empty",
    {"anyOf": [_STOP, {"type": "array", "items": _STOP, "maxItems": MOST}]},
)
STREAM = Form(
    "an object with include_usage, true or false",
    {"type": "object", "properties": {"include_usage": {"type": "boolean"}}, "additionalProperties": False},
)
PROMPT = Form("a text, a list of token ids, or a list of up to 256 of either", _some(TEXT, TOKENS, most=256))
INPUT = Form(
    f"a text, a list of token ids, or a list of up to {INPUTS:,} of either, none empty",
    _some(NOT_EMPTY, TOKENS, most=INPUTS),
)
_PART = {"type": "object", "properties": {"type": {"enum": ["text"]}, "text": TEXT}, "required": ["type", "text"]}
_MESSAGE = {
    "type": "object",
    "properties": {
        "role": TEXT,
        "content": {"anyOf": [TEXT, {"type": "array", "items": _PART, "minItems": 1}]},
        "name": {"anyOf": [TEXT, {"type": "null"}]},
    },
    "required": ["role", "content"],
    # an answer that a client sends back has fields of its own, with nothing in them
    "additionalProperties": {"enum": [None, False, 0, "", [], {}]},
}
MESSAGES = Form(
    "a list of messages, each an object with a role and a content of text",
    {"type": "array", "items": _MESSAGE, "minItems": 1, "maxItems": 4096},
)


@dataclass(frozen=True, kw_only=True)
class Body(Section):
    """What all requests have in common."""

    model: str
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = MappingProxyType({})
    """Fields that are not computed here, and the values (null too) with which nothing is asked."""

    @classmethod
    def read(cls, body: bytes) -> Self:
        """Read a request's body.

        Raises:
            Refused: it is no JSON object, or a field is not what it should be.
        """
        values = {name: value for name, value in objects(body).items() if value is not None and name not in IDLE}
        for name, allowed in cls.neutral.items():
            if name in values and not fits({"enum": allowed}, values.pop(name)):
                raise Refused(400, f"got {name}, which is not computed here, expected a request without it")
        known = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise Refused(400, f"got field {shown(name)}, expected one of {', '.join(known)}{nearest(name, known)}")
        for field in dataclasses.fields(cls):
            if field.default is dataclasses.MISSING and field.name not in values:
                raise Refused(400, f"got no {field.name}, expected it in the request")
        for name, form in _forms(cls).items():
            if name in values and not fits(form.schema, values[name]):
                raise Refused(400, f"got {name} {shown(values[name])}, expected {form.said}")
        try:
            return cls(**values)
        except UserError as error:
            raise Refused.of(error) from None

    @classmethod
    def schema(cls, models: Sequence[str]) -> Schema:
        """The JSON schema of a body for one of some models; a value of null is that of a field that is not there."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        hints, about = get_type_hints(cls, include_extras=True), docs(cls)
        properties: dict[str, Any] = {}
        for name, field in fields.items():
            form = {"enum": list(models)} if name == "model" else schema(hints[name], {})
            if field.default is not dataclasses.MISSING:
                form = form if field.default is None else {"anyOf": [form, {"type": "null"}], "default": field.default}
            properties[name] = form | ({"description": about[name]} if name in about else {})
        properties |= {name: {"enum": [*allowed, None]} for name, allowed in cls.neutral.items()}
        required = [name for name, field in fields.items() if field.default is dataclasses.MISSING]
        properties |= {name: {"description": "ignored"} for name in IDLE}
        return {
            "type": "object",
            "properties": properties,
            "required": required,
            "additionalProperties": {"type": "null"},
        }


@dataclass(frozen=True, kw_only=True)
class Asked(Body):
    """What completions and chats have in common."""

    neutral = MappingProxyType(
        {
            "logit_bias": ({},),
            "echo": (False,),
            "suffix": ("",),
            "tools": ([],),
            "tool_choice": ("none", "auto"),
            "functions": ([],),
            "response_format": ({"type": "text"},),
            "modalities": (["text"],),
        }
    )
    max_tokens: Count | None = None
    temperature: Annotated[float, Range(0, 2)] = 1.0
    top_p: Annotated[float, Range(above=0, most=1)] = 1.0
    top_k: Annotated[int, Range(-1, 2**31 - 1)] = 0
    """0 or -1: all."""
    min_p: Annotated[float, Range(0, 1)] = 0.0
    repetition_penalty: Annotated[float, Range(above=0, most=1e9)] | None = None
    """What the files of an imported model ask for when it is not given."""
    presence_penalty: Annotated[float, Range(-2, 2)] = 0.0
    frequency_penalty: Annotated[float, Range(-2, 2)] = 0.0
    seed: Annotated[int, Range(-(2**63), 2**63 - 1)] | None = None
    stop: Annotated[Any, STOP] | None = None
    n: Annotated[int, Range(1, MOST)] = 1
    stream: bool = False
    stream_options: Annotated[Any, STREAM] | None = None

    def __post_init__(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise UserError("got stream_options without stream, expected it with stream true alone")

    @property
    def stops(self) -> list[Any]:
        return self.stop if isinstance(self.stop, list) else [] if self.stop is None else [self.stop]

    @property
    def counted(self) -> bool:
        """Whether a stream ends with the counts of tokens."""
        return bool(self.stream_options and self.stream_options.get("include_usage"))

    @property
    def told(self) -> int:
        """How many of the likeliest tokens' log-probabilities are asked for; -1: none."""
        return -1

    def draws(self, penalty: float, fresh: int) -> list[Draw]:
        """How each of the n answers is drawn; `fresh` is the seed where none is given.

        Raises:
            Refused: an option is out of range.
        """
        seed = (fresh if self.seed is None else self.seed) % 2**32
        try:
            made = Draw(
                self.temperature,
                max(self.top_k, 0),
                self.top_p,
                self.min_p,
                penalty if self.repetition_penalty is None else self.repetition_penalty,
                self.presence_penalty,
                self.frequency_penalty,
                seed,
                self.told,
            )
        except UserError as error:
            raise Refused.of(error) from None
        return [dataclasses.replace(made, seed=seeded(seed, i)) for i in range(self.n)]


@dataclass(frozen=True, kw_only=True)
class Completion(Asked):
    """A prompt to continue: a text or token ids, or several of them."""

    prompt: Annotated[Any, PROMPT]
    logprobs: Annotated[int, Range(0, TOLD)] | None = None
    best_of: Annotated[int, Range(1, MOST)] | None = None

    def __post_init__(self) -> None:
        Asked.__post_init__(self)
        if self.best_of not in (None, self.n):
            raise UserError(f"got best_of {self.best_of}, expected it to be n, {self.n}")

    @property
    def told(self) -> int:
        return -1 if self.logprobs is None else self.logprobs

    @property
    def prompts(self) -> list[Any]:
        return several(self.prompt)


@dataclass(frozen=True, kw_only=True)
class Chat(Asked):
    """Messages to answer."""

    messages: Annotated[Any, MESSAGES]
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Range(0, TOLD)] | None = None

    def __post_init__(self) -> None:
        Asked.__post_init__(self)
        if self.top_logprobs is not None and not self.logprobs:
            raise UserError("got top_logprobs without logprobs, expected it with logprobs true alone")

    @property
    def told(self) -> int:
        return (self.top_logprobs or 0) if self.logprobs else -1

    @property
    def texts(self) -> list[dict[str, Any]]:
        """The messages, with their contents as one text each."""
        told = [{key: message[key] for key in SAID if key in message} for message in self.messages]
        return [{**message, "content": text_of(message["content"])} for message in told]


@dataclass(frozen=True, kw_only=True)
class Embed(Body):
    """Texts to embed: a text or token ids, or several of them."""

    neutral = MappingProxyType({"dimensions": ()})
    input: Annotated[Any, INPUT]
    encoding_format: Literal["float", "base64"] = "float"

    @property
    def inputs(self) -> list[Any]:
        return several(self.input)


def several(value: Any) -> list[Any]:
    """Texts or lists of token ids: one of them as a list."""
    return value if isinstance(value, list) and not isinstance(value[0], int) else [value]


def text_of(content: str | list[dict[str, str]]) -> str:
    """The text of a message's content, which may come in parts."""
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


@functools.cache
def _forms(kind: type[Body]) -> Mapping[str, Form]:
    """The fields of a body whose forms no type of Python says."""
    notes = {name: list(_notes(hint)) for name, hint in get_type_hints(kind, include_extras=True).items()}
    return {name: note for name, found in notes.items() for note in found if isinstance(note, Form)}


def _notes(hint: Any) -> Iterator[Any]:
    """What is noted at a type, and at those inside it."""
    yield from getattr(hint, "__metadata__", ())
    for inner in get_args(hint):
        yield from _notes(inner)


def objects(body: bytes) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        Refused: it is none.
    """
    try:
        value = json.loads(body, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error)
        raise Refused(400, f"got a body that is no JSON ({reason}), expected a JSON object") from None
    if not isinstance(value, dict):
        raise Refused(400, f"got a body with {type(value).__name__}, expected a JSON object")
    return value


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")
