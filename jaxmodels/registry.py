"""What can be chosen by name: this package's own, what other packages register, and any `package.module:Name`."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any, TypeVar

from jaxmodels.errors import UserError, nearest

T = TypeVar("T")

OUTSIDE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
"""How something that has no short name is written: package.module:Name."""


class Registry:
    """Classes or functions of one sort by their names; each is imported when it is asked for.

    A name is found among this package's own, what the decorator `register` has been given in this process, the entry
    points of installed packages (of the group `group`), or by `package.module:Name`. Modules are found as Python
    finds them, so a run that names one can be read in any process that can import it.
    """

    def __init__(self, what: str, group: str, builtin: Mapping[str, str]) -> None:
        """`what` is how messages call one of them; `builtin` maps short names to `module:Name`."""
        self.what, self.group, self.builtin = what, group, dict(builtin)
        self._registered: dict[str, Any] = {}

    def names(self) -> list[str]:
        """All short names that can be chosen here."""
        return list(dict.fromkeys([*self.builtin, *self._registered, *self._entry_points()]))

    def register(self, name: str) -> Callable[[T], T]:
        """A decorator that gives something a short name, for the processes that import its module.

        Raises:
            UserError: the name is taken.
        """

        def keep(found: T) -> T:
            same = self._registered.get(name)
            if name in self.builtin or (same is not None and _address(same) != _address(found)):
                raise UserError(f"got a second {self.what} {name!r}, expected a name that is free, try another one")
            self._registered[name] = found
            return found

        return keep

    def find(self, name: str) -> Any:
        """What the name stands for, imported if need be.

        Raises:
            UserError: there is no such name, or its module cannot be imported.
        """
        if name in self._registered:
            return self._registered[name]
        if name in self.builtin:
            return self._load(self.builtin[name])
        if (entry := self._entry_points().get(name)) is not None:
            return self._load(entry.value)
        if OUTSIDE.fullmatch(name):
            return self._load(name)
        known = self.names()
        raise UserError(
            f"got {self.what} {name!r}, expected one of {', '.join(known)}, or package.module:Name"
            f"{nearest(name, known)}"
        )

    def name_of(self, found: Any) -> str:
        """The name by which `find` gives this again in any process: a short one, or `package.module:Name`.

        Raises:
            UserError: it lies where another process cannot import it.
        """
        address = _address(found)
        for name, value in self.builtin.items():
            if value == address:
                return name
        for name, entry in self._entry_points().items():
            if entry.value == address:
                return name
        module = found.__module__
        if getattr(sys.modules.get(module), found.__qualname__, None) is not found or not _importable(module):
            raise UserError(
                f"got {self.what} {found.__qualname__} of {module}, which other processes cannot import, expected it "
                "in a module of an installed package, or of a directory on PYTHONPATH, try moving it there"
            )
        return address

    def _entry_points(self) -> dict[str, metadata.EntryPoint]:
        return {entry.name: entry for entry in metadata.entry_points(group=self.group)}

    def _load(self, address: str) -> Any:
        module, _, name = address.partition(":")
        try:
            loaded = importlib.import_module(module)
        except ModuleNotFoundError as error:
            missing = error.name or module
            own = module == missing or module.startswith(missing + ".")
            raise UserError(
                f"got {self.what} {address}, whose module {module} "
                + ("is not there" if own else f"needs {missing}, which is not there")
                + ", expected one that Python can import, try installing its package, or PYTHONPATH with its directory"
            ) from error
        except UserError:
            raise
        except Exception as error:  # whatever a module of the user's does
            raise UserError(
                f"got {self.what} {address}, whose module fails with {type(error).__name__}: {error}, "
                "expected one that Python can import"
            ) from error
        found: Any = loaded
        for part in name.split("."):
            if not hasattr(found, part):
                public = [each for each in vars(loaded) if not each.startswith("_")]
                raise UserError(
                    f"got {self.what} {address}, expected a name of {module}"
                    f"{nearest(part, public) or f', try one that stands in {module}'}"
                )
            found = getattr(found, part)
        return found


def _address(found: Any) -> str:
    return f"{found.__module__}:{found.__qualname__}"


def _importable(module: str) -> bool:
    """Whether a fresh process with this one's path finds the module's package."""
    top = module.partition(".")[0]
    finders = [finder for finder in sys.meta_path if hasattr(finder, "find_spec")]
    return any(finder.find_spec(top, None) is not None for finder in finders)
