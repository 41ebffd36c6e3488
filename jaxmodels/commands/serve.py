"""`jaxmodels serve RUN`: a language model, encoder or classifier over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from jaxmodels.errors import UserError
from jaxmodels.fields import Count, KVCache, Positive, Range

Port = Annotated[int, Range(0, 65535)]
Rows = Annotated[int, Range(1, 4096)]


def serve(
    models: tuple[str, ...],
    /,
    name: str = "",
    host: str = "127.0.0.1",
    port: Port = 8000,
    rows: Rows = 32,
    length: Count | None = None,
    cache_gib: Positive | None = None,
    queue: Annotated[int, Range(0, 1_000_000)] = 256,
    timeout: Positive = 600.0,
    drain: Positive = 30.0,
    body_mib: Positive = 4.0,
    keys: Path | None = None,
    log_prompts: bool = False,
    best: bool = False,
    adapter: tuple[str, ...] = (),
    speculate: Annotated[int, Range(0, 64)] = 0,
    kv_cache: KVCache | None = None,
    monitor: tuple[str, ...] = (),
    monitor_rows: Annotated[int, Range(50, 1_000_000)] = 500,
    monitor_share: Annotated[float, Range(above=0, most=1)] = 1.0,
) -> None:
    """Serve a language model or an encoder by OpenAI's API (/v1), or a classifier by the Open Inference Protocol (/v2).

    All programs are compiled before the server is ready. SIGTERM answers what was taken, and refuses the rest with 503.

    Args:
        models: run directories, those of language models and encoders in Hugging Face's format, or artefacts of
            classifiers; NAME=DIR gives one a name in requests, which is that of the directory by default.
        name: the name of a single model.
        host: address to listen at; this machine alone by default.
        port: port to listen at; 0 takes a free one.
        rows: answers that are made at once.
        length: most tokens of a prompt with its answer; the model's context by default, or 4096.
        cache_gib: GiB of each key-value cache; by default enough for all rows, but at most 1.
        queue: answers that may wait for a row; beyond that, requests are refused with 429.
        timeout: seconds that an answer may take.
        drain: seconds after SIGTERM in which what was taken is answered.
        body_mib: MiB that the body of a request may have.
        keys: file with API keys, one a line, of which a request must have one.
        log_prompts: write the bodies of requests into the log.
        best: use the best checkpoint instead of the newest.
        adapter: NAME=DIR of runs with an adapter, which are served beside the model by their names, each merged into
            weights, with a cache of its own.
        speculate: tokens that each step guesses from the text itself, and checks; answers stay the same. It pays where
            answers repeat what was said before, and few are made at once.
        kv_cache: int8 holds keys and values as codes of a byte, so that `cache_gib` has room for about four times the
            tokens of a float32 model and twice those of a bfloat16 one; answers may be others.
        monitor: NAME=FILE of records from when all was well, with which those that the classifier NAME is sent are
            compared, as `jaxmodels monitor` does; /metrics tells.
        monitor_rows: records of each comparison.
        monitor_share: the share of records that is taken for it, by chance.
    """
    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(
            f"got no package {error.name}, expected it to serve, try pip install 'jaxmodels[serve]'"
        ) from error

    from jaxmodels.generate.engine import Engine, pages_of
    from jaxmodels.models.model import with_kv_cache
    from jaxmodels.serve.opened import Writer, open_adapters, open_models
    from jaxmodels.serve.server import bound, make_served, say
    from jaxmodels.serve.server import serve as run
    from jaxmodels.serve.service import Limits, Service
    from jaxmodels.train.run import compilation_cache

    known = read_keys(keys) if keys else ()
    listening = bound(host, port)
    compilation_cache()
    opened = open_models(models, name, best)
    opened += open_adapters(adapter, [each.name for each in opened], best)
    if all(each.writer is None for each in opened) and (length or cache_gib or kv_cache):
        given = "length" if length else "cache-gib" if cache_gib else "kv-cache"
        raise UserError(
            f"got --{given} for a model that writes no texts, expected it for one that does, try it without"
        )

    def engine(writer: Writer) -> Engine:
        model = with_kv_cache(writer.model, kv_cache)
        room = None if cache_gib is None else pages_of(model, int(cache_gib * 2**30))
        return Engine(model, writer.params, rows=rows, length=length, pages=room, drafts=speculate)

    watches = {}
    if monitor:
        from jaxmodels.serve.watch import open_watches

        watches = open_watches(monitor, opened, monitor_rows, monitor_share)
    limits = Limits(int(body_mib * 2**20), timeout, queue, known)
    served = {each.name: make_served(each, engine, watches.get(each.name)) for each in opened}
    service = Service(served, limits, prompts=log_prompts)
    at = listening.getsockname()
    where = f"http://{f'[{at[0]}]' if ':' in at[0] else at[0]}:{at[1]}"
    if not known and host not in ("127.0.0.1", "localhost", "::1"):
        say(f"{where} can be reached from elsewhere, and asks for no key: --keys FILE would")
    run(service, listening, drain, lambda: say(f"ready: {', '.join(served)} at {where}"))


def read_keys(file: Path) -> tuple[str, ...]:
    """Read the API keys in a file, one a line.

    Raises:
        UserError: it cannot be read, or has none.
    """
    try:
        found = tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"got --keys {file}, which cannot be read ({error}), expected a key a line") from error
    if not found:
        raise UserError(f"got --keys {file}, which is empty, expected a key a line, try openssl rand -hex 32 > {file}")
    return found
