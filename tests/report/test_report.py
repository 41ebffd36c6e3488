"""A report shows what runs did, on one page that needs nothing else."""

import dataclasses
import json
import logging
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import jax
import matplotlib.image
import numpy as np
import pytest

from jaxmodels import config as configs
from jaxmodels.cli import main
from jaxmodels.commands.import_ import import_run
from jaxmodels.config import TFDS, AdamW, Classification, Config, Eval, Metrics, Table, Text, Train
from jaxmodels.models.families import create
from jaxmodels.models.mlp import MLPConfig
from jaxmodels.report import attention, build, confusion, curves, latents, page, saliency, samples, summary
from jaxmodels.report.pieces import Picture, tile
from jaxmodels.report.pieces import Table as Cells
from jaxmodels.train import run as runs
from jaxmodels.train.saved import Evaluation, Run, load_run
from tests.sections import task_of
from tests.zoo import ZOO, arrays, example


@pytest.fixture(scope="module")
def trained(tmp_path_factory, shared_data):
    """Two runs on real digits, of which one learns more slowly."""
    folder = tmp_path_factory.mktemp("runs")
    for name, rate in (("fast", 3e-3), ("slow", 1e-4)):
        cfg = Config(
            model=MLPConfig(hidden=(32,)),
            task=Classification(),
            data=TFDS(dir=str(shared_data / "tfds"), name="mnist", eval_split="test[:600]", batch_size=64),
            optim=AdamW(peak_lr=rate),
            train=Train(steps=40),
            eval=Eval(every=20, batch_size=256),
            metrics=Metrics(every=5, loggers=(), progress="none"),
        )
        runs.train(cfg, folder / name)
    return folder


@pytest.fixture(scope="module")
def written(trained):
    """The page of both runs."""
    out = trained / "page"
    assert main(["report", str(trained / "fast"), str(trained / "slow"), "--out", str(out)]) == 0
    return out / "report.html"


def test_the_page_needs_nothing_else(written):
    text = written.read_text()
    sources = re.findall(r"""(?:src|href|srcset|data|poster)\s*=\s*["']([^"']*)""", text)
    assert len(sources) > 5 and all(s.startswith(("data:image/png;base64,", "#")) for s in sources)
    assert not re.search(r"https?:|url\(|@import|<script|<link", text)


def test_the_page_says_what_was_run_and_what_came_out(written, trained):
    text = written.read_text()
    assert "optim.peak_lr" in text and "0.003" in text and "0.0001" in text, "where the configs differ"
    assert "data.dir" not in text
    for name in ("fast", "slow"):
        found = curves.last(trained / name)
        assert summary.number(found["eval/accuracy"]) in text and summary.number(found["eval/f1/7"]) in text
        assert curves.last(trained / name)["eval/accuracy"] < 1
    assert "25,450" in text, "parameters: 784·32 + 32 + 32·10 + 10"


def test_a_browser_shows_all_of_it(written, tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("needs a browser: chromium is not installed")
    script = (
        "<script>addEventListener('load', () => { document.body.dataset.widths = "
        "Array.from(document.images, image => image.naturalWidth).join(' ') })</script></body>"
    )
    asking = tmp_path / "asking.html"
    asking.write_text(written.read_text().replace("</body>", script))
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        f"--disable-component-update --disable-sync --user-data-dir={tmp_path}/profile --dump-dom"
    )
    dom = subprocess.run(
        [browser, *flags.split(), asking.as_uri()], capture_output=True, text=True, timeout=120, check=True
    ).stdout
    widths = [int(width) for width in re.search(r'data-widths="([\d ]*)"', dom)[1].split()]
    assert len(widths) == dom.count("<img ") == 7 and min(widths) > 300
    headings = re.findall(r"<h2[^>]*>([^<]*)", dom)
    assert headings == ["Runs", "Metrics", "Curves", "Confusion", "Saliency"]


def test_pictures_lie_beside_the_page(written):
    found = {path.name for path in written.parent.iterdir()}
    each = {f"{run}-{name}.png" for run in ("fast", "slow") for name in ("confusion", "mistakes", "saliency")}
    assert found == {"report.html", "curves.png", *each}
    for name in each:
        assert matplotlib.image.imread(written.parent / name)[..., :3].std() > 0.05


