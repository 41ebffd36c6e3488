"""Cache of compiled steps: a folder each with `facts.json` and `program.hlo.gz`, published atomically."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import shutil
import zlib
from importlib import metadata
from pathlib import Path
from typing import Any

import jaxmodels
from jaxmodels.errors import UserError

COMPILING = ("compile.py", "topology.py")
"""Files of plan/ that decide what is compiled; the others read it."""


def versions() -> dict[str, str]:
    """Versions of the packages that determine a compiled step."""
    from jaxmodels.train.run import versions as own

    found = own()
    for name in ("libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "nvidia-cudnn-cu12"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def source() -> str:
    """A hash of the package's code, so that a change of code misses the cache."""
    found = hashlib.sha256()
    root = Path(jaxmodels.__file__).parent
    for path in sorted(root.rglob("*.py")):
        if "report" not in path.parts and not (path.parent.name == "plan" and path.name not in COMPILING):
            found.update(path.read_bytes())
    return found.hexdigest()[:16]


def leave(folder: Path, facts: dict[str, Any], text: str) -> None:
    """Write a result with a digest, by which `intact` detects damage."""
    packed, facts = gzip.compress(text.encode(), 3), json.loads(json.dumps(facts))  # in the form that is read back
    (folder / "program.hlo.gz").write_bytes(packed)
    (folder / "facts.json").write_text(json.dumps({**facts, "digest": _digest(facts, packed)}))


def intact(folder: Path) -> dict[str, Any] | None:
    """The facts of a result with the program's text; None if there is no result or it is damaged."""
    try:
        facts = json.loads((folder / "facts.json").read_bytes())
        digest = facts.pop("digest")
        packed = (folder / "program.hlo.gz").read_bytes()
        if digest != _digest(facts, packed):
            return None
        return {**facts, "text": gzip.decompress(packed).decode()}
    except (OSError, ValueError, EOFError, KeyError, TypeError, AttributeError, zlib.error):
        return None


def _digest(facts: dict[str, Any], program: bytes) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode() + program).hexdigest()


def publish(folder: Path, place: Path) -> None:
    """Move a result to its place in the cache, unless another process has published it in the meantime."""
    for _ in range(2):
        try:
            folder.rename(place)
            return
        except OSError:
            if not place.exists():
                raise
            if intact(place):
                return
        aside = folder.with_suffix(".old")  # damaged
        with contextlib.suppress(OSError):
            place.rename(aside)
        if aside.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.unlink(missing_ok=True)


def unwritable(base: Path, error: OSError) -> UserError:
    """The error for a cache that cannot be written."""
    return UserError(
        f"got the cache of plans {base}, expected a folder that can be written ({error.strerror or error}), "
        "try XDG_CACHE_HOME=FOLDER in front of the command"
    )
