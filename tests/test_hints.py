"""Classes of sections from outside: a field that could not be checked, saved or set is refused where its class is."""

from __future__ import annotations

import importlib
import itertools
import json

import pytest

from jaxmodels import config as configs
from jaxmodels.config import Config, Mesh
from jaxmodels.errors import UserError
from jaxmodels.models.mlp import MLPConfig
from jaxmodels.tasks import TASKS

MODULE = '''
from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from jaxmodels.fields import Range, Section
from jaxmodels.tasks.task import TASKS, TaskConfig
from jaxmodels.train.schedules import Cosine, ScheduleConfig

if TYPE_CHECKING:
    from fractions import Fraction


@dataclass(frozen=True)
class Plain:
    size: int = 1


@dataclass(frozen=True)
class Inner(Section):
    size: int = 1
    """How large it is."""


@dataclass(frozen=True)
class Bad(Section):
    sizes: list[int] = ()


class Color(enum.Enum):
    RED = 1


{above}
@dataclass(frozen=True)
class Mine(TaskConfig):
    {field}
    """What it is."""

    def build(self, model, data): ...

    def examples(self, opening): ...
'''


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Writes a module with a task that has this field, and returns the module's name."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(field, above=""):
        name = f"own_{next(_names)}"
        (tmp_path / f"{name}.py").write_text(MODULE.replace("{field}", field).replace("{above}", above))
        return name

    return write


_names = itertools.count()
_SUPPORTED = "expected bool, int, float, str, a Literal, a tuple or union of these, or a section, try"


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("x: list[int] = field(default_factory=list)", f"whose field x is list[int], {_SUPPORTED} tuple[int, ...]"),
        ("x: list = field(default_factory=list)", f"whose field x is list, {_SUPPORTED} tuple[int, ...]"),
        ("x: set[str] = frozenset()", f"whose field x is set[str], {_SUPPORTED} tuple[str, ...]"),
        ("x: Sequence[float] = ()", f"whose field x is Sequence[float], {_SUPPORTED} tuple[float, ...]"),
        ("x: tuple = ()", f"whose field x is tuple, {_SUPPORTED} tuple[int, ...]"),
        ("x: dict[str, int] | None = None", f"{_SUPPORTED} a section with a field for each key"),
        ("x: Path = Path('a')", f"whose field x is Path, {_SUPPORTED} str"),
        ("x: bytes = b''", f"{_SUPPORTED} a str that stands for it"),
        ("x: Any = None", f"whose field x is Any, {_SUPPORTED} a str that stands for it"),
        ("x: Callable[[int], int] = abs", f"{_SUPPORTED} a str that stands for it"),
        ("x: Color = Color.RED", f"whose field x is Color, {_SUPPORTED} Literal['RED']"),
        ("x: Literal[Color.RED] = Color.RED", f"{_SUPPORTED} a Literal of texts or numbers"),
        ("x: Annotated[int | None, Range(1)] = None", f"{_SUPPORTED} Annotated[int, Range(…)] for the number alone"),
        ("x: Plain = Plain()", f"whose field x is Plain, {_SUPPORTED} class Plain(Section)"),
        ("x: tuple[Inner, ...] = ()", f"whose field x is tuple[Inner, ...], {_SUPPORTED} Inner alone"),
        ("x: ScheduleConfig | None = None", f"{_SUPPORTED} ScheduleConfig alone"),
        ("x: Bad = Bad", f"whose field x is a section Bad, whose field sizes is list[int], {_SUPPORTED} tuple"),
        ("x: Fraction = 1", "whose field x is Fraction, where Fraction is not defined when it runs"),
        ("x: int = field(default=1, init=False)", "whose x is no argument"),
        ("x: InitVar[int] = 1", "whose x is an argument that is no field"),
        ("kind: str = 'a'", "whose field kind has the name of a member of TaskConfig, expected a name that is free"),
        ("answers: str = 'class'", "whose field answers has the name of a member of TaskConfig"),
        ("build: int = 1", "whose field build has the name of a member of TaskConfig"),
        ("kinds: int = 1", "whose field kinds has the name of a member of Section"),
    ],
)  # fmt: skip
def test_a_field_that_nothing_supports_is_refused_where_its_class_is_named_registered_or_created(own, field, said):
    name = own(field)
    with pytest.raises(UserError) as error:
        TASKS.find(f"{name}:Mine")
    assert str(error.value).startswith(f"got task {name}:Mine, whose ") and said in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=f"got (task|section) {name}:Mine, "):
        importlib.import_module(name).Mine()
    with pytest.raises(UserError, match="got task own-short, whose "):
        importlib.import_module(own(field, above='@TASKS.register("own-short")'))
    assert "own-short" not in TASKS.names()


@pytest.mark.parametrize(
    "field",
    [
        "x: Inner = field(default_factory=lambda: Inner(size=3))",
        "x: ScheduleConfig = field(default_factory=lambda: Cosine(final_lr_fraction=0.5))",
        "x: tuple[int, ...] = field(default_factory=lambda: (1, 2))",
        "x: tuple[tuple[int, str], ...] = ((1, 'a'),)",
        "x: Literal[1, 'a', None] = None",
        "x: int | str | None = 'a'",
        "x: Annotated[float, Range(0)] | None = 1",
    ],
)
def test_a_field_that_is_supported_is_read_back_and_its_default_is_known_as_one(own, field):
    config = Config(model=MLPConfig(), task=TASKS.find(f"{own(field)}:Mine")())
    assert configs.from_json(json.loads(json.dumps(configs.to_json(config)))) == config
    origin = {"file": "some.py"}
    said = {name: configs.provenance(config, name, origin) for name in configs.flatten(config)}
    assert {how for name, how in said.items() if name == "task.x"} <= {"default"}
    assert all(configs.documentation(config, name) for name in said if name.startswith("task."))


def test_a_field_without_a_default_is_read_back_and_its_absence_is_named(own):
    name = own("x: int")
    config = Config(model=MLPConfig(), task=TASKS.find(f"{name}:Mine")(3))
    written = configs.to_json(config)
    assert configs.from_json(written) == config
    del written["task"]["x"]
    with pytest.raises(UserError, match="got Mine without its field 'x', expected a value of it"):
        configs.from_json(written)
    with pytest.raises(UserError, match=f"got task {name}:Mine without its x, which has no default, expected it in a"):
        configs.replaced(Config(model=MLPConfig()), "task", f"{name}:Mine")


def test_fields_are_checked_although_a_class_forgets_its_base(own):
    name = own("x: int = 1\n\n    def __post_init__(self):\n        assert type(self.x) is int\n")
    kind = TASKS.find(f"{name}:Mine")
    assert kind(x=2).x == 2
    with pytest.raises(UserError, match="got task.x 'two', expected a whole number"):
        kind(x="two")


def test_a_section_without_kinds_is_no_subclass_which_nothing_would_name():
    class Mine(Mesh):
        pass

    with pytest.raises(UserError, match=r"got mesh .*, expected a Mesh"):
        Config(model=MLPConfig(), mesh=Mine())