def test_several_runs_are_drawn_over_each_other(trained):
    figure = curves.overlay({"fast": trained / "fast", "slow": trained / "slow"})
    panels = {axis.get_title(): axis for axis in figure.axes if axis.get_title()}
    assert {"loss", "accuracy", "learning rate", "examples per second", "norm of the gradient"} <= set(panels)
    train, held_out, other_train, other_held_out = panels["loss"].lines
    assert train.get_color() == held_out.get_color() != other_train.get_color() == other_held_out.get_color()
    assert list(held_out.get_xdata()) == [20, 40] and held_out.get_marker() == "o" and train.get_marker() == "None"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["fast", "slow", "training", "held out"]


def test_losses_of_a_gan_have_a_panel_each():
    rows = {"train/discriminator/loss", "train/generator/loss", "train/generator/grad_norm", "eval/loss"}
    titles = dict(curves.chosen({*rows, "eval/generator", "eval/f1/7", "eval/group/a/f1"}))
    assert titles == {
        "loss of the discriminator": ["train/discriminator/loss", "eval/loss"],
        "loss of the generator": ["train/generator/loss", "eval/generator"],
        "norm of the generator's gradient": ["train/generator/grad_norm"],
    }


def test_a_broken_part_does_not_lose_the_page(trained, tmp_path, monkeypatch, caplog):
    def broken(saved):
        raise RuntimeError("no such <thing>")

    monkeypatch.setitem(build.PARTS, "Attention", broken)
    monkeypatch.setattr(logging.getLogger("jaxmodels"), "propagate", True)
    found = build.write({"fast": trained / "fast"}, tmp_path, None, False)
    text = found.read_text()
    assert "Missing attention of fast: RuntimeError: no such &lt;thing&gt;" in text
    assert 'id="saliency"' in text and 'id="curves"' in text
    (said,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert said.getMessage() == "the report lacks attention of fast: RuntimeError: no such <thing>"


def test_a_run_without_its_data_keeps_its_curves(trained, tmp_path):
    run = tmp_path / "moved"
    shutil.copytree(trained / "fast", run)
    cfg, origin = configs.read(run)
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, dir=str(tmp_path / "nothing")))
    configs.save(cfg, run / "config.json", origin)
    text = build.write({"moved": run}, None, None, False).read_text()
    assert (run / "report" / "curves.png").exists()
    assert (
        summary.number(curves.last(run)["eval/accuracy"]) in text
        and "none that can be opened here with its data" in text
    )
    kept = json.loads((run / "data.json").read_text())
    assert kept["train"] in text and kept["eval"] in text


def test_the_page_of_a_run_that_was_stopped_says_how_far_it_is(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained / "slow", run)
    shutil.rmtree(run / "checkpoints")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    first = [line for line in lines if json.loads(line)["step"] <= 15]
    (run / "metrics.jsonl").write_text("\n".join(first) + "\n")

    def steps():
        (row,) = re.findall(
            r"<tr>(?:(?!</tr>).)*>steps<.*?</tr>", build.write({"run": run}, None, None, False).read_text(), re.S
        )
        return re.sub("<[^>]*>", " ", row).split()

    assert steps() == "steps 15 of 40, batches of 64".split()
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert steps() == "steps 40 of 40, batches of 64".split()
    (run / "metrics.jsonl").unlink()
    assert steps() == "steps 40, batches of 64".split(), "how far it came is not known"


def test_the_page_of_an_imported_run_says_that_it_was_not_trained_here(root, tmp_path, capsys):
    run = tmp_path / "run"
    import_run(root / "tests" / "golden" / "t5", out=run)
    page = build.write({"run": run}, None, None, False)
    text = page.read_text()
    assert "not here: imported" in text and "1,000" not in text and "synthetic" not in text
    assert "Without the checkpoint: the run was imported and has no data of its own, try jaxmodels eval" in text
    assert [heading in text for heading in ('id="run"', 'id="metrics"', 'id="curves"')] == [True, False, False]
    assert not list(page.parent.glob("*.png"))
    capsys.readouterr()
    assert main(["eval", str(run)]) == 2
    assert "try --data table --data.path FILE" in capsys.readouterr().err


def test_confusion_is_that_of_scikit_learn(trained):
    from sklearn.metrics import accuracy_score, confusion_matrix

    saved = load_run(trained / "fast").evaluation()
    labels, predicted, confidence = confusion.predictions(saved)
    assert len(labels) == 600 and 0.1 <= confidence.min() <= confidence.max() <= 1
    found = confusion.counts(labels, predicted, 10)
    np.testing.assert_array_equal(found, confusion_matrix(labels, predicted, labels=range(10)))
    np.testing.assert_allclose(
        accuracy_score(labels, predicted), curves.last(saved.run.directory)["eval/accuracy"], atol=1e-6
    )
    assert confusion.counts(np.array([-1, 1]), np.array([0, 0]), 2).tolist() == [[0, 0], [1, 0]], "-1 is no label"


