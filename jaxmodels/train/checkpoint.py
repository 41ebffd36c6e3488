"""Checkpoints: saved in the background, complete or absent, verified by hash when read.

    checkpoints/1000/state/         the arrays, in Orbax's format, under the paths of the state
    checkpoints/1000/meta.json      what the caller passed: config, versions, data fingerprint
    checkpoints/1000/manifest.json  sha256 and size of every file; path, dtype and shape of every array
    checkpoints/best.json           step and metric of the best one

A folder with a plain number is complete by construction: it is written as `1000.saving`, flushed, then renamed.
"""

from __future__ import annotations

import collections
import errno
import json
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jaxmodels.errors import UserError
from jaxmodels.parallel import progress
from jaxmodels.train.arrays import (
    await_all,
    check_structure,
    load,
    merge,
    named_leaves,
    needed_bytes,
    nest,
    orbax,
    parse_spec,
    select,
    spec_of,
    start_writing,
)
from jaxmodels.train.manifest import (
    Damaged,
    flush,
    megabytes,
    read_manifest,
    read_meta,
    remove,
    render,
    seal,
    verify,
    write_text,
)

PyTree = Any
logger = logging.getLogger("jaxmodels")

_BARRIER_TIMEOUT = 1800  # seconds; JAX's heartbeat notices a dead process long before
_attempts: collections.Counter[str] = collections.Counter()  # per folder, so that barrier names agree across processes


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or none of those on the disk can be read."""

    shown = False  # on the terminal already, by the log


class Checkpointer:
    """The checkpoints of one run; every process creates one of these and calls it at the same steps.

    `save` and `restore` are for the run that owns the folder; `steps`, `best` and `restore_params` only read.
    """

    def __init__(self, directory: Path | str, *, keep: int = 2) -> None:
        self.directory = Path(directory).absolute()
        self.keep = keep
        self._thread: threading.Thread | None = None
        self._error: CheckpointError | None = None
        self._stale: set[int] = set()  # newer than the one restored: damaged, or from an abandoned continuation

    def warm(self) -> None:
        """Import Orbax in the background, so that the first save does not wait for it."""
        # not a daemon: one still running when the interpreter exits may abort the process, and the exit code is lost
        threading.Thread(target=orbax).start()

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        if not self.directory.is_dir():
            return []
        names = [path.name for path in self.directory.iterdir() if path.is_dir()]
        # only as `save` names them, because int() also accepts other spellings of a number
        return sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name, re.ASCII))

    def best(self) -> dict[str, Any] | None:
        """Step and metric of the best checkpoint: the newest one that was saved with `best=True`."""
        for step in reversed(self.steps()):
            try:
                if step not in self._stale and read_manifest(self._folder(step))["best"]:
                    return {"step": step, "metric": read_meta(self._folder(step)).get("metric")}
            except (Damaged, OSError, ValueError):
                continue
        return None

    def save(self, step: int, state: PyTree, meta: dict[str, Any], *, best: bool = False) -> None:
        """Start saving `state`, which may be donated as soon as this returns.

        An earlier save is awaited first. A save that fails is logged, and raised by `wait` unless a later one succeeds.
        `meta["metric"]` goes into best.json.
        """
        self._join()
        self._error = None
        started = time.perf_counter()
        leaves = named_leaves(state)
        manifest = {"best": best, "tree": {name: spec_of(leaf) for name, leaf in leaves.items()}}
        meta_text = json.dumps(meta, indent=1)
        size = needed_bytes(leaves) + len(meta_text)
        _attempts[str(self.directory)] += 1
        folder = self._folder(step, ".saving")
        futures: list[Any] = []
        failure: Exception | None = None
        try:
            if _is_main():
                self.directory.mkdir(exist_ok=True)  # not its parents: a run that was removed must not reappear
                self._clean()
                (folder / "state").mkdir(parents=True)
                write_text(folder / "meta.json", meta_text)
        except OSError as error:
            failure = error
        try:
            self._barrier("created")
            if failure is None:
                if not folder.is_dir():
                    raise OSError(f"process 0 could not create {folder}")
                if shutil.disk_usage(folder).free < size:
                    # checked beforehand, because TensorStore would print a traceback for each array
                    raise OSError(os.strerror(errno.ENOSPC))
                futures = start_writing(folder / "state", leaves)
        except Exception as error:  # a full disk raises one of several types; the run must go on
            failure = error
        arguments = (step, futures, failure, manifest, size, started)
        self._thread = threading.Thread(target=self._finish, args=arguments, name=f"checkpoint {step}")
        self._thread.start()

    def wait(self) -> None:
        """Finish the save under way. A run calls this before it ends, for whatever reason.

        Raises: CheckpointError if the latest save failed.
        """
        self._join()
        if self._error is not None:
            raise self._error

    def restore(self, abstract: PyTree, step: int | None = None) -> tuple[PyTree, dict[str, Any], int] | None:
        """Return the newest good state (or that of `step`), its meta and its step; None if there are no checkpoints.

        Leaves of `abstract` give shape, dtype and sharding, on any mesh; one without a sharding is returned as NumPy.
        If a checkpoint is damaged, that is reported and the one before it is used.

        Raises: CheckpointError if there are checkpoints but none is good; UserError if the state has another structure.
        """
        self._join()
        _attempts[str(self.directory)] += 1
        if _is_main() and self.directory.is_dir():
            self._clean()
        self._barrier("cleaned")
        leaves = named_leaves(abstract)
        found = self._newest_good(step, lambda tree: check_structure(tree, leaves))
        if found is None:
            return None
        found_step, _ = found
        self._stale = {other for other in self.steps() if other > found_step}
        loaded = load(self._folder(found_step) / "state", leaves)
        state = jax.tree.unflatten(jax.tree.structure(abstract), [loaded[name] for name in leaves])
        return state, read_meta(self._folder(found_step)), found_step

    def restore_params(
        self,
        step: int | Literal["best"] | None = None,
        *,
        subtree: str = "params",
        abstract: PyTree = None,
        partial: str | None = None,
    ) -> tuple[PyTree, dict[str, Any], int]:
        """Read one part of the state (`params`, `ema`, `stats`), with meta and step, and nothing else.

        Without `abstract`, return nested dicts of NumPy arrays; with it, arrays of that structure and those shardings,
        as in `restore`. With `partial` the checkpoint may hold more; `partial` is the advice if something is missing.

        Raises: UserError if there is no checkpoint, no such step or no such part.
        """
        self._join()
        if step == "best":
            best = self.best()
            if best is None:
                raise UserError(f"got no best checkpoint in {self.directory}, expected one, try the newest")
            step = int(best["step"])
        wanted = None if abstract is None else named_leaves({subtree: abstract})

        def check(tree: Mapping[str, str]) -> None:
            part = select(tree, subtree)
            if not part:
                parts = ", ".join(dict.fromkeys(name.split("/")[0] for name in tree))
                raise UserError(f"got no {subtree!r} in the checkpoints of {self.directory}, expected one of {parts}")
            if wanted is not None:
                check_structure(
                    part if partial is None else {name: part[name] for name in wanted if name in part}, wanted, partial
                )

        while True:
            before = self.steps()
            try:
                found = self._newest_good(step, check)
                if found is None:
                    raise UserError(f"got no checkpoint in {self.directory}, expected at least one, try training first")
                found_step, tree = found
                specs = select(tree, subtree)
                leaves = {name: parse_spec(spec) for name, spec in specs.items()} if wanted is None else wanted
                loaded = load(self._folder(found_step) / "state", leaves)
                meta = read_meta(self._folder(found_step))
                break
            except Exception:
                if step is not None or set(before) <= set(self.steps()):
                    raise
                # the run is in progress, and has removed the checkpoint being read for a newer one
        if wanted is None:
            params = nest(loaded)[subtree]
        else:
            params = jax.tree.unflatten(jax.tree.structure(abstract), [loaded[name] for name in wanted])
        return params, meta, found_step

    # ---- writing

    def _finish(
        self, step: int, futures: list[Any], failure: Exception | None, manifest: dict, size: int, started: float
    ) -> None:
        """Run in the background. No collectives here, only barriers of the coordination service."""
        folder = self._folder(step, ".saving")
        stages: list[Callable[[], None]] = [
            lambda: await_all(futures),
            lambda: merge(folder / "state"),
            lambda: seal(folder),
            lambda: self._publish(step, manifest),
            lambda: self._tidy(step),
        ]
        for number, stage in enumerate(stages):
            try:
                if failure is None:
                    stage()
            except Exception as error:
                failure = error
            try:
                self._barrier(f"stage {number}")  # a process that failed also comes here, so that none waits in vain
            except Exception as error:
                failure = failure or error
                break
        if failure is None and not self._folder(step).is_dir():
            failure = CheckpointError("another process failed")
        if failure is not None:
            self._report(step, failure, size)
        elif _is_main():
            logger.debug("checkpoint %d saved, %s in %.2f s", step, megabytes(size), time.perf_counter() - started)

    def _publish(self, step: int, manifest: dict) -> None:
        if not _is_main():
            return
        folder, final, replaced = self._folder(step, ".saving"), self._folder(step), self._folder(step, ".replaced")
        parts = sorted(folder.glob("*.part"))
        if len(parts) != jax.process_count():
            raise CheckpointError(f"{jax.process_count() - len(parts)} other processes failed")
        files: dict[str, Any] = {}
        for part in parts:
            files |= json.loads(part.read_text())
            part.unlink()
        write_text(folder / "manifest.json", render({**manifest, "files": dict(sorted(files.items()))}))
        for path in [*folder.rglob("*"), folder]:
            if path.is_dir():
                flush(path)
        if final.exists():
            final.rename(replaced)
        folder.rename(final)
        flush(self.directory)
        remove(replaced)

    def _report(self, step: int, failure: Exception, size: int) -> None:
        cause = re.search(r"([^:]+) \[os_error_code", str(failure))  # TensorStore's message is a page of paths
        reason = cause[1].strip() if cause else " ".join(str(failure).split())[:300] or type(failure).__name__
        if _is_main():
            remove(self._folder(step, ".saving"))
        last_good = max(self.steps(), default=None)
        try:
            free = megabytes(shutil.disk_usage(self.directory).free)
        except OSError:
            free = "unknown"
        message = (
            f"checkpoint of step {step} NOT saved: {reason}; {free} free in {self.directory}, "
            f"{megabytes(size)} needed; last good checkpoint: {last_good}; the next save tries again; "
            "try freeing space there, a smaller --checkpoint.keep, or permission to write"
        )
        error = CheckpointError(message)
        error.__cause__ = failure
        logger.error("%s", error)
        progress.unsaved(step, message)
        self._error = error

    def _tidy(self, saved: int) -> None:
        """Write best.json and remove what is no longer kept. A failure here does not fail the save."""
        self._stale.discard(saved)
        if not _is_main():
            return
        best, record = self.best(), self.directory / "best.json"
        good = [step for step in self.steps() if step not in self._stale]
        kept = {saved, *good[::-1][: self.keep]} | ({best["step"]} if best else set())
        try:
            if best and not (record.exists() and record.read_text() == json.dumps(best)):
                write_text(record.with_suffix(".tmp"), json.dumps(best))
                record.with_suffix(".tmp").rename(record)
            for step in set(self.steps()) - kept:
                # Renamed first: a kill during the removal must not leave half of a numbered folder.
                remove(self._folder(step).rename(self._folder(step, ".retired")))
        except OSError as error:
            logger.error("checkpoint %d is saved, but tidying up after it failed: %s", saved, error)

    def _clean(self) -> None:
        """Remove what killed runs left behind."""
        for path in self.directory.glob("[0-9]*.*"):
            if path.suffix == ".replaced" and path.is_dir() and not path.with_suffix("").exists():
                path.rename(path.with_suffix(""))
            elif path.suffix in (".saving", ".replaced", ".retired"):
                remove(path)

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _barrier(self, name: str) -> None:
        if jax.process_count() > 1:
            key = f"{self.directory} {_attempts[str(self.directory)]} {name}"
            orbax().multihost.get_barrier_sync_fn()(key=key, timeout_ms=_BARRIER_TIMEOUT * 1000)

    def _folder(self, step: int, suffix: str = "") -> Path:
        return self.directory / f"{step}{suffix}"

    # ---- reading

    def _newest_good(
        self, step: int | None, check: Callable[[Mapping[str, str]], None]
    ) -> tuple[int, dict[str, str]] | None:
        """Return step and tree of the newest checkpoint whose files are all as they were written."""
        steps = self.steps()
        if step is not None and step not in steps:
            raise UserError(f"got step {step}, expected one of {steps} in {self.directory}, try one of those")
        if not steps:
            return None
        problems = []
        for candidate in [step] if step is not None else reversed(steps):
            tree, problem = {}, ""
            try:
                tree = verify(self._folder(candidate), check)
            except (Damaged, OSError) as error:
                problem = str(error)
            if _all_processes(not problem):
                if problems:
                    logger.error("CHECKPOINT DAMAGED: %s. Using step %d instead", "; ".join(problems), candidate)
                return candidate, tree
            if jax.process_count() == 1 and not self._folder(candidate).is_dir():
                continue  # removed by the run in progress
            problems.append(f"step {candidate}: {problem or 'found damaged by another process'}")
        raise CheckpointError(
            f"got no readable checkpoint in {self.directory} ({'; '.join(problems)}), expected at least one, "
            "try a copy of the folder, or another run directory to start anew"
        )


# ---- processes


def _is_main() -> bool:
    return jax.process_index() == 0


def _all_processes(ok: bool) -> bool:
    if jax.process_count() == 1:
        return ok
    from jax.experimental import multihost_utils

    return bool(np.all(multihost_utils.process_allgather(np.array(ok))))
