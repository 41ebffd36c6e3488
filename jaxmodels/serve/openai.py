"""OpenAI's endpoints for texts: completions and chats, whole or as a stream of events."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from jaxmodels.errors import UserError
from jaxmodels.generate.engine import Step, Text
from jaxmodels.serve.answers import Model, Usage
from jaxmodels.serve.asked import Asked, Chat, Completion
from jaxmodels.serve.errors import Broken, Refused, body
from jaxmodels.serve.opened import finite
from jaxmodels.serve.service import Served, Service, gone
from jaxmodels.serve.words import UNKNOWN, Words

FINISH = {"stop": "stop", "length": "length"}
LONG = 20_000
"""Characters from which on a prompt is encoded in a thread."""


@dataclass
class Told:
    """The log-probability of a token, and those of the likeliest ones."""

    text: str
    logprob: float
    likeliest: list[tuple[str, float]]
    offset: int


@dataclass
class Piece:
    """A part of an answer."""

    text: str
    told: list[Told] = field(default_factory=list)
    finish: str | None = None


@dataclass
class Answer:
    """One of the answers to a request, while it is made."""

    index: int
    text: Text
    words: Words
    served: Served
    count: int = 0
    length: int = 0

    async def pieces(self, service: Service) -> AsyncGenerator[Piece]:
        """Yield the answer piece by piece; the last one says why it ended."""
        waiting: list[Told] = []
        began, finish = time.monotonic(), None
        try:
            async with contextlib.aclosing(service.follow(self.served, self.text)) as steps:
                async for step in steps:
                    new = "" if step.token is None else self.words.add(step.token)
                    if step.token is not None:
                        self.count += 1
                        if self.text.draw.told >= 0:
                            waiting.append(self._told(step))
                    if step.finish and not self.words.stopped:
                        new += self.words.rest()
                    finish = "stop" if self.words.stopped else step.finish
                    self.length += len(new)
                    if new or finish:
                        yield Piece(new, waiting, finish)
                        waiting = []
                    if finish:
                        return
        finally:
            service.metrics.done(finish or "abort", time.monotonic() - began, len(self.text.prompt), self.count)

    def _told(self, step: Step) -> Told:
        name = self.served.writer.tokenizer.decode
        pairs = [(name([token]), finite(logprob)) for token, logprob in step.likeliest]
        return Told(name([step.token]), finite(step.logprob), pairs, self.length)


async def completions(request: Request) -> Response:
    """Continue a text, or several."""
    service: Service = request.app.state.service
    asked = Completion.read(await service.body(request))
    served = service.writer(asked.model)
    prompts = [await _encoded(served, prompt) for prompt in asked.prompts]
    answers = _answers(service, served, asked, prompts, asked.max_tokens or 16)
    return await _respond(request, service, asked, answers, _Form(f"cmpl-{secrets.token_hex(12)}", asked.model, False))


async def _encoded(served: Served, prompt: Any) -> list[int]:
    """The tokens of a prompt; others do not wait for a long one to be encoded."""
    if not isinstance(prompt, str):
        return prompt
    if len(prompt) < LONG:
        return served.writer.encode(prompt)
    return await asyncio.to_thread(served.writer.encode, prompt)


async def chats(request: Request) -> Response:
    """Answer messages, by the model's chat template."""
    service: Service = request.app.state.service
    asked = Chat.read(await service.body(request))
    served = service.writer(asked.model)
    prompt = served.writer.chat(asked.texts)
    room = max(served.engine.shape.length - len(prompt), 1)
    answers = _answers(service, served, asked, [prompt], asked.max_completion_tokens or asked.max_tokens or room)
    return await _respond(
        request, service, asked, answers, _Form(f"chatcmpl-{secrets.token_hex(12)}", asked.model, True)
    )


async def models(request: Request) -> Response:
    """The models that are served."""
    service: Service = request.app.state.service
    return JSONResponse({"object": "list", "data": [_card(service, served) for served in service.served.values()]})


async def model(request: Request) -> Response:
    """A model that is served."""
    service: Service = request.app.state.service
    return JSONResponse(_card(service, service.find(request.path_params["name"])))


def _card(service: Service, served: Served) -> Model:
    card: Model = {"id": served.opened.name, "object": "model", "created": service.began, "owned_by": "jaxmodels"}
    if served.worker is not None:
        card["max_model_len"] = served.engine.shape.length
    return card


def _answers(service: Service, served: Served, asked: Asked, prompts: list[list[int]], limit: int) -> list[Answer]:
    """The texts that a request asks for, before the engine has them."""
    writer = served.writer
    draws, made = asked.draws(writer.penalty, secrets.randbits(32)), []
    for prompt in prompts:
        if not prompt:
            raise Refused(400, "got an empty prompt, expected at least one token")
        try:
            served.engine.check(prompt, limit)
        except UserError as error:
            long = len(prompt) + limit > served.engine.shape.length
            raise Refused(400, str(error), "context_length_exceeded" if long else None) from None
        for draw in draws:
            text = Text(prompt, limit, draw, writer.tokenizer.special.ends)
            made.append(Answer(len(made), text, Words(writer.tokenizer, prompt, asked.stops), served))
    service.admit(served, len(made))
    return made


