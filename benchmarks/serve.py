"""`python -m benchmarks serve RUN [IMAGES]`: answers over HTTP, against transformers and against the bare function.

Clients send a request as soon as they have the answer to the one before. The peer continues the same prompts with
`generate` in batches of as many as there are clients, without HTTP; rows of a batch end together. It has one thread or
as many as there are cores, whichever was faster in the first turn: torch's threads wait for each other where others
run, too. Needs the extras `serve` and `parity`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from tyro.conf import Positional

from benchmarks import record
from jaxmodels.errors import UserError
from jaxmodels.fields import Range

IMAGES = 32
"""Images of a request."""
SENDERS = 4
"""Clients that send images: while one batch is computed, others are on their way."""
PEER = """
import json, sys, time
import torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
print(json.dumps([transformers.__version__, torch.__version__]), flush=True)

class First(transformers.StoppingCriteria):
    at = 0.0
    def __call__(self, ids, scores, **_):
        self.at = self.at or time.perf_counter()
        return torch.zeros(len(ids), dtype=torch.bool)

@torch.inference_mode()
def answer(batch):
    longest = max(len(each["prompt"]) for each in batch)
    ids = torch.tensor([[0] * (longest - len(each["prompt"])) + each["prompt"] for each in batch])
    mask = torch.tensor([[0] * (longest - len(each["prompt"])) + [1] * len(each["prompt"]) for each in batch])
    first, begin, count = First(), time.perf_counter(), max(each["count"] for each in batch)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0,
                         eos_token_id=None, stopping_criteria=[first])
    rows = [row[longest:longest + each["count"]].tolist() for row, each in zip(out, batch)]
    return rows, [first.at - begin] * len(batch)

for line in sys.stdin:
    clients, threads, asked = json.loads(line)
    torch.set_num_threads(threads)
    begin, rows, firsts = time.perf_counter(), [], []
    for i in range(0, len(asked), clients):
        new, at = answer(asked[i:i + clients])
        rows, firsts = rows + new, firsts + at
    print(json.dumps({"seconds": time.perf_counter() - begin, "first": firsts, "answers": rows}), flush=True)
"""


@dataclass(frozen=True)
class Options:
    """What is served."""

    run: Positional[Path]
    """Run directory of a language model, or one in Hugging Face's format."""
    images: Path | None = None
    """Run directory of a classifier of images."""
    clients: tuple[Annotated[int, Range(1, 1024)], ...] = (1, 8, 32)
    """Numbers of clients at once."""
    requests: Annotated[int, Range(1)] = 6
    """Requests of each client in a round."""
    prompt: Annotated[int, Range(2)] = 64
    """The most tokens of a prompt; they have half of this to this."""
    tokens: Annotated[int, Range(2)] = 96
    """The most tokens of an answer; they have a third of this to this."""
    rounds: Annotated[int, Range(1)] = 3
    """Turns of each."""
    out: Path | None = None
    """Folder for the results; by default, benchmarks/results."""


Prompt = dict[str, Any]
"""`prompt`, the ids of its tokens, and `count`, how many are to be added."""


@contextlib.contextmanager
def serving(model: Path) -> Iterator[int]:
    """The port at which a model is served by a process of its own."""
    command = [sys.executable, "-m", "jaxmodels", "serve", str(model), "--port", "0", "--name", "model"]
    with tempfile.NamedTemporaryFile() as log:
        process = subprocess.Popen([*command, "--queue", "100000"], stderr=log, cwd=record.ROOT)
        try:
            while True:
                printed = Path(log.name).read_text()
                if found := re.search(r"^ready: .*:(\d+)$", printed, re.M):
                    break
                if process.poll() is not None:
                    raise UserError(f"got {model}, which cannot be served: {printed.strip()[-300:]}")
                time.sleep(0.1)
            yield int(found[1])
        finally:
            process.terminate()
            process.wait(60)


