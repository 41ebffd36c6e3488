"""A tiny language model in Hugging Face's format, and a server of it on a free port."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodels import create
from jaxmodels.generate.engine import Engine
from jaxmodels.hf.save import save_pretrained
from jaxmodels.models.llama import LlamaConfig
from jaxmodels.serve.opened import Opened, open_model
from jaxmodels.serve.server import Server, bound, make_served, prepare
from jaxmodels.serve.service import Limits, Service
from jaxmodels.serve.watch import Watch

TEMPLATE = (
    "{% for message in messages %}{% if message.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('no role ' + message.role) }}{% endif %}<{{ message.role }}>{{ message.content }}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def published(where: Path) -> Path:
    """A tiny LLaMA with a tokenizer of bytes and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    where.mkdir()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate([*letters, "<s>", "</s>"])}
    rust = Tokenizer(models.BPE(vocabulary, []))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    rust.save(str(where / "tokenizer.json"))
    told = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    (where / "tokenizer_config.json").write_text(json.dumps(told))
    model = create(
        LlamaConfig(vocab_size=258, context=96, layers=2, heads=4, kv_heads=2, width=32, mlp_width=48, tied=True)
    )
    rng = np.random.default_rng(0)

    def filled(tree: Any) -> Any:
        return {
            key: filled(leaf) if isinstance(leaf, dict) else 0.3 * rng.normal(size=leaf.shape).astype(np.float32)
            for key, leaf in tree.items()
        }

    save_pretrained(where, model, filled(model.shapes()))
    return where


@dataclass
class Live:
    """A server that runs in a thread."""

    service: Service
    server: Server
    port: int

    @property
    def engine(self) -> Engine:
        return next(iter(self.service.served.values())).engine

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, dict[str, str]]:
        """Send a request; returns its status, its JSON (or text, or bytes), and its headers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        sent = body if isinstance(body, bytes | type(None)) else json.dumps(body).encode()
        with contextlib.closing(connection):
            connection.request(method, path, sent, headers)
            answer = connection.getresponse()
            raw, told = answer.read(), {name.lower(): value for name, value in answer.getheaders()}
        kind = told.get("content-type", "")
        return answer.status, json.loads(raw) if "json" in kind else raw.decode() if "text" in kind else raw, told

    def post(self, path: str, **body: Any) -> tuple[int, Any]:
        return self.ask("POST", path, {"model": "tiny", **body})[:2]

    def until(self, true: Callable[[], bool]) -> None:
        """Wait until something is so."""
        end = time.monotonic() + 120
        while not true():
            assert time.monotonic() < end
            time.sleep(0.005)


@contextlib.contextmanager
def live(
    directory: Path | Opened,
    limits: Limits | None = None,
    ready: bool = True,
    more: Sequence[Opened] = (),
    watch: Watch | None = None,
    **engine: Any,
) -> Iterator[Live]:
    """Serve a directory, or what was opened, as "tiny", and others by their names, for as long as the context lasts."""
    made = {"rows": 4, "length": 96, "page": 8, "chunks": (16, 64), **engine}
    opened = open_model(directory, "tiny") if isinstance(directory, Path) else directory
    make = lambda each: make_served(each, lambda writer: Engine(writer.model, writer.params, **made), watch)  # noqa: E731
    service = Service({"tiny": make(opened), **{each.name: make(each) for each in more}}, limits or Limits())
    listening = bound("127.0.0.1", 0)
    server = Server(service, drain=60)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])), daemon=True)
    if ready:
        prepare(service, lambda _: None)
    thread.start()
    running = Live(service, server, listening.getsockname()[1])
    try:
        running.until(lambda: server.started)
        yield running
    finally:
        server.should_exit = True
        thread.join(60)
        if service.ready:
            for served in service.served.values():
                served.stop()