@dataclass(frozen=True)
class _Form:
    """How answers are written: a completion or a chat."""

    id: str
    model: str
    chat: bool

    def head(self, stream: bool) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if stream else "chat.completion") if self.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": int(time.time()), "model": self.model}

    def choice(self, index: int, piece: Piece, asked: bool, stream: bool) -> dict[str, Any]:
        finish = piece.finish and FINISH[piece.finish]
        told = self.told(piece.told) if asked else None
        if not self.chat:
            return {"index": index, "text": piece.text, "logprobs": told, "finish_reason": finish}
        message = {"content": piece.text} if stream else {"role": "assistant", "content": piece.text, "refusal": None}
        return {"index": index, "delta" if stream else "message": message, "logprobs": told, "finish_reason": finish}

    def told(self, all_told: list[Told]) -> dict[str, Any]:
        if not self.chat:
            return {
                "tokens": [told.text for told in all_told],
                "token_logprobs": [told.logprob for told in all_told],
                "top_logprobs": [dict(told.likeliest) for told in all_told],
                "text_offset": [told.offset for told in all_told],
            }
        # the bytes of a part of a character are not known
        coded = lambda text: None if UNKNOWN in text else list(text.encode("utf-8", "replace"))  # noqa: E731
        entry = lambda text, logprob: {"token": text, "logprob": logprob, "bytes": coded(text)}  # noqa: E731
        return {
            "content": [
                {**entry(told.text, told.logprob), "top_logprobs": [entry(*pair) for pair in told.likeliest]}
                for told in all_told
            ]
        }


def _usage(answers: list[Answer]) -> Usage:
    prompts = {id(answer.text.prompt): len(answer.text.prompt) for answer in answers}
    read, made = sum(prompts.values()), sum(answer.count for answer in answers)
    shared = max((answer.text.shared for answer in answers), default=0)
    return {
        "prompt_tokens": read,
        "completion_tokens": made,
        "total_tokens": read + made,
        "prompt_tokens_details": {"cached_tokens": min(shared, read)},
    }


async def _respond(request: Request, service: Service, asked: Asked, answers: list[Answer], form: _Form) -> Response:
    if asked.stream:
        return Stream(_events(request, service, asked, answers, form), lambda: service.leave(len(answers)))

    async def whole(answer: Answer) -> dict[str, Any]:
        async with contextlib.aclosing(answer.pieces(service)) as pieces:
            found = [piece async for piece in pieces]
        joined = Piece("".join(p.text for p in found), [told for p in found for told in p.told], found[-1].finish)
        return form.choice(answer.index, joined, asked.told >= 0, stream=False)

    try:
        choices = await service.unless_gone(request, asyncio.gather(*(whole(answer) for answer in answers)))
    finally:
        service.leave(len(answers))
    usage = _usage(answers)
    service.note(request, usage)
    return JSONResponse({**form.head(False), "choices": choices, "usage": usage})


class Stream(StreamingResponse):
    """A stream of events that ends as soon as the client hangs up, whether it has begun or not."""

    def __init__(self, events: AsyncGenerator[str], leave: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._events, self._leave = events, leave

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sent, left = asyncio.create_task(self.stream_response(send)), asyncio.create_task(gone(receive))
        try:
            await asyncio.wait({sent, left}, return_when=asyncio.FIRST_COMPLETED)
            if sent.done() and not isinstance(sent.exception(), OSError):  # which says that nobody listens
                sent.result()
        finally:
            sent.cancel()
            left.cancel()
            await asyncio.gather(sent, left, return_exceptions=True)
            await self._events.aclose()
            self._leave()


async def _events(
    request: Request, service: Service, asked: Asked, answers: list[Answer], form: _Form
) -> AsyncGenerator[str]:
    """The events of a stream: pieces of all answers as they come, the counts if asked for, and the end."""
    pieces: asyncio.Queue[tuple[Answer, Piece | Exception]] = asyncio.Queue()
    event = lambda told: f"data: {json.dumps(told, ensure_ascii=False)}\n\n"  # noqa: E731
    more = {"usage": None} if asked.counted else {}

    async def read(answer: Answer) -> None:
        try:
            async with contextlib.aclosing(answer.pieces(service)) as found:
                async for piece in found:
                    pieces.put_nowait((answer, piece))
        except Exception as error:
            pieces.put_nowait((answer, error))

    tasks = [asyncio.create_task(read(answer)) for answer in answers]
    try:
        if form.chat:
            for answer in answers:
                first = {"index": answer.index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
                yield event({**form.head(True), "choices": [{**first, "logprobs": None}], **more})
        left = len(answers)
        async with asyncio.timeout(service.limits.seconds):
            while left:
                answer, piece = await pieces.get()
                if isinstance(piece, Exception):
                    raise piece
                left -= piece.finish is not None
                choice = form.choice(answer.index, piece, asked.told >= 0, stream=True)
                yield event({**form.head(True), "choices": [choice], **more})
        usage = _usage(answers)
        service.note(request, usage)
        if asked.counted:
            yield event({**form.head(True), "choices": [], "usage": usage})
        yield "data: [DONE]\n\n"
    except (Broken, TimeoutError) as error:
        late = isinstance(error, TimeoutError)
        said = f"took longer than {service.limits.seconds:g} s" if late else "could not be finished"
        yield event(body(503, f"the answer {said}"))
    finally:
        for task in tasks:
            task.cancel()
