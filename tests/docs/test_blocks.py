"""Every code block of every page runs as written, in a folder with texts, photos, a table and published weights."""

from __future__ import annotations

import contextlib
import json
import sys

import numpy as np
import pytest
from PIL import Image

from jaxmodels import create
from jaxmodels.data.waves import wav
from jaxmodels.hf.save import save_pretrained
from jaxmodels.models.bert import BERTConfig
from tests.conftest import ROOT
from tests.docs.blocks import blocks, run

PAGES = sorted(path for path in (ROOT / "docs").rglob("*.md") if blocks(path))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """What a reader has lying about."""
    rng = np.random.default_rng(0)
    (tmp_path / "texts").mkdir()
    for k in range(4):
        (tmp_path / "texts" / f"{k}.txt").write_text("The cat sat on the mat, and the dog ran after it.\n" * 30)
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for k in range(24):
            pixels = rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{k}.png")
    rows = [f"{text} {k},{label}" for k in range(40) for text, label in (("a fine film", "good"), ("too long", "bad"))]
    (tmp_path / "reviews.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    recorded(tmp_path / "recordings")
    published(tmp_path / "bert-base-uncased")
    monkeypatch.chdir(tmp_path)
    # what a reader has beside it is importable: a config's neighbors, and modules of tasks, models and sources
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def recorded(where):
    """A few short sounds of two words by two speakers, with a table of them."""
    where.mkdir()
    rows = []
    for k in range(12):
        word, speaker = ("yes", "no")[k % 2], ("ann", "bob")[k // 2 % 2]
        (where / f"{k}.wav").write_bytes(wav(np.sin(np.arange(900) / (k + 2)), 8000))
        rows.append({"file": f"{k}.wav", "word": word, "speaker": speaker, "split": "train" if k < 8 else "validation"})
    (where / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def published(where):
    """A tiny BERT with its tokenizer, in Hugging Face's format."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    where.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "fine", "film", "too", "long"]
    rust = Tokenizer(models.WordPiece({word: k for k, word in enumerate(words)}, unk_token="[UNK]"))
    rust.normalizer = normalizers.BertNormalizer()
    rust.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    rust.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    rust.save(str(where / "tokenizer.json"))
    model = create(BERTConfig(vocab_size=10, context=32, layers=2, heads=2, width=16, mlp_width=24))
    rng = np.random.default_rng(0)
    params = {}

    def filled(tree):
        return {
            key: filled(leaf) if isinstance(leaf, dict) else 0.02 * rng.normal(size=leaf.shape).astype(np.float32)
            for key, leaf in tree.items()
        }

    params = filled(model.shapes())
    save_pretrained(where, model, params)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT / "docs")))
def test_every_block_of_a_page_runs_as_written(page, folder, monkeypatch):
    if page.name != "tutorial.md":  # one page draws the curves of its runs, which takes as long as they do
        monkeypatch.setattr("jaxmodels.report.curves.draw", lambda run, out, lines=None: None)
    scope: dict = {"__name__": "page"}
    with contextlib.ExitStack() as beside:
        for block in blocks(page):
            try:
                run(block, scope, folder, beside)
            except BaseException as error:
                error.add_note(f"in {page.relative_to(ROOT)}, line {block.line}")
                raise


def test_a_block_is_left_out_only_with_a_reason_and_few_are():
    found = [block for page in PAGES for block in blocks(page)]
    left_out = [block for block in found if block.skipped is not None]
    assert len(found) > 25 and all(len(block.skipped or "") > 10 for block in left_out)
    assert len(left_out) < len(found) / 5


@pytest.mark.parametrize("name", ["model", "task", "source", "kernel", "logger", "launcher"])
def test_an_example_is_what_its_page_explains(name):
    page = {"launcher": "place"}.get(name, name)
    written = {block.title: block.code for block in blocks(ROOT / "docs" / "howto" / f"{page}.md") if block.title}
    files = {path.name: path.read_text() for path in (ROOT / "examples" / f"own_{name}").glob("*.py")}
    assert files == written


def test_a_block_that_fails_fails_its_page(tmp_path):
    page = tmp_path / "page.md"
    parts = ["x = 1", "1 / 0", "x / 0"]
    written = [f"```python\n{part}\n```\n" for part in parts]
    page.write_text(written[0] + "\n<!-- not run: it would fail, and says so -->\n" + written[1] + "\n" + written[2])
    first, second, third = blocks(page)
    scope: dict = {}
    for block in (first, second):
        run(block, scope, tmp_path)
    with pytest.raises(ZeroDivisionError):
        run(third, scope, tmp_path)
