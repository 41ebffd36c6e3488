"""Properties over generated inputs: the order of examples, packing, tokenizers, and configs as files and options."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from jaxmodels import config as configs
from jaxmodels.commands.options import configured
from jaxmodels.commands.train import RunOptions
from jaxmodels.config import Config, LoRA, Quantized
from jaxmodels.data import Order, loader, texts
from jaxmodels.data import tokenizer as tokenizers
from jaxmodels.data.source import Source
from jaxmodels.errors import UserError
from jaxmodels.fields import Named, Range
from jaxmodels.models.gpt2 import GPT2Config

SAME = settings(
    max_examples=100,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much, HealthCheck.too_slow],
)


class Counted(Source):
    """A source whose example i of epoch e is the pair (i, e)."""

    def __init__(self, n: int) -> None:
        self.n, self.fingerprint = n, str(n)

    def __len__(self) -> int:
        return self.n

    def batch(self, indices: np.ndarray, epochs: np.ndarray) -> dict[str, np.ndarray]:
        return {"inputs": np.stack([indices, epochs], 1)}

    def describe(self) -> str:
        return f"{self.n} pairs"


@SAME
@given(n=st.integers(1, 300), size=st.integers(1, 64), seed=st.integers(-(2**80), 2**80), epochs=st.integers(1, 3))
def test_each_epoch_is_a_permutation_wherever_batches_begin(n, size, seed, epochs):
    order = Order(n, size, seed)
    steps = -(-epochs * n // size)
    places = np.concatenate([order.indices(k) for k in range(steps)])[: epochs * n]
    assert (np.sort(places.reshape(epochs, n), axis=1) == np.arange(n)).all()


@SAME
@given(
    n=st.integers(1, 300),
    hosts=st.sampled_from([1, 2, 3, 4, 8]),
    each=st.integers(1, 8),
    seed=st.integers(0, 2**64),
    step=st.integers(0, 2**40),
)
def test_any_number_of_hosts_reads_the_same_examples(monkeypatch, n, hosts, each, seed, step):
    size = hosts * each
    whole = loader.Loader(Counted(n), Order(n, size, seed)).local(step)["inputs"]
    parts = []
    for host in range(hosts):
        held = np.arange(host * each, (host + 1) * each)
        monkeypatch.setattr(loader, "rows_held", lambda sharding, shape, held=held: held)
        one: Any = {"inputs": None}  # where its rows lie is said by `rows_held` alone
        parts.append(loader.Loader(Counted(n), Order(n, size, seed), one).local(step)["inputs"])
    np.testing.assert_array_equal(np.concatenate(parts), whole)


IDS = st.lists(st.lists(st.integers(1, 99), max_size=40), min_size=1, max_size=30)
END = 0


@SAME
@given(ids=IDS, length=st.integers(1, 24), follow=st.sampled_from([None, END]))
def test_packing_loses_no_token_and_mixes_no_texts(ids, length, follow):
    rows = texts.packed([np.array(x, np.int32) for x in ids], length, follow)
    expected = ids if follow is None else [[END, *x] for x in ids]
    wanted = sorted(tuple(x[i : i + length]) for x in expected for i in range(0, len(x), length))
    found = []
    for tokens, marks, positions in zip(rows["tokens"], rows["segment_ids"], rows["positions"], strict=True):
        assert (np.diff(marks)[marks[1:] > 0] >= 0).all(), "a text's tokens stand together, and padding at the end"
        for k in range(1, marks.max(initial=0) + 1):
            found.append(tuple(tokens[marks == k].tolist()))
            np.testing.assert_array_equal(positions[marks == k], np.arange((marks == k).sum()))
    assert sorted(found) == wanted
    assert (rows["targets"][rows["segment_ids"] == 0] == -1).all(), "padding is never predicted"


@SAME
@given(lengths=st.lists(st.integers(0, 20), max_size=60), spare=st.integers(0, 20))
def test_a_packing_plan_holds_each_text_once_and_at_most_twice_the_rows_that_must_be(lengths, spare):
    room = max([1, *lengths]) + spare
    plan = texts.plan(np.array(lengths, int), room)
    assert sorted(i for row in plan for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= room for row in plan)
    assert len(plan) <= 2 * -(-sum(lengths) // room) + 1


TEXT = st.text(st.characters(codec="utf-8"), max_size=60)


@pytest.fixture(scope="module")
def bpe():
    return tokenizers.build(
        "bpe:400", lambda: ["def café(x):\n    return '日本' + x\n" * 20, "for i in range(10): print(i)"]
    )


@SAME
@given(text=TEXT)
def test_tokenizers_give_every_text_back(bpe, text):
    for tokenizer in (tokenizers.Bytes(), tokenizers.Chars(text + "x"), bpe):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text, str(tokenizer)
        assert ids.dtype == np.int32 and (ids >= 0).all() and (ids < tokenizer.vocab_size).all()
        sizes = tokenizer.sizes()
        assert sizes is not None and sizes[ids].sum() == len(text.encode()), "bits per byte count these"


def values(kind: Any) -> st.SearchStrategy:
    """Values that a field of this type may hold."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated and (named := [note for note in args[1:] if isinstance(note, Named)]):
        return st.sampled_from([*named[0].also, *named[0].registry.builtin] or ["tests.sections:inverted"])
    if origin is Annotated:
        (allowed,) = [note for note in args[1:] if isinstance(note, Range)]
        return values(args[0]).filter(lambda value: not allowed.refusal(value)[0])
    if origin is Literal:
        return st.sampled_from(args)
    if origin is tuple:
        return st.lists(values(args[0]), max_size=3).map(tuple)
    if origin is Union or type(None) in args:
        return st.one_of([values(arg) for arg in args])
    if kind is type(None):
        return st.none()
    known = {
        bool: st.booleans(),
        int: st.integers(-1, 50),
        float: st.sampled_from([0.0, 0.5, 1.0, 2.5, 0.1, 1e-3]),
        # what is written as an option may not begin like one
        str: st.text(
            st.characters(codec="utf-8", exclude_characters="\0", exclude_categories=["C"]), max_size=8
        ).filter(lambda text: not text.startswith("-") and text != "None"),
    }
    return known[kind]


