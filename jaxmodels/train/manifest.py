"""The files of a checkpoint: hashed when written, verified when read, flushed to the disk."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

PyTree = Any


class Damaged(Exception):
    """A checkpoint is damaged; the message says how."""


def seal(folder: Path) -> None:
    """Hash and flush this process's share of the files, and write the hashes as its part of the manifest."""
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.suffix != ".part")
    share = names[jax.process_index() :: jax.process_count()]
    for name in share:
        flush(folder / name)
    write_text(
        folder / f"{jax.process_index()}.part", json.dumps(dict(zip(share, _digests(folder, share), strict=True)))
    )


def _digests(folder: Path, names: Iterable[str]) -> list[dict[str, Any]]:
    def digest(name: str) -> dict[str, Any]:
        with open(folder / name, "rb") as file:
            return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "size": file.tell()}

    with ThreadPoolExecutor() as pool:
        return list(pool.map(digest, names))


def verify(folder: Path, check: Callable[[Mapping[str, str]], None]) -> dict[str, str]:
    """Check that a checkpoint's files are as they were written (this process's share of them), and return its tree."""
    manifest = read_manifest(folder)
    check(manifest["tree"])
    files = manifest["files"]
    for path in (folder / "state").rglob("*"):
        # dot files are left by file systems and file managers
        if path.is_file() and not path.name.startswith(".") and str(path.relative_to(folder)) not in files:
            raise Damaged(f"file {path} is not one that was written")
    share = sorted(files)[jax.process_index() :: jax.process_count()]
    for name in share:
        if not (folder / name).is_file():
            raise Damaged(f"file {folder / name} is missing")
    for name, found in zip(share, _digests(folder, share), strict=True):
        if found["size"] != files[name]["size"]:
            raise Damaged(f"file {folder / name} has {found['size']} bytes, not {files[name]['size']}")
        if found["sha256"] != files[name]["sha256"]:
            raise Damaged(f"file {folder / name} has changed since it was written (its sha256 differs)")
    return manifest["tree"]


def render(manifest: Mapping[str, Any]) -> str:
    """Serialize the manifest with a hash of itself."""
    body = json.dumps(manifest, indent=1)
    return json.dumps({**manifest, "sha256": hashlib.sha256(body.encode()).hexdigest()}, indent=1)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a checkpoint, checking that it has everything that reading needs.

    Raises:
        Damaged: it has changed since it was written, or this program did not write it.
    """
    path = folder / "manifest.json"
    manifest, text = _read_object(path)
    if render({k: v for k, v in manifest.items() if k != "sha256"}) != text:
        raise Damaged(f"file {path} has changed since it was written")
    tree, files = manifest.get("tree"), manifest.get("files")
    good = (
        isinstance(manifest.get("best"), bool)
        and isinstance(tree, dict)
        and all(isinstance(spec, str) for spec in tree.values())
        and isinstance(files, dict)
        and {"meta.json", "state/manifest.ocdbt"} <= files.keys()
        and all(isinstance(entry, dict) and {"sha256", "size"} <= entry.keys() for entry in files.values())
        and all(Path(name).parts[:1] in (("meta.json",), ("state",)) and ".." not in Path(name).parts for name in files)
    )
    if not good:
        raise Damaged(f"file {path} is not the manifest of a checkpoint")
    return manifest


def read_meta(folder: Path) -> dict[str, Any]:
    """Read what the caller of `save` passed.

    Raises:
        Damaged: it cannot be read.
    """
    return _read_object(folder / "meta.json")[0]


def _read_object(path: Path) -> tuple[dict[str, Any], str]:
    try:
        text = path.read_text()
        value = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise Damaged(f"file {path} cannot be read ({str(error)[:200]})") from error
    if not isinstance(value, dict):
        raise Damaged(f"file {path} has changed since it was written")
    return value, text


def write_text(path: Path, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary file that replaces `path` atomically; on an error `path` stays as it was."""
    part = path.with_name(path.name + ".part")
    try:
        yield part
        flush(part)
        part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def flush(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a folder or file; if that fails, rename it, so that the name is free."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
    if os.path.lexists(path) and path.name.count(".") == 1:
        with contextlib.suppress(OSError):
            path.rename(path.with_name(f"{path.stem}.{time.time_ns()}.retired"))


def megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f} MB"
