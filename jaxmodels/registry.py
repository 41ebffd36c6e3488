"""What can be chosen by name: built in, registered by other packages, or given as `package.module:Name`."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from jaxmodels.errors import UserError, nearest

T = TypeVar("T")

OUTSIDE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
"""The pattern of package.module:Name, for things without a short name."""

NOT_IMPORTABLE = (
    "which other processes cannot import, expected it in a module of an installed package, or of a directory on "
    "PYTHONPATH, try moving it there"
)
Check = Callable[[Any], str]
"""Says what is wrong with something from outside, as the end of "got task my.tasks:Mine, …"; empty if nothing is."""


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold back a Ctrl-C until a module is imported: extensions print one as a traceback and raise an ImportError."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Registry:
    """Classes or functions of one kind by name; each is imported when it is needed.

    Names are looked up among the built-in ones, those registered in this process with the decorator `register`, the
    entry points of installed packages (in the group `group`), or as `package.module:Name`. Modules are found as Python
    finds them, so a run that names one can be read in any process that can import it.
    """

    def __init__(self, what: str, group: str, builtin: Mapping[str, str], check: Check = lambda found: "") -> None:
        """`what` is the noun for one of them in messages; `builtin` maps short names to `module:Name`.

        Things from outside are checked by `check` as soon as they are named, rather than in the middle of work.
        """
        self.what, self.group, self.builtin, self.check = what, group, dict(builtin), check
        self._registered: dict[str, Any] = {}

    def names(self) -> list[str]:
        """Return all short names that can be chosen here."""
        return list(dict.fromkeys([*self.builtin, *self._registered, *self._entry_points()]))

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that gives something a short name, in processes that import its module.

        Raises:
            UserError: the name is taken, or what gets it fails the check.
        """

        def keep(found: T) -> T:
            same = self._registered.get(name)
            if name in self.builtin or (same is not None and named(same) != named(found)):
                raise UserError(f"got a second {self.what} {name!r}, expected a name that is free, try another one")
            self._registered[name] = self._checked(name, found)
            return found

        return keep

    def find(self, name: str) -> Any:
        """Return what the name stands for, importing it if need be.

        Raises:
            UserError: there is no such name, its module cannot be imported, or it fails the check.
        """
        if name in self._registered:
            return self._checked(name, self._registered[name])
        if name in self.builtin:
            with _uninterrupted():
                return self._load(self.builtin[name])
        if (entry := self._entry_points().get(name)) is not None:
            return self._checked(name, self._load(entry.value))
        if OUTSIDE.fullmatch(name):
            return self._checked(name, self._load(name))
        known = self.names()
        raise UserError(f"got {self.what} {name!r}, expected {self.expected()}{nearest(name, known)}")

    def expected(self, also: Sequence[str] = ()) -> str:
        """Say what can be chosen, with the names in `also`, as in "expected one of …"."""
        known = [*also, *self.names()]
        return f"one of {', '.join(known)}, or package.module:Name" if known else "package.module:Name"

    def name_of(self, found: Any) -> str:
        """Return the name by which `find` finds this in any process: a short one, or `package.module:Name`.

        Raises:
            UserError: it is defined where another process cannot import it, or it fails the check.
        """
        address = named(found)
        for name, value in self.builtin.items():
            if value == address:
                return name
        self._checked(address, found)
        for name, entry in self._entry_points().items():
            if entry.value == address:
                return name
        module = found.__module__
        if getattr(sys.modules.get(module), found.__qualname__, None) is not found or not _importable(module):
            raise UserError(f"got {self.what} {found.__qualname__} of {module}, {NOT_IMPORTABLE}")
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
        except Exception as error:  # a user's module may raise anything
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
                    f"{nearest(part, public) or f', try one that {module} defines'}"
                )
            found = getattr(found, part)
        return found


def subclass_of(base: type, what: str = "") -> Check:
    """Check that a class derives from `base` and implements its abstract methods.

    With `what`, the classes are kinds of a section, each a frozen dataclass, and `base` is their common base.
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
    """Say which required methods a class lacks; empty if it has all of them."""
    lacking = sorted(getattr(kind, "__abstractmethods__", ()))
    if not lacking:
        return ""
    forms = [f"def {name}{_parameters(getattr(kind, name))}" for name in lacking]
    return f"which has no method {' and none '.join(lacking)}, expected one, try {' and '.join(forms)}"


def _unlike(kind: type, base: type) -> str:
    """Say which method of a class cannot be called like that of its base; empty if all can."""
    for name, declared in inspect.getmembers(base, inspect.isfunction):
        own = getattr(kind, name)
        if not name.startswith("_") and own is not declared and not _can_be_called(own, _named(declared)):
            return f"whose {name} takes {_parameters(own)}, expected {name}{_parameters(declared)}"
    return ""


def instance_of(kind: type, form: str) -> Check:
    """Check that something is an object of a class; `form` shows how to create one."""

    def check(found: Any) -> str:
        shown_name = f"{kind.__module__}.{kind.__qualname__}"
        return "" if isinstance(found, kind) else f"which is {_sort(found)}, expected a {shown_name}, try {form}"

    return check


def function(found: Any) -> str:
    """Check that something is a function, with any arguments."""
    return "" if callable(found) else f"which is {_sort(found)}, expected a function"


def function_of(*arguments: str) -> Check:
    """Check that something is a function that can be called with these arguments."""

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
    except ValueError:  # a function written in another language, without a signature
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
    """Return the result of a Python file's function: a config's `get_config()`, a place's `get_place()`.

    Args:
        path: the file; it can import its neighbors.
        what: the noun for it in messages, such as config.
        function: the name of the function, which takes no arguments.
        gives: the noun for what it returns, such as a Config.
        module_name: the module's name in sys.modules, so that the source of its classes is found; empty: none.

    Raises:
        UserError: there is no such file, no such function in it, or an error inside it.
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
    except (Exception, SystemExit) as error:  # a user's file may raise anything
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f" in line {lines[-1]}" if lines else ""
        raise UserError(
            f"got {what} {str(path)!r} that fails with {type(error).__name__}{where}: {error}, "
            f"expected a Python file whose {function}() gives {gives}"
        ) from error
    finally:
        sys.path.pop(0)


def outside(found: Any) -> bool:
    """Whether a section's class was written outside of this package."""
    return not type(found).__module__.startswith("jaxmodels.")


def named(found: Any) -> str:
    """Return the address of a class or function, as package.module:Name."""
    return f"{found.__module__}:{found.__qualname__}"


def _importable(module: str) -> bool:
    """Whether a fresh process with this one's path finds the module's package."""
    top = module.partition(".")[0]
    finders = [finder for finder in sys.meta_path if hasattr(finder, "find_spec")]
    return any(finder.find_spec(top, None) is not None for finder in finders)