async def _post(port: int, path: str, body: bytes, head: str = "") -> tuple[bytes, float]:
    """The body of an answer, and how long its first part took."""
    begin = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        lines = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{head}Content-Length: {len(body)}\r\n\r\n"
        writer.write(lines.encode() + body)
        status = await reader.readuntil(b"\r\n\r\n")
        parts = [await reader.read(1 << 16)]
        first = time.perf_counter() - begin
        while part := await reader.read(1 << 16):
            parts.append(part)
    finally:
        writer.close()
    line, whole = status.decode().splitlines()[0], b"".join(parts)
    if " 200 " not in line:
        raise UserError(f"got {line} of {path}: {whole[:300]!r}")
    return whole, first


def texts(port: int, clients: int, prompted: list[Prompt]) -> dict[str, Any]:
    """Have all of it answered over HTTP, as streams."""

    async def one(each: Prompt) -> tuple[str, float]:
        body = {"model": "model", "prompt": each["prompt"], "max_tokens": each["count"], "temperature": 0}
        raw, first = await _post(port, "/v1/completions", json.dumps({**body, "stream": True}).encode())
        events = re.findall(rb"^data: (\{.*\})", raw, re.M)
        return "".join(json.loads(event)["choices"][0]["text"] for event in events), first

    async def client(waiting: Iterator[tuple[int, Prompt]], found: dict[int, tuple[str, float]]) -> None:
        for i, each in waiting:
            found[i] = await one(each)

    async def together() -> dict[int, tuple[str, float]]:
        waiting, found = enumerate(prompted), {}
        await asyncio.gather(*(client(waiting, found) for _ in range(clients)))
        return found

    begin = time.perf_counter()
    found = asyncio.run(together())
    seconds = time.perf_counter() - begin
    ordered = [found[i] for i in range(len(prompted))]
    return {"seconds": seconds, "first": [at for _, at in ordered], "answers": [text for text, _ in ordered]}


