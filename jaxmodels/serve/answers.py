"""What the endpoints answer, as types; the server's description of itself is made from them."""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict


class Cached(TypedDict):
    cached_tokens: int


class Usage(TypedDict):
    """Tokens that were read and made."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: Cached


class Logprobs(TypedDict):
    """The log-probabilities of an answer's tokens, and of the likeliest ones at their places."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(TypedDict):
    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length"] | None


class CompletionAnswer(TypedDict):
    """A completion, or a part of one in a stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: NotRequired[Usage | None]


class Likely(TypedDict):
    token: str
    logprob: float
    bytes: list[int] | None


class Token(Likely):
    top_logprobs: list[Likely]


class ChatLogprobs(TypedDict):
    content: list[Token]


class Message(TypedDict):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(TypedDict):
    index: int
    message: Message
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatAnswer(TypedDict):
    """The answer to messages."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(TypedDict):
    role: NotRequired[Literal["assistant"]]
    content: str


class ChunkChoice(TypedDict):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class ChatChunk(TypedDict):
    """A part of the answer to messages in a stream."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: NotRequired[Usage | None]


class Embedding(TypedDict):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str
    """Numbers, or the base64 of float32 in little endian."""


class EmbeddingUsage(TypedDict):
    prompt_tokens: int
    total_tokens: int


class Embeddings(TypedDict):
    """A vector for each text."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class Model(TypedDict):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: NotRequired[int]


class Models(TypedDict):
    object: Literal["list"]
    data: list[Model]


class Mistake(TypedDict):
    message: str
    type: str
    param: None
    code: str | None


class Failure(TypedDict):
    """Why a request was refused, in OpenAI's form."""

    error: Mistake


class InferenceFailure(TypedDict):
    """Why a request was refused, in the form of the Open Inference Protocol."""

    error: str


class Status(TypedDict):
    status: str


class Server(TypedDict):
    name: str
    version: str
    extensions: list[str]


class TensorForm(TypedDict):
    """A tensor of the Open Inference Protocol; -1 stands for any number of rows."""

    name: str
    datatype: str
    shape: list[int]


class InferenceModel(TypedDict):
    """What a model takes and gives."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorForm]
    outputs: list[TensorForm]


class Readiness(TypedDict):
    name: str
    ready: bool


class Tensor(TensorForm):
    data: NotRequired[list[Any]]
    """In the order of rows; without it, the values lie as bytes behind the JSON."""
    parameters: NotRequired[dict[str, int]]


class Inference(TypedDict):
    """What a model gives for a request."""

    model_name: str
    model_version: str
    id: NotRequired[str]
    outputs: list[Tensor]
