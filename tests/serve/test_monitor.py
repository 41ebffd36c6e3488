"""`jaxmodels monitor` notices data that are no longer what they were, and says so to programs and to people."""

import json
import re

import matplotlib.image
import numpy as np
import pytest
from PIL import Image

from jaxmodels import config as configs
from jaxmodels.cli import main
from jaxmodels.config import TFDS, AdamW, CausalLM, Classification, Config, Eval, Metrics, Stdlib, Table, Train
from jaxmodels.models.gpt2 import GPT2Config
from jaxmodels.models.lstm import LSTMConfig
from jaxmodels.models.mlp import MLPConfig
from jaxmodels.train import load_run
from jaxmodels.train import run as runs

QUICK = Metrics(every=1000, progress="none", loggers=())


def monitored(capsys, *argv):
    """The exit code, and the line of JSON."""
    code = main(["monitor", *map(str, argv)])
    said = capsys.readouterr().out.splitlines()
    return code, json.loads(said[-1]) if code in (0, 3) else None


@pytest.fixture(scope="module")
def digits(tmp_path_factory, shared_data):
    """A classifier of real digits, and a function that writes some of those that it has not seen."""
    folder = tmp_path_factory.mktemp("digits")
    cfg = Config(
        model=MLPConfig(hidden=(64,)),
        task=Classification(),
        data=TFDS(dir=str(shared_data / "tfds"), name="mnist", eval_split="test", batch_size=64),
        optim=AdamW(peak_lr=3e-3),
        train=Train(steps=120),
        eval=Eval(every=120, batch_size=256),
        metrics=QUICK,
    )
    runs.train(cfg, folder / "run")
    batch = load_run(folder / "run").evaluation().examples(0, 1500)
    order = np.random.default_rng(0).permutation(len(batch["labels"]))
    images, labels = batch["inputs"][order, ..., 0], batch["labels"][order]

    def write(name, first, last, change=lambda image: image):
        for i in range(first, last):
            place = folder / name / str(labels[i])
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(change(images[i])).save(place / f"{i}.png")
        return folder / name

    write("reference", 0, 700)
    return folder, write


def turned(image):
    return np.asarray(Image.fromarray(image).rotate(15, resample=Image.Resampling.BILINEAR))


