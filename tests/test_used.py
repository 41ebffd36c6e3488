"""Every option of data, augment and task: it changes what is built, or it is refused."""

import contextlib
import dataclasses
import json
import re
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jaxmodels import config as configs
from jaxmodels import tasks
from jaxmodels.config import GAN, Augment, Synthetic, Text
from jaxmodels.data import SOURCES, open_for, open_source, tokens
from jaxmodels.data.section import SHARED
from jaxmodels.data.tokenizer import Bytes
from jaxmodels.errors import UserError
from jaxmodels.models.gan import GANConfig
from jaxmodels.tasks import TASKS
from tests.sections import data_of, task_of

ALL = tuple(TASKS.names())
LANGUAGE = ("causal_lm", "masked_lm", "seq2seq")
MARKED = ("segmentation", "detection", "set_detection")
LABELED = ("classification", "verification")
EXAMPLES = (*LABELED, *MARKED, "contrastive", "vae", "gan", "diffusion")
OF_A_FIELD = (*LANGUAGE, *EXAMPLES)
USES = {
    "seq_len": (ALL, ("text", "audio", "items")),
    "mean": ((*LABELED, *MARKED, "contrastive"), ("image", "array")),
    "std": ((*LABELED, *MARKED, "contrastive"), ("image", "array")),
    "tokenizer": (ALL, ("text",)),
    "pack": (LANGUAGE, ("text",)),
    "input_field": ((*OF_A_FIELD, "extraction", "transcription", "waveform", "multimodal_lm"), ()),
    "label_field": ((*EXAMPLES, "extraction"), ()),
    "target_field": (("seq2seq", "extraction", "transcription", "multimodal_lm"), ()),
    "group_field": ((*EXAMPLES, "question_answering", "transcription", "multimodal_lm"), ()),
    "class_names": ((*MARKED, "contrastive", "diffusion"), ()),
    "captions": (("contrastive", "diffusion"), ()),
    "bad_records": (ALL, ()),
    "balance": ((*LABELED, "contrastive", "vae", "gan", "diffusion"), ()),
    "threads": ((*EXAMPLES, "transcription", "multimodal_lm"), ("image", "audio")),
    "pixels": (EXAMPLES, ("image",)),
}
"""Field of data -> the tasks and the kinds of inputs that have a use for it."""
SET = {"mean": {"mean": (0.5,), "std": (0.5,)}, "std": {"mean": (0.5,), "std": (0.5,)}, "pixels": {"pixels": "opencv"}}
RECORDS, NO_RECORDS = ("tfds", "images", "table", "huggingface", "squad", "coco"), ("stdlib", "text", "tokens")


OWN = {"transforms": ("tests.sections:inverted",)}