def test_another_split_is_measured_anew(trained):
    saved = load_run(trained / "fast").evaluation({"eval_split": "test[600:900]"})
    found = build.evaluated(saved, "test[600:900]")
    labels, predicted, _ = confusion.predictions(saved)
    assert len(labels) == 300
    np.testing.assert_allclose(found["eval/accuracy"], (labels == predicted).mean(), atol=1e-6)


@pytest.mark.parametrize(("asked", "said"), [(["--split", "nonsense"], "nonsense"), (["--best"], "no best checkpoint")])
def test_what_is_asked_of_a_report_takes_effect_or_is_refused(trained, tmp_path, capsys, asked, said):
    run = tmp_path / "run"
    shutil.copytree(trained / "fast", run)
    if "--best" in asked:
        for manifest in run.glob("checkpoints/*/manifest.json"):
            manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "best": False}))
    assert main(["report", str(run), "--out", str(tmp_path / "page"), *asked]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "page").exists()


def test_saliency_of_a_linear_model_is_weight_times_input():
    model = create(MLPConfig(input_shape=(2, 3, 1), classes=4, hidden=()))
    params = arrays(model)
    (x,) = example(model)
    found, predicted, confidence = saliency.attribute(lambda x: model.apply(params, x), x)
    logits = model.apply(params, x)
    w = np.asarray(params["head"]["w"])
    expected = w[:, logits.argmax(-1)].T.reshape(x.shape) * x
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(predicted, logits.argmax(-1))
    np.testing.assert_allclose(confidence, jax.nn.softmax(logits).max(-1), rtol=1e-5)


def stand_in(name, params):
    """A model of the zoo as a saved run has it."""
    task, config = ZOO[name]
    cfg = SimpleNamespace(task=task_of(task))
    source = SimpleNamespace(tokenizer=None)
    return Evaluation(Run(Path(), cfg, {"model": create(config)}, {"model": params}, {}, 0), source)


@pytest.mark.parametrize("name", ["bert-classifier", "lstm-both-ways"])
def test_tokens_have_a_saliency_each_that_adds_up_to_that_of_the_embedding(name):
    model = create(ZOO[name][1])
    params = arrays(model)
    ids = np.array([3, 7, 3, 9, 3, 7], np.int32)
    named = {"segment_ids": np.ones((1, 6), np.int32)}
    found, predicted, _ = saliency.of_tokens(stand_in(name, params).run, ids, named)

    def logit(table):
        return model.apply({**params, "embed": {"w": table}}, ids[None], **named)[0, predicted]

    table = params["embed"]["w"]
    of_rows = np.asarray((jax.grad(logit)(table) * table).sum(-1))
    for token in (3, 7, 9):
        np.testing.assert_allclose(found[ids == token].sum(), of_rows[token], rtol=1e-4, atol=1e-6)
    assert len(np.unique(found)) == 6, "each place has its own"


def test_cross_attention_is_of_the_texts_alone_without_what_fills_up_their_rows():
    saved = stand_in("transformer", arrays(create(ZOO["transformer"][1])))
    tokens = np.arange(1, 13, dtype=np.int32)[None]
    targets, own = np.where(tokens <= 6, tokens + 1, -1), (tokens <= 6).astype(np.int32)
    batch = {"inputs": tokens, "segment_ids": (tokens <= 8).astype(np.int32), "tokens": tokens, "targets": targets}
    means, heads = attention.cross(saved, batch | {"target_segment_ids": own})
    assert len(means.figure.axes) == 2 and len(heads.figure.axes) == 4, "layers of the decoder; heads"
    (shown,) = means.figure.axes[0].images
    assert shown.get_array().shape == (6, 8)
    np.testing.assert_allclose(shown.get_array().sum(-1), 1, atol=1e-5)
    assert [label.get_text() for label in means.figure.axes[0].get_yticklabels()] == ["2", "3", "4", "5", "6", "7"]