def noisy(image):
    own = np.random.default_rng(int(image.sum()))
    return np.clip(image + own.normal(0, 20, image.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize(("change", "alarms"), [(turned, True), (noisy, True), (np.asarray, False)])
def test_turned_or_noisy_digits_are_noticed_within_400_and_others_are_not(digits, change, alarms, capsys):
    folder, write = digits
    current = write(f"current-{change.__name__}", 1000, 1400, change)
    out = folder / f"page-{change.__name__}"
    argv = [folder / "run", "--reference", folder / "reference", "--current", current, "--out", out]
    code, found = monitored(capsys, *argv)
    assert (code, found["alarm"]) == ((3, True) if alarms else (0, False)), found["alarms"]
    assert found["current"]["rows"] == 400 and found["reference"]["rows"] == 700
    measured = found["reference"]
    assert measured["accuracy"] > 0.85 and 0 < measured["calibration_error"] < 0.2
    if alarms:
        assert (
            any(name.startswith("inputs/") for name in found["alarms"]) and "predictions/confidence" in found["alarms"]
        )
    page = (out / "report.html").read_text()
    assert page.count("<img") == 3 and ("No alarm." in page) == (not alarms)
    for picture in ("inputs", "predictions", "calibration"):
        shown = matplotlib.image.imread(out / f"{picture}.png")
        assert shown[..., :3].std() > 0.05  # something is drawn


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A classifier of texts, and the table that it was trained on."""
    folder = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(0)

    def write(name, rows, low="one two three four", high="six seven eight nine", wrong=0.0, more=()):
        words = low.split(), high.split()
        lines = [
            f"{' '.join(rng.choice(words[c], 4))},{('low', 'high')[c ^ (rng.random() < wrong)]},{'ab'[k % 2]}"
            for k, c in enumerate(rng.integers(0, 2, rows))
        ]
        (folder / name).write_text("\n".join(["text,label,shop", *lines, *more]) + "\n")
        return folder / name

    table = write("train.csv", 200)
    cfg = Config(
        model=LSTMConfig(vocab_size=64, width=8, hidden=8, layers=1, classes=2, dropout=0.0),
        task=Classification(),
        data=Table(path=(str(table),), tokenizer="words:64", input_field="text", seq_len=8, batch_size=16),
        optim=AdamW(peak_lr=3e-2),
        train=Train(steps=40),
        metrics=QUICK,
    )
    runs.train(cfg, folder / "run")
    return folder, write


def test_labels_that_no_longer_fit_raise_an_alarm_of_accuracy_and_not_of_inputs(texts, capsys):
    folder, write = texts
    argv = [folder / "run", "--reference", write("then.csv", 200), "--group-field", "shop"]
    code, found = monitored(capsys, *argv, "--current", write("now.csv", 200, wrong=0.3))
    assert code == 3 and {"accuracy", "accuracy/a", "accuracy/b"} == {*found["alarms"]}
    assert found["current"]["group"].keys() == {"a", "b"} and found["current"]["accuracy"] < 0.8
    assert (folder / "run" / "monitor" / "groups.png").is_file()


def test_records_that_cannot_be_read_and_rows_without_labels_are_counted(texts, capsys):
    folder, write = texts
    bad = write("bad.csv", 100, more=[",low,a"] * 40 + ["one two,,a"] * 5)
    code, found = monitored(capsys, folder / "run", "--reference", write("good.csv", 100), "--current", bad)
    assert code == 3 and "inputs/unreadable" in found["alarms"]
    assert found["current"]["unreadable"] == 40 and found["current"]["labeled"] == 100
    assert found["current"]["rows"] == 105


def test_data_without_labels_are_compared_without_them(texts, capsys):
    folder, _ = texts
    (folder / "plain.txt").write_text("one two three four\nsix seven six seven\n" * 40)
    both = ["--reference", folder / "plain.txt", "--current", folder / "plain.txt"]
    code, found = monitored(capsys, folder / "run", *both)
    assert code == 0 and "accuracy" not in found["current"]
    assert not any(test["name"].startswith("accuracy") for test in found["tests"])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--group-field", "shops"], "got --group-field shops, expected one of the columns .* did you mean 'shop'"),
        (["--label-field", "text"], "got the label '.*' in .*, expected a class of the run"),
        (["--out", "{file}"], "got --out"),
        (["--current", "none.csv"], "none.csv"),
        (["--current", "{empty}"], r"none of whose records can be read \(.*empty.csv: .+\)"),
    ],
)
def test_mistakes_are_named_before_a_page_is_written(texts, options, match, capsys):
    folder, _ = texts
    table = folder / "train.csv"
    given = {"--reference": table, "--current": table, "--out": folder / "page-of-mistakes"}
    (folder / "empty.csv").write_text("text,label,shop\n" + '" ",low,a\n' * 3)
    given |= {options[0]: options[1].format(file=table, empty=folder / "empty.csv")}
    argv = [str(x) for pair in given.items() for x in pair]
    assert main(["monitor", str(folder / "run"), *argv]) == 2
    assert re.search(match, capsys.readouterr().err)
    assert not (folder / "page-of-mistakes").exists()


def test_a_run_that_predicts_no_class_is_refused(tmp_path, capsys):
    model = GPT2Config(vocab_size=256, layers=1, width=16, heads=2)
    (tmp_path / "run").mkdir()
    configs.save(Config(model=model, task=CausalLM(), data=Stdlib(seq_len=16)), tmp_path / "run" / "config.json", {})
    assert main(["monitor", str(tmp_path / "run"), "--reference", "a", "--current", "b"]) == 2
    assert "got a run of task causal_lm, expected one that predicts one class" in capsys.readouterr().err
