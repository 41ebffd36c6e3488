"""What requests ask for: their bodies as checked objects. A field that is unknown, or would have no
effect, is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, Self

from jaxmodels.errors import UserError, nearest
from jaxmodels.fields import Count, Range, Section, shown
from jaxmodels.generate.draw import TOLD, Draw, seeded
from jaxmodels.serve.errors import Refused

IDLE = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")
"""Fields that say nothing about the answer."""
SAID = ("role", "content", "name")
"""The fields of a message that a chat template may read."""
MOST = 16
INPUTS = 2048
"""As many texts as OpenAI embeds at once."""


@dataclass(frozen=True)
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
            if name in values and values.pop(name) not in allowed:
                raise Refused(400, f"got {name}, which is not computed here, expected a request without it")
        known = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise Refused(400, f"got field {shown(name)}, expected one of {', '.join(known)}{nearest(name, known)}")
        for field in dataclasses.fields(cls):
            if field.default is dataclasses.MISSING and field.name not in values:
                raise Refused(400, f"got no {field.name}, expected it in the request")
        try:
            return cls(**values)
        except UserError as error:
            raise Refused.of(error) from None


@dataclass(frozen=True)
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
    stop: Any = None
    n: Annotated[int, Range(1, MOST)] = 1
    stream: bool = False
    stream_options: Any = None

    def __post_init__(self) -> None:
        stops = self.stops
        if len(stops) > MOST or not all(isinstance(stop, str) and 0 < len(stop) <= 1000 for stop in stops):
            raise UserError(f"got stop {shown(self.stop)}, expected a text, or up to {MOST}, none empty")
        options = self.stream_options
        if options is not None and (not isinstance(options, dict) or set(options) - {"include_usage"}):
            raise UserError(f"got stream_options {shown(options)}, expected an object with include_usage")
        if options is not None and not isinstance(options.get("include_usage", False), bool):
            raise UserError(f"got stream_options {shown(options)}, expected include_usage to be true or false")
        if options is not None and not self.stream:
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


@dataclass(frozen=True)
class Completion(Asked):
    """A prompt to continue: a text or token ids, or several of them."""

    prompt: Any = ""
    logprobs: Annotated[int, Range(0, TOLD)] | None = None
    best_of: Annotated[int, Range(1, MOST)] | None = None

    def __post_init__(self) -> None:
        Asked.__post_init__(self)
        if self.best_of not in (None, self.n):
            raise UserError(f"got best_of {self.best_of}, expected it to be n, {self.n}")
        wrong = not self.prompts or len(self.prompts) > 256
        if wrong or not all(isinstance(prompt, str) or tokens(prompt) for prompt in self.prompts):
            raise UserError(
                f"got prompt {shown(self.prompt)}, expected a text, a list of token ids, or a list of up to 256 of "
                "either"
            )

    @property
    def told(self) -> int:
        return -1 if self.logprobs is None else self.logprobs

    @property
    def prompts(self) -> list[Any]:
        return self.prompt if isinstance(self.prompt, list) and not tokens(self.prompt) else [self.prompt]


@dataclass(frozen=True)
class Chat(Asked):
    """Messages to answer."""

    messages: Any = ()
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Range(0, TOLD)] | None = None

    def __post_init__(self) -> None:
        Asked.__post_init__(self)
        if self.top_logprobs is not None and not self.logprobs:
            raise UserError("got top_logprobs without logprobs, expected it with logprobs true alone")
        if not isinstance(self.messages, list) or not 0 < len(self.messages) <= 4096:
            raise UserError(f"got messages {shown(self.messages)}, expected a list of at least one message")
        for message in self.messages:
            # an answer that a client sends back has fields of its own, with nothing in them
            known = isinstance(message, dict) and all(key in SAID or not value for key, value in message.items())
            if not known or not isinstance(message.get("role"), str) or text_of(message.get("content")) is None:
                raise UserError(f"got message {shown(message)}, expected an object with a role and a content of text")

    @property
    def told(self) -> int:
        return (self.top_logprobs or 0) if self.logprobs else -1

    @property
    def texts(self) -> list[dict[str, Any]]:
        """The messages, with their contents as one text each."""
        told = [{key: message[key] for key in SAID if key in message} for message in self.messages]
        return [{**message, "content": text_of(message["content"])} for message in told]


@dataclass(frozen=True)
class Embed(Body):
    """Texts to embed: a text or token ids, or several of them."""

    neutral = MappingProxyType({"dimensions": ()})
    input: Any = ""
    encoding_format: Literal["float", "base64"] = "float"

    def __post_init__(self) -> None:
        wrong = not self.inputs or len(self.inputs) > INPUTS
        if wrong or not all((isinstance(each, str) and each) or tokens(each) for each in self.inputs):
            raise UserError(
                f"got input {shown(self.input)}, expected a text, a list of token ids, or a list of up to "
                f"{INPUTS:,} of either, none empty"
            )

    @property
    def inputs(self) -> list[Any]:
        return self.input if isinstance(self.input, list) and not tokens(self.input) else [self.input]


def tokens(value: Any) -> bool:
    """Whether a value is a list of token ids."""
    return isinstance(value, list) and bool(value) and all(type(i) is int and 0 <= i < 2**31 for i in value)


def text_of(content: Any) -> str | None:
    """The text of a message's content, which may come in parts; None if it is something else."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        return None
    texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
    whole = len(texts) == len(content) and all(isinstance(text, str) for text in texts)
    return "\n".join(map(str, texts)) if whole else None


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