def test_latents_grow_to_the_right_and_upwards():
    found = latents.codes(4, (2, 0), side=5).reshape(5, 5, 4)
    assert (np.diff(found[:, :, 2], axis=1) > 0).all() and (np.diff(found[:, :, 0], axis=0) < 0).all()
    assert (found[:, :, [1, 3]] == 0).all(), "the others stay at the prior's mean"
    from scipy.stats import norm

    np.testing.assert_allclose(found[0, :, 2], norm.ppf([0.1, 0.3, 0.5, 0.7, 0.9]), atol=1e-6)


def test_images_lie_in_rows_and_each_above_its_own():
    images = np.arange(6, dtype=np.float32).reshape(6, 1, 1, 1)
    np.testing.assert_array_equal(tile(images, 3)[..., 0], [[0, 1, 2], [3, 4, 5]])
    pairs = np.concatenate([images, images + 10])
    below = tile(latents.beside(pairs, 3), 3)[..., 0]
    np.testing.assert_array_equal(below, [[0, 1, 2], [10, 11, 12], [3, 4, 5], [13, 14, 15]])


def test_samples_are_spread_over_the_steps_up_to_the_checkpoint(tmp_path):
    for step in range(1, 30):
        np.save(tmp_path / f"{step:08d}.npy", np.full((2, 4, 4, 1), step, np.uint8))
    found = samples.over_time(tmp_path, last=22)
    steps = [step for step, _ in found]
    assert len(steps) == 8 and steps[0] == 1 and steps[-1] == 22 and max(np.diff(steps)) == 3
    assert all((images == np.float32(step) / 255).all() for step, images in found)


def test_groups_have_a_table_with_the_largest_difference():
    values = {
        "eval/accuracy": 0.9,
        "eval/precision/cat": 0.8,
        "eval/recall/cat": 0.7,
        "eval/group/north/accuracy": 0.95,
        "eval/group/south/accuracy": 0.85,
        "eval/group/south/f1/cat": 0.5,
        "eval/gap/accuracy": 0.1,
        "eval/gap/f1/cat": 0.2,
    }
    assert summary.by_class(values) == {"cat": {"precision": 0.8, "recall": 0.7}}
    assert summary.by_group(values) == {
        "north": {"accuracy": 0.95},
        "south": {"accuracy": 0.85},
        "largest difference": {"accuracy": 0.1},
    }


def test_what_the_data_says_is_text_on_the_page():
    table = Cells(("<b>", "n"), [("</table><script>", "1,000"), ("x", "–")])
    found = page.html(table, {})
    assert "<script" not in found and "&lt;/table&gt;" in found and found.count('class="number"') == 3


def test_runs_with_odd_names_stay_apart_and_are_named_as_they_are(tmp_path):
    """One step, no evaluation, a loss that is no number, names that a legend would leave out or typeset."""
    names = ("_run", "a$b$c", "a b", "a-b")
    for name in names:
        (tmp_path / name).mkdir()
        row = '{"step": 1, "train/loss": NaN, "train/learning_rate": 0.1}'
        (tmp_path / name / "metrics.jsonl").write_text(row + "\n")
    figure = curves.overlay({name: tmp_path / name for name in names})
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [*names, "training", "held out"]
    assert not any(text.get_parse_math() for text in figure.legends[0].get_texts())
    rate = next(axis for axis in figure.axes if axis.get_title() == "learning rate")
    assert all(line.get_marker() == "." for line in rate.lines)
    parts = [page.Part([Picture("curves", figure)], name) for name in names]
    build.save(tmp_path / "out", "<odd> \udcff", [page.Section("Curves", parts)])
    assert len(list((tmp_path / "out").glob("*.png"))) == 4
    assert "&lt;odd&gt;" in (tmp_path / "out" / "report.html").read_text()


def test_a_split_of_what_has_none_is_refused(tmp_path, capsys):
    for data, said in (
        (Text(path=("a.txt",)), "got --split 'nonsense'"),
        (Table(path=("a.csv",)), "got data.eval_split 'nonsense' without data.split_field"),
    ):
        configs.save(Config(model=MLPConfig(), data=data), tmp_path / "config.json", {})
        assert main(["report", str(tmp_path), "--split", "nonsense"]) == 2
        assert said in capsys.readouterr().err


def test_a_folder_that_is_no_run_is_refused(trained, capsys):
    assert main(["report", str(trained / "fasst")]) == 2
    assert "did you mean" in capsys.readouterr().err
    assert main(["report"]) == 2
    assert main(["report", str(trained / "fast"), str(trained / "fast")]) == 2
    assert "each once" in capsys.readouterr().err