def other(value):
    """Another value of the same type as a field's usual one."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return int(value / 2) + 1 if isinstance(value, int) else value / 2 + 1 / 8
    return ("x",) if isinstance(value, tuple) else f"{value}x"


class Opened(Exception):
    """The data would be read now."""


@pytest.fixture
def unread(monkeypatch):
    """Sources that only say that they would be read."""

    def read(*_):
        raise Opened

    for name in (*RECORDS, "interactions", *NO_RECORDS):
        for method in ("records", "corpus", "windows"):
            if name not in NO_RECORDS or method != "records":
                monkeypatch.setattr(SOURCES.find(name), method, read)
    return read


def refused(source, task, shaped, augment=None, **fields):
    """What is said of fields that were set, or nothing where they are taken."""
    facts = {"inputs_shape": (8, 8, 3) if shaped else None, "vocab_size": 99, "num_classes": 3}
    try:
        open_source(data_of(source, **fields), "train", task_of(task), augment=augment, **facts)
    except Opened:
        return ""
    except UserError as error:
        return str(error)
    raise AssertionError("nothing was opened")


def kinds(task, shaped):
    if task in ("contrastive", "diffusion"):
        return ("image", "array", "text")
    if task in MARKED:
        return ("image",)
    if task in ("transcription", "multimodal_lm"):  # of a model that only hears
        return ("audio", "text")
    if task == "waveform":
        return ("audio",)
    if task in ("next_item", "retrieval"):
        return ("items",)
    return ("image", "array") if task in EXAMPLES and (shaped or task != "classification") else ("text",)


def test_the_table_knows_every_field_that_not_all_tasks_use():
    assert set(USES) == set(SHARED)


@pytest.mark.parametrize("task", ALL)
@pytest.mark.parametrize("source", [*RECORDS, *NO_RECORDS])
def test_a_field_that_a_task_does_not_use_is_refused(unread, source, task):
    if source in NO_RECORDS and task not in ("causal_lm", "masked_lm"):
        assert re.match(f"got data {source}, expected a source of records", refused(source, task, True))
        return
    have = {field.name: field.default for field in dataclasses.fields(SOURCES.find(source))}
    for shaped in (True, False) if task == "classification" else (task in EXAMPLES,):
        for name in SHARED:
            if name not in have:
                continue
            found = refused(source, task, shaped, **SET.get(name, {name: other(have[name])}))
            tasks_, inputs = USES[name]
            if task in tasks_ and (not inputs or set(inputs) & set(kinds(task, shaped))):
                assert not found, (name, shaped)
            else:
                assert re.match(rf"got data.\w+ .* does not use, .* try without --data.{name[:3]}|got data.mean", found)
        for field in dataclasses.fields(Augment):
            value = {"crop": 0.5, "randaugment": 1, **OWN}.get(field.name, other(field.default))
            also = {"randaugment": 1} if field.name == "magnitude" else {}
            found = refused(source, task, shaped, Augment(**{field.name: value, **also}))
            if "image" in kinds(task, shaped) and source in RECORDS:
                assert not found
            else:
                assert re.match(r"got augment\.\w+ .* does not use", found)


def test_a_field_that_a_kind_does_not_have_cannot_be_set():
    for made in (lambda: data_of("table", name="x"), lambda: data_of("synthetic", tokenizer="chars"),
                 lambda: task_of("gan", beta=2.0), lambda: task_of("vae", label_smoothing=0.1)):  # fmt: skip
        with pytest.raises(TypeError, match="unexpected keyword argument"):
            made()


def test_what_says_the_same_twice_is_refused():
    with pytest.raises(UserError, match=r"got data.eval_fraction 0.2 and data.eval_path"):
        Text(eval_path=("x",), eval_fraction=0.2)
    with pytest.raises(UserError, match="got augment.magnitude 3.0 without augment.randaugment"):
        Augment(magnitude=3.0)
    with pytest.raises(UserError, match="got task.gradient_penalty 1.0 for a GAN of kind dcgan, expected wgan-gp"):
        tasks.build(GAN(gradient_penalty=1.0), GANConfig(kind="dcgan"), Synthetic())


def test_every_config_uses_all_that_it_sets(root, unread, monkeypatch):
    for path in (root / "configs").glob("*.py"):
        cfg = configs.load(path)
        if type(cfg.data).__module__.startswith("examples."):
            monkeypatch.setattr(type(cfg.data), "records", unread)
        with contextlib.suppress(Opened):
            open_for(cfg, "train", tasks.build(cfg.task, cfg.model, cfg.data).fields)


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
        source: Any = open_source(data_of(**fields), split, task_of(task), augment=Augment(**augment), **model)
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


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Augment)])
def test_a_change_of_images_changes_them(files, name):
    usual = {"randaugment": 2} if name == "magnitude" else {}
    values = {"crop": 0.3, "flip": True, "colour": 0.5, "rotate": 30.0, "magnitude": 3.0, **OWN}
    before = built(files, "classification", PICTURES, **usual)
    assert built(files, "classification", PICTURES, **usual, **{name: values.get(name, 2)}) != before


def test_what_the_kind_of_the_input_does_not_use_is_refused_once_it_is_known(files):
    numbers = {**TEXTS, "input_field": "x"}
    del numbers["seq_len"]
    with pytest.raises(UserError, match="got data.threads 2, which classification of arrays from table does not use"):
        built(files, "classification", {**numbers, "threads": 2})
    with pytest.raises(UserError, match="got augment.flip True, which classification of arrays from table"):
        built(files, "classification", numbers, flip=True)
    with pytest.raises(UserError, match="got data.mean .* expected one number or 2, one for each channel"):
        built(files, "classification", {**numbers, "mean": (0.1, 0.2, 0.3), "std": (1.0, 1.0, 1.0)})
    with pytest.raises(UserError, match="which does not exist"):
        built(files, "causal_lm", {**FILES, "eval_path": "nowhere.txt"})
    with pytest.raises(UserError, match="got data.label_field 'colour', expected one of label"):
        built(files, "vae", {**PICTURES, "label_field": "colour"})
