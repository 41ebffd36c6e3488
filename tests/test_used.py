"""Every option of data, augment and task: it changes what is built, or it is refused."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jaxmodels import config as configs
from jaxmodels import tasks
from jaxmodels.config import Augment, DataConfig, TaskConfig, used
from jaxmodels.data import open_source, tokens
from jaxmodels.data.tokenizer import Bytes
from jaxmodels.errors import UserError
from jaxmodels.models import families

TASKS = tuple(tasks.TASKS)
SOURCES = ("stdlib", "text", "tfds", "images", "table", "huggingface", "tokens", "synthetic")


def other(value):
    """Another value of the same type as a field's usual one."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value / 2 + 1 / 8
    return ("x",) if isinstance(value, tuple) else f"{value}x"


CHANGED = {
    "data": {field.name: other(field.default) for field in dataclasses.fields(DataConfig)},
    "augment": {field.name: other(field.default) for field in dataclasses.fields(Augment)},
    "task": {field.name: other(field.default) for field in dataclasses.fields(TaskConfig)},
}


def section(kind, **fields):
    made = kind()
    for name, value in fields.items():
        object.__setattr__(made, name, value)
    return made


@pytest.mark.parametrize("kind, table", [(DataConfig, used.DATA), (Augment, used.AUGMENT), (TaskConfig, used.TASK)])
def test_the_table_knows_every_field(kind, table):
    assert set(table) == {field.name for field in dataclasses.fields(kind)}
    for use in table.values():
        assert set(use.sources or ()) <= set(SOURCES) and set(use.tasks or ()) <= set(TASKS)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("source", SOURCES)
def test_a_field_that_a_source_or_task_does_not_use_is_refused(source, task):
    for shaped in (True, False):
        kinds = used.kinds(task, shaped)
        for name, use in used.DATA.items():
            if name == "source":
                continue
            data = section(DataConfig, source=source, **{name: CHANGED["data"][name]})
            fits = all(
                options is None or set(options) & set(got)
                for options, got in zip(use, ((source,), (task,), kinds), strict=True)
            )
            if fits:
                used.check_data(data, Augment(), task, kinds)
                continue
            with pytest.raises(UserError, match=rf"^got data.{name} .* does not use, .* try without --data."):
                used.check_data(data, Augment(), task, kinds)
        for name in used.AUGMENT:
            augment = section(Augment, **{"randaugment": 1, name: CHANGED["augment"][name]})
            if source in used.RECORDS and task in ("classification", "contrastive", "vae", "gan") and "image" in kinds:
                used.check_data(DataConfig(source=source), augment, task, kinds)
                continue
            with pytest.raises(UserError, match=r"^got augment\.\w+ .* does not use"):
                used.check_data(DataConfig(source=source), augment, task, kinds)


@pytest.mark.parametrize("task", TASKS)
def test_a_field_of_another_task_is_refused(task):
    for name, use in used.TASK.items():
        if name == "name":
            continue
        cfg = section(TaskConfig, name=task, **{name: CHANGED["task"][name]})
        if task in (use.tasks or TASKS):
            used.check_task(cfg, None)
            continue
        with pytest.raises(UserError, match=rf"^got task.{name} .*, which task {task} does not use"):
            used.check_task(cfg, None)


def test_what_says_the_same_twice_is_refused():
    with pytest.raises(UserError, match=r"got data.eval_fraction 0.2 and data.eval_path"):
        data = DataConfig(source="text", eval_path=("x",), eval_fraction=0.2)
        used.check_data(data, Augment(), "causal_lm", ("text",))
    with pytest.raises(UserError, match="got augment.magnitude 3.0 without augment.randaugment"):
        used.check_data(DataConfig(source="tfds"), Augment(magnitude=3.0), "vae", ("image",))
    gan = families.family("gan").config
    with pytest.raises(UserError, match="got task.gradient_penalty 1.0 for a GAN of kind dcgan, expected wgan-gp"):
        tasks.build(TaskConfig(name="gan", gradient_penalty=1.0), gan(kind="dcgan"), DataConfig())