def prompts(options: Options, clients: int, seed: int, vocabulary: int) -> list[Prompt]:
    """Requests of random lengths, no two of which begin in the same way."""
    rng, found = np.random.default_rng(seed), []
    for _ in range(clients * options.requests):
        length = int(rng.integers(options.prompt // 2, options.prompt + 1))
        count = int(rng.integers(max(options.tokens // 3, 1), options.tokens + 1))
        found.append({"prompt": rng.integers(0, vocabulary, length).tolist(), "count": count})
    return found


def language(options: Options, folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Tokens a second, and the time to the first token, of the server and of transformers."""
    from jaxmodels import data

    published = options.run
    if (published / "checkpoints").is_dir():
        published = folder / "published"
        _run("export", str(options.run), str(published))
    vocabulary = json.loads((published / "config.json").read_text())["vocab_size"]
    tokenizer, measured = data.load_tokenizer(published), []
    peer = subprocess.Popen(
        [sys.executable, "-c", PEER, str(published)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
    )  # fmt: skip
    assert peer.stdin is not None and peer.stdout is not None
    try:
        versions = json.loads(peer.stdout.readline() or '["?", "?"]')

        chosen: dict[int, int] = {}

        def with_threads(threads: int, clients: int, prompted: list[Prompt]) -> dict[str, Any]:
            print(json.dumps([clients, threads, prompted]), file=peer.stdin, flush=True)
            answered = json.loads(peer.stdout.readline())  # pyright: ignore[reportOptionalMemberAccess]
            return {**answered, "answers": [tokenizer.decode(row) for row in answered["answers"]]}

        def theirs(clients: int, prompted: list[Prompt]) -> dict[str, Any]:
            if clients not in chosen:
                tried = {n: with_threads(n, clients, prompted)["seconds"] for n in (1, os.cpu_count() or 1)}
                chosen[clients] = min(tried, key=lambda n: tried[n])
            return with_threads(chosen[clients], clients, prompted)

        with serving(options.run) as port:
            ways: dict[str, Callable[[int, list[Prompt]], dict[str, Any]]] = {
                "jaxmodels serve": lambda clients, prompted: texts(port, clients, prompted),
                "transformers generate": theirs,
            }
            for turn in range(options.rounds + 1):
                for clients in options.clients:
                    prompted = prompts(options, clients, 1000 * turn + clients, vocabulary)
                    tokens = sum(each["count"] for each in prompted)
                    found = {name: way(clients, prompted) for name, way in ways.items()}
                    same = np.mean([a == b for a, b in zip(*(each["answers"] for each in found.values()), strict=True)])
                    for name, each in found.items() if turn else ():  # the first turn warms up
                        speed = tokens / each["seconds"]
                        measured.append({"what": name, "clients": clients, "speed": speed, "same": same, **each})
    finally:
        peer.kill()
        peer.wait()
    rows = []
    for name in ways:
        for clients in options.clients:
            own = [each for each in measured if each["what"] == name and each["clients"] == clients]
            other = [e["speed"] for e in measured if e["what"] == "transformers generate" and e["clients"] == clients]
            first = np.concatenate([each["first"] for each in own])
            ratios = [each["speed"] / theirs for each, theirs in zip(own, other, strict=True)]
            rows.append({
                "what": name, "clients": clients, "unit": "tokens",
                "speed": statistics.median(each["speed"] for each in own), "ratio": statistics.median(ratios),
                "first_p50": float(np.percentile(first, 50)), "first_p99": float(np.percentile(first, 99)),
                "same": float(np.mean([each["same"] for each in own])),
            })  # fmt: skip
    threads = ", ".join(f"{count} for {clients}" for clients, count in chosen.items())
    peer_is = (
        f"transformers {versions[0]}, torch {versions[1]}, `generate` in batches, without HTTP, best threads: {threads}"
    )
    return rows, [peer_is]


def pictures(options: Options) -> list[dict[str, Any]]:
    """Images a second over HTTP, as bytes behind the JSON, and of the function that the server calls."""
    import jax

    from jaxmodels.generate.classes import class_shares
    from jaxmodels.train import load_run

    assert options.images is not None
    run = load_run(options.images)
    shape = (IMAGES, *run.model.inputs(1)[0].shape[1:])
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    shares = jax.jit(class_shares(run))
    tensor = {"name": "inputs", "datatype": "UINT8", "shape": shape, "parameters": {"binary_data_size": pixels.nbytes}}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    length = f"Inference-Header-Content-Length: {len(head)}\r\n"
    each = SENDERS * options.requests

    def bare() -> None:
        for _ in range(SENDERS * each):
            np.asarray(shares(run.params["model"], {"inputs": pixels}))

    async def client(port: int) -> None:
        for _ in range(each):
            await _post(port, "/v2/models/model/infer", head + pixels.tobytes(), length)

    async def together(port: int) -> None:
        await asyncio.gather(*(client(port) for _ in range(SENDERS)))

    with serving(options.images) as port:
        ways = {"jaxmodels serve": lambda: asyncio.run(together(port)), "bare jitted function": bare}
        times = record.interleave(ways, options.rounds)
    images, base = IMAGES * SENDERS * each, times["bare jitted function"]
    return [
        {
            "what": name, "clients": SENDERS, "unit": f"images of {'×'.join(map(str, shape[1:]))}, {IMAGES} a request",
            "speed": images / statistics.median(seconds),
            "ratio": statistics.median(b / s for s, b in zip(seconds, base, strict=True)),
        }
        for name, seconds in times.items()
    ]  # fmt: skip


def _run(*words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "jaxmodels", *words], cwd=record.ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise UserError(f"got exit code {done.returncode} of jaxmodels {' '.join(words)}: {done.stderr[-300:]}")


def run(options: Options) -> None:
    """Measure, print and record the results."""
    with tempfile.TemporaryDirectory() as folder:
        rows, notes = language(options, Path(folder))
    if options.images is not None:
        rows += pictures(options)
    columns = {
        "what": "what", "clients": "clients", "unit": "unit", "speed": "a second (median)",
        "ratio": "÷ the peer (median of turns)", "first_p50": "first token, p50 (s)", "first_p99": "p99 (s)",
        "same": "answers equal to the peer's",
    }  # fmt: skip
    lengths = f"prompts of {options.prompt // 2} to {options.prompt} tokens, answers of {options.tokens // 3} to "
    notes.append(f"{lengths}{options.tokens}, greedy, {options.requests} requests of each client in a turn")
    notes.append(f"{options.rounds} turns of each")
    print(record.write("serve", "Serving", rows, out=options.out, notes=notes, columns=columns).read_text())
