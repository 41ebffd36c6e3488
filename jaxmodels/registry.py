"""What can be chosen by name: this package's own, what other packages register, and any `package.module:Name`."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from jaxmodels.errors import UserError, nearest

T = TypeVar("T")

OUTSIDE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
"""How something that has no short name is written: package.module:Name."""

Check = Callable[[Any], str]
"""What is wrong with something from outside, as the end of "got task my.tasks:Mine, …"; nothing, if it will do."""


class Registry:
    """Classes or functions of one sort by their names; each is imported when it is asked for.

    A name is found among this package's own, what the decorator `register` has been given in this process, the entry
    points of installed packages (of the group `group`), or by `package.module:Name`. Modules are found as Python
    finds them, so a run that names one can be read in any process that can import it.
    """

    def __init__(self, what: str, group: str, builtin: Mapping[str, str], check: Check = lambda found: "") -> None:
        """`what` is how messages call one of them; `builtin` maps short names to `module:Name`.

        What comes from outside is held to `check` as soon as it is named, and not in the middle of work.
        """
        self.what, self.group, self.builtin, self.check = what, group, dict(builtin), check
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
            UserError: there is no such name, its module cannot be imported, or what it stands for will not do.
        """
        if name in self._registered:
            return self._checked(name, self._registered[name])
        if name in self.builtin:
            return self._load(self.builtin[name])
        if (entry := self._entry_points().get(name)) is not None:
            return self._checked(name, self._load(entry.value))
        if OUTSIDE.fullmatch(name):
            return self._checked(name, self._load(name))
        known = self.names()
        raise UserError(
            f"got {self.what} {name!r}, expected one of {', '.join(known)}, or package.module:Name"
            f"{nearest(name, known)}"
        )

    def name_of(self, found: Any) -> str:
        """The name by which `find` gives this again in any process: a short one, or `package.module:Name`.

        Raises:
            UserError: it lies where another process cannot import it, or it will not do.
        """
        address = _address(found)
        for name, value in self.builtin.items():
            if value == address:
                return name
        self._checked(address, found)
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

    def _checked(self, name: str, found: Any) -> Any:
        if wrong := self.check(found):
            raise UserError(f"got {self.what} {name}, {wrong}")
        return found

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


def subclass_of(base: type, what: str = "") -> Check:
    """The check of classes that derive from `base` and have what its abstract methods ask for.

    With `what`, they are the kinds of a section and `base` is what they have in common: a frozen dataclass each.
    """

    def check(found: Any) -> str:
        section = bool(what)
        if not (isinstance(found, type) and issubclass(found, base)):
            return (
                f"which is {_sort(found)}, expected a {'frozen dataclass' if section else 'class'} that derives from "
                f"{base.__name__}, try class Mine({base.__name__})"
            )
        if section and found is base:
            return f"which every {what} has in common, expected a class that derives from it"
        own = [name for name, kind in inspect.get_annotations(found).items() if "ClassVar" not in str(kind)]
        if section and own and "__dataclass_fields__" not in vars(found):
            return f"whose {own[0]} is no field, expected a dataclass, try @dataclass(frozen=True) above class " + (
                found.__name__
            )
        return incomplete(found) or _unlike(found, base)

    return check


def incomplete(kind: type) -> str:
    """Which methods a class lacks that its bases ask for; nothing, if it has all of them."""
    lacking = sorted(getattr(kind, "__abstractmethods__", ()))
    if not lacking:
        return ""
    forms = [f"def {name}{_parameters(getattr(kind, name))}" for name in lacking]
    return f"which has no method {' and none '.join(lacking)}, expected one, try {' and '.join(forms)}"


def _unlike(kind: type, base: type) -> str:
    """Which method of a class cannot be called as that of its base is; nothing, if all can."""
    for name, asked in inspect.getmembers(base, inspect.isfunction):
        own = getattr(kind, name)
        if not name.startswith("_") and own is not asked and not _can_be_called(own, _named(asked)):
            return f"whose {name} takes {_parameters(own)}, expected {name}{_parameters(asked)}"
    return ""


def instance_of(kind: type, form: str) -> Check:
    """The check of objects of a class, which are made as `form` shows."""

    def check(found: Any) -> str:
        said = f"{kind.__module__}.{kind.__qualname__}"
        return "" if isinstance(found, kind) else f"which is {_sort(found)}, expected a {said}, try {form}"

    return check


def function(found: Any) -> str:
    """The check of functions of any arguments."""
    return "" if callable(found) else f"which is {_sort(found)}, expected a function"


def function_of(*arguments: str) -> Check:
    """The check of functions that are called with so many arguments."""

    def check(found: Any) -> str:
        form = f"function({', '.join(arguments)})"
        if wrong := function(found):
            return f"{wrong}({', '.join(arguments)})"
        return "" if _can_be_called(found, arguments) else f"which takes {_parameters(found)}, expected a {form}"

    return check


def _can_be_called(function: Callable[..., Any], arguments: Sequence[str]) -> bool:
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError:
        return False
    except ValueError:  # one of another language, which does not say
        return True
    return True


def _named(function: Callable[..., Any]) -> list[str]:
    return [each.name for each in inspect.signature(function).parameters.values() if each.kind is not each.KEYWORD_ONLY]


def _parameters(function: Callable[..., Any]) -> str:
    return f"({', '.join(str(each).split(':')[0] for each in inspect.signature(function).parameters.values())})"


def _sort(found: Any) -> str:
    sort = "class" if isinstance(found, type) else type(found).__name__
    return f"a{'n' if sort[0].lower() in 'aeiou' else ''} {sort}"


def given_by(path: str | Path, what: str, function: str, gives: str, module_name: str = "") -> Any:
    """What a Python file's function returns: a config's `get_config()`, a place's `get_place()`.

    Args:
        path: the file; it can import its neighbors.
        what: how messages call what it is: config.
        function: the name of the function, which takes nothing.
        gives: how messages call what it returns: a Config.
        module_name: by which Python keeps the module, so that the source of its classes is found; empty: not at all.

    Raises:
        UserError: no such file, no such function in it, or an error inside it.
    """
    path = Path(path)
    if not path.is_file():
        near = [str(p) for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise UserError(f"got {what} {str(path)!r}, expected a Python file with {function}(){nearest(str(path), near)}")
    spec = importlib.util.spec_from_file_location(module_name or path.stem, path)
    if spec is None or spec.loader is None:
        raise UserError(f"got {what} {str(path)!r}, expected a Python file with {function}()")
    module = importlib.util.module_from_spec(spec)
    if module_name:
        sys.modules[module_name] = module
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
        if not callable(getattr(module, function, None)):
            raise UserError(
                f"got {what} {str(path)!r} without {function}(), expected {function}() -> {gives.rpartition(' ')[2]}"
            )
        return getattr(module, function)()
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # whatever a file of the user's does
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f" in line {lines[-1]}" if lines else ""
        raise UserError(
            f"got {what} {str(path)!r} that fails with {type(error).__name__}{where}: {error}, "
            f"expected a Python file whose {function}() gives {gives}"
        ) from error
    finally:
        sys.path.pop(0)


def _address(found: Any) -> str:
    return f"{found.__module__}:{found.__qualname__}"


def _importable(module: str) -> bool:
    """Whether a fresh process with this one's path finds the module's package."""
    top = module.partition(".")[0]
    finders = [finder for finder in sys.meta_path if hasattr(finder, "find_spec")]
    return any(finder.find_spec(top, None) is not None for finder in finders)