def test_every_config_uses_all_that_it_sets(root):
    for path in (root / "configs").glob("*.py"):
        cfg = configs.load(path)
        kinds = used.kinds(cfg.task.name, getattr(cfg.model, "input_shape", None) is not None)
        used.check_data(cfg.data, cfg.augment, cfg.task.name, kinds)
        used.check_task(cfg.task, cfg.model)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(0)
    Bytes().save(root)
    rows = [
        {"text": f"some text {i}", "other": f"text {i} some", "label": i % 2, "kind": i % 3, "x": [i / 40, 0.5]}
        for i in range(60)
    ]
    for name, some in (("rows", rows), ("held", rows[:7]), ("bad", [*rows, *rows[:9], {"text": None}] * 2)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    for name in ("a", "b"):
        (root / f"{name}.txt").write_text(" ".join(str(n) for n in rng.integers(0, 99, 900)))
        tokens.write(root / f"{name}.bin", [rng.integers(0, 200, 900).astype(np.uint8)], Bytes(), name)
    for folder in ("images", "others"):
        for i in range(24):
            place = root / folder / "ab"[i % 3 // 2] / f"{i}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (9, 8, 3), np.uint8)).save(place)
    return root


TEXTS = {"source": "table", "path": "rows.jsonl", "input_field": "text", "seq_len": 8}
PICTURES = {"source": "images", "path": "images"}
PAIRS = {**TEXTS, "tokenizer": "bpe:280", "target_field": "other"}
FILES = {"source": "text", "path": "a.txt", "seq_len": 8}


def built(root, task, fields: Any, **augment: Any):
    """What a run would see of its two splits."""
    fields = {k: (str(root / v),) if k in ("path", "eval_path") else v for k, v in fields.items()}
    shape = (8, 8, 3) if fields["source"] == "images" else (2,) if fields.get("input_field") == "x" else None
    vocabulary = 300 if shape is None or task == "contrastive" else None
    model: Any = {"vocab_size": vocabulary, "inputs_shape": shape, "num_classes": 3}
    found = []
    for split in ("train", "eval"):
        source: Any = open_source(DataConfig(**fields), split, task, augment=Augment(**augment), **model)
        where = np.arange(min(len(source), 12))
        batch = source.batch(where, np.full_like(where, 1))
        found += [len(source), source.describe(), source.class_names, getattr(source, "captions", ())]
        found += [source.groups, {name: x.tolist() for name, x in batch.items()}, getattr(source, "_threads", None)]
    return found


@pytest.mark.parametrize(
    "task, base, change",
    [
        ("causal_lm", FILES, {"path": "b.txt"}),
        ("causal_lm", FILES, {"eval_path": "b.txt"}),
        ("causal_lm", FILES, {"eval_fraction": 0.3}),
        ("causal_lm", FILES, {"tokenizer": "chars"}),
        ("causal_lm", FILES, {"seq_len": 16}),
        ("causal_lm", {**FILES, "source": "tokens", "path": "a.bin"}, {"eval_path": "b.bin"}),
        ("causal_lm", {**FILES, "source": "tokens", "path": "a.bin"}, {"eval_fraction": 0.3}),
        ("causal_lm", TEXTS, {"input_field": "other"}),
        ("masked_lm", TEXTS, {"pack": True}),
        ("masked_lm", TEXTS, {"eval_path": "held.jsonl"}),
        ("seq2seq", PAIRS, {"target_field": "text", "input_field": "other"}),
        ("seq2seq", PAIRS, {"pack": True}),
        ("classification", TEXTS, {"label_field": "kind"}),
        ("classification", TEXTS, {"group_field": "kind"}),
        ("classification", {**TEXTS, "label_field": "kind"}, {"balance": True}),
        ("classification", TEXTS, {"eval_path": "held.jsonl"}),
        ("classification", TEXTS, {"eval_fraction": 0.4}),
        ("classification", TEXTS, {"tokenizer": "words:40"}),
        ("classification", {**TEXTS, "path": "bad.jsonl"}, {"bad_records": 0}),
        ("classification", PICTURES, {"eval_path": "others"}),
        ("classification", PICTURES, {"eval_fraction": 0.4}),
        ("classification", PICTURES, {"balance": True}),
        ("classification", PICTURES, {"threads": 2}),
        ("contrastive", {**PICTURES, "captions": ("a {label}",), "seq_len": 8}, {"class_names": ("xy", "z")}),
        ("contrastive", {**PICTURES, "captions": ("a {label}",), "seq_len": 8}, {"captions": ("an {label}",)}),
        ("vae", PICTURES, {"path": "others"}),
    ],
)  # fmt: skip
def test_a_field_that_is_used_changes_what_is_built(files, task, base, change):
    before = built(files, task, base)
    try:
        assert built(files, task, {**base, **change}) != before
    except UserError as refused:
        assert str(refused).startswith("got 1 bad records")


@pytest.mark.parametrize("name", used.AUGMENT)
def test_a_change_of_images_changes_them(files, name):
    usual = {"randaugment": 2} if name == "magnitude" else {}
    values = {"crop": 0.3, "flip": True, "colour": 0.5, "rotate": 30.0, "magnitude": 3.0}
    before = built(files, "classification", PICTURES, **usual)
    assert built(files, "classification", PICTURES, **usual, **{name: values.get(name, 2)}) != before


def test_what_the_kind_of_the_input_does_not_use_is_refused_once_it_is_known(files):
    numbers = {**TEXTS, "input_field": "x"}
    del numbers["seq_len"]
    with pytest.raises(UserError, match="got data.threads 2, which a model of inputs that are no image does not use"):
        built(files, "classification", {**numbers, "threads": 2})
    with pytest.raises(UserError, match="got augment.flip True, which a model of inputs that are no image"):
        built(files, "classification", numbers, flip=True)
    with pytest.raises(UserError, match="got data.mean .* expected one number or 2, one for each channel"):
        built(files, "classification", {**numbers, "mean": (0.1, 0.2, 0.3), "std": (1.0, 1.0, 1.0)})
    with pytest.raises(UserError, match="which does not exist"):
        built(files, "causal_lm", {**FILES, "eval_path": "nowhere.txt"})
    with pytest.raises(UserError, match="got data.label_field 'colour', expected one of label"):
        built(files, "vae", {**PICTURES, "label_field": "colour"})