BASE = Config(model=GPT2Config(layers=1, width=8, heads=2))


@st.composite
def changed(draw: Any, section: Any) -> Any:
    """A section, perhaps of another kind, with any values that its fields may hold and that fit together."""
    if (kinds := configs.kinds_of(section)) is not None and section is not BASE.model:
        section = configs.of_kind(section, draw(st.sampled_from(sorted(kinds.builtin))))
    hints, values_by_name = get_type_hints(type(section), include_extras=True), {}
    for name in draw(st.lists(st.sampled_from([f.name for f in dataclasses.fields(section)] or [""]), max_size=4)):
        inner = getattr(section, name, None)
        if dataclasses.is_dataclass(inner):
            values_by_name[name] = draw(changed(inner))
        elif name:
            values_by_name[name] = draw(values(hints[name]))
    try:
        return dataclasses.replace(section, **values_by_name)
    except UserError:
        assume(False)


@st.composite
def experiments(draw: Any) -> Config:
    """A config some of whose sections are changed."""
    names = draw(st.lists(st.sampled_from([f.name for f in dataclasses.fields(Config)]), max_size=3, unique=True))
    absent = {"adapter": LoRA(), "compress": Quantized()}
    return dataclasses.replace(BASE, **{name: draw(changed(getattr(BASE, name) or absent[name])) for name in names})


def options(before: Config, after: Config) -> list[str]:
    """The options that make one config of another."""
    old, argv, other_kinds = configs.flatten(before), [], []
    for name, value in configs.flatten(after).items():
        if value != old.get(name) or name.startswith(tuple(other_kinds)):
            argv += ["--" + name.replace("_", "-"), *map(str, value if isinstance(value, tuple) else [value])]
        if name in kind_names(after) and value != old.get(name):
            other_kinds.append(name + ".")  # whose defaults may be others
    return argv


def kind_names(cfg: Config) -> set[str]:
    return {name for name, _ in configs.with_kinds(cfg)}


@SAME
@given(cfg=experiments())
def test_any_config_survives_its_file(cfg):
    assert configs.from_json(json.loads(json.dumps(configs.to_json(cfg)))) == cfg


@settings(SAME, max_examples=20)
@given(cfg=experiments())
def test_any_config_can_be_given_as_options(tmp_path, cfg):
    file = tmp_path / "base.py"
    file.write_text(
        "from jaxmodels.config import Config\nfrom jaxmodels.models.gpt2 import GPT2Config\n\n\n"
        "def get_config():\n    return Config(model=GPT2Config(layers=1, width=8, heads=2))\n"
    )
    argv = options(configs.load(file), cfg)
    assert configured([str(file), *argv], "jaxmodels train", RunOptions)[0] == cfg
