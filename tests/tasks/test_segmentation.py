"""The class of each pixel: losses and IoUs equal to plain ones, masks of an image's own size, pictures of both."""

import dataclasses
import functools
import io
import json

import jax
import numpy as np
import pytest
from PIL import Image
from sklearn import metrics as sklearn

import jaxmodels
from jaxmodels import tasks
from jaxmodels.cli import main
from jaxmodels.config import AdamW, Augment, Config, Eval, Metrics, Segmentation, Stdlib, Table, Train
from jaxmodels.data.marks import decode_mask
from jaxmodels.errors import UserError
from jaxmodels.generate.masks import Folder, likeliest
from jaxmodels.models.cnn import CNNConfig
from jaxmodels.models.mlp import MLPConfig
from jaxmodels.models.unet import UNetConfig
from jaxmodels.report import masks
from jaxmodels.tasks.segmentation import confusion, resized, summarize
from jaxmodels.train.run import train

CLASSES = 4
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def drawn(images=6, missing=(), seed=0):
    """Logits (B, H, W, C) that are right more often than not, and labels of which some do not count."""
    rng = np.random.default_rng(seed)
    labels = rng.choice([-1, *(c for c in range(CLASSES) if c not in missing)], (images, 5, 7)).astype(np.int16)
    logits = rng.normal(size=(*labels.shape, CLASSES)).astype(np.float32)
    logits += 1.5 * (labels[..., None] == np.arange(CLASSES))
    logits[..., list(missing)] -= 50
    return logits, labels


@pytest.mark.parametrize("missing", [(), (2,)])
def test_ious_are_those_of_scikit_learn_whatever_the_batches(missing):
    logits, labels = drawn(missing=missing)
    count = jit(confusion)
    whole = sum(np.asarray(count(logits[i : i + 2], labels[i : i + 2]), np.float64) for i in (0, 2, 4))
    seen, chosen = labels >= 0, logits.argmax(-1)
    assert np.array_equal(whole, sklearn.confusion_matrix(labels[seen], chosen[seen], labels=range(CLASSES)))
    found = summarize({"loss": (1.0, 2.0), "confusion": (whole, seen.sum())}, ["sky", "sea"])
    each = sklearn.jaccard_score(labels[seen], chosen[seen], average=None, labels=range(CLASSES), zero_division=0)
    each = {f"iou/{name}": iou for k, (name, iou) in enumerate(zip(["sky", "sea", "2", "3"], each, strict=True))
            if k not in missing}  # fmt: skip
    assert found == pytest.approx(
        {"loss": 0.5, "miou": sklearn.jaccard_score(labels[seen], chosen[seen], average="macro")} | each
    )
    assert summarize({"loss": (1.0, 2.0), "confusion": (0 * whole, 0)}) == {"loss": 0.5}, "nothing seen has no IoU"


@pytest.fixture(scope="module")
def unet():
    """A tiny U-Net with its task, parameters and a batch."""
    config = UNetConfig((8, 8, 3), CLASSES, (4, 6))
    data = Stdlib(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), batch_size=4)
    task = tasks.build(Segmentation(), config, data)
    rng = np.random.default_rng(0)
    labels = rng.integers(-1, CLASSES, (4, 8, 8)).astype(np.int16)
    batch = {"inputs": rng.integers(0, 256, (4, 8, 8, 3), np.uint8), "labels": labels}
    return task, jit(task.init)(jax.random.key(1)), batch


def test_the_loss_is_the_mean_cross_entropy_of_the_pixels_that_count(unet):
    task, params, batch = unet
    weight = np.array([1, 1, 0, 1], np.float32)
    total, aux = jit(task.losses[0].fn)(params, task.stats(), {**batch, "weight": weight}, jax.random.key(0))
    images = (batch["inputs"] / 255 - np.array([0.5, 0.4, 0.3])) / np.array([0.2, 0.3, 0.4])
    model = task.networks["model"]
    logits, _ = jit(functools.partial(model.apply, train=True))(
        params["model"], images.astype(np.float32), stats=task.stats()["model"]
    )
    logits = np.asarray(logits, np.float64)
    likely = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    seen = (batch["labels"] >= 0) & (weight > 0)[:, None, None]
    picked = np.take_along_axis(likely, np.maximum(batch["labels"], 0)[..., None].astype(int), -1)[..., 0]
    assert int(aux.weight) == seen.sum() and float(total) == pytest.approx(-picked[seen].sum(), rel=1e-5)


def test_logits_of_fewer_pixels_are_enlarged_between_their_centers():
    ramp = np.arange(4, dtype=np.float32).reshape(1, 2, 2, 1)
    found = np.asarray(jit(functools.partial(resized, size=(4, 4)))(ramp))[0, ..., 0]
    across = np.interp((np.arange(4) + 0.5) / 2 - 0.5, [0, 1], [0, 1])  # outside of the centers, the nearest
    assert np.allclose(found, 2 * across[:, None] + across)
    shares = np.zeros((2, 2, 3), np.float32)
    shares[0, :, 1], shares[1, :, 2] = 1, 1
    assert likeliest(shares, (5, 6)).tolist() == [[1] * 5] * 3 + [[2] * 5] * 3


def test_what_is_no_model_of_pixels_is_refused():
    for model, said in (
        (MLPConfig((5,), 3), "expected a model of images and classes, try --model unet"),
        (CNNConfig((8, 8, 3), 3, (4,)), r"expected logits of each pixel, \(1, height, width, 3\)"),
        (UNetConfig((8, 8, 3), 256, (4,)), "with 1 values ignored, expected at most 255"),
    ):
        with pytest.raises(UserError, match=said):
            task = tasks.build(Segmentation(ignored=(255,)), model, Stdlib())
            params = jax.eval_shape(task.init, jax.random.key(0))
            jax.eval_shape(task.metrics, params, task.stats(), task.batch_spec(1))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that finds bright rectangles (7) in dark photographs (3), of which the rim (9) does not count."""
    root = tmp_path_factory.mktemp("segmentation")
    rng = np.random.default_rng(0)
    rows = []
    for i in range(40):
        image = rng.integers(0, 90, (20, 24, 3)).astype(np.uint8)
        mask = np.full((20, 24), 3, np.uint8)
        (y, x), (h, w) = rng.integers(1, 8, 2), rng.integers(7, 11, 2)
        mask[y - 1 : y + h + 1, x - 1 : x + w + 1] = 9
        mask[y : y + h, x : x + w] = 7
        image[mask == 7] += 150
        for name, array in (("photo", image), ("mask", mask)):
            Image.fromarray(array).save(root / f"{name}{i}.png")
        rows.append({"photo": f"photo{i}.png", "mask": f"mask{i}.png", "part": "validation" if i > 31 else "train"})
    (root / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = Config(
        model=UNetConfig((16, 16, 3), 2, (6, 8)),
        task=Segmentation(ignored=(0, 1, 2, 4, 5, 6, 9)),
        data=Table(
            path=(str(root / "index.jsonl"),), files=("photo",), masks=("mask",), split_field="part",
            class_names=("ground", "lamp"), batch_size=8,
        ),
        augment=Augment(crop=0.7, flip=True),
        optim=AdamW(peak_lr=2e-2, warmup_steps=5),
        train=Train(steps=80),
        eval=Eval(every=80, batch_size=8, metric="eval/miou", mode="max"),
        metrics=Metrics(every=80, progress="none", loggers=()),
    )  # fmt: skip
    train(cfg, root / "run")
    return root


def test_a_run_learns_to_tell_pixels_apart(run):
    found = jaxmodels.load_run(run / "run").metrics[-1]
    assert found["eval/miou"] > 0.85 and found["eval/accuracy"] > 0.9
    assert found["eval/miou"] == pytest.approx((found["eval/iou/ground"] + found["eval/iou/lamp"]) / 2)


def test_predicted_masks_are_of_the_images_own_size_and_of_the_values_of_the_data(run, capsys):
    photos = [str(run / f"photo{i}.png") for i in (33, 34)]
    (run / "other").mkdir(exist_ok=True)
    Image.open(photos[0]).resize((50, 30)).save(run / "other" / "photo33.png")
    out = run / "masks"
    assert main(["predict", str(run / "run"), *photos, str(run / "other"), "--out", str(out)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["mask"] for line in lines] == [f"{out}/{name}.png" for name in ("photo33", "photo34", "photo33-2")]
    for line, size in zip(lines, [(24, 20), (24, 20), (50, 30)], strict=True):
        image = Image.open(line["mask"])
        assert image.size == size and image.mode == "P"
        mask = decode_mask((out / line["mask"]).read_bytes())
        assert set(np.unique(mask)) == {3, 7}
        assert line["shares"] == pytest.approx({"ground": (mask == 3).mean(), "lamp": (mask == 7).mean()}, abs=1e-6)
    truth = np.array(Image.open(run / "mask33.png"))
    mask = np.array(Image.open(lines[0]["mask"]))
    assert (mask == truth)[truth != 9].mean() > 0.9
    assert main(["predict", str(run / "run"), photos[0]]) == 2
    assert "got no --out for a run of segmentation" in capsys.readouterr().err


def test_the_report_shows_the_best_and_the_worst_masks(run):
    evaluation = jaxmodels.load_run(run / "run").evaluation()
    ious, chosen = masks.scores(evaluation)
    labels = evaluation.examples(0, 8)["labels"]
    expected = [
        sklearn.jaccard_score(x[x >= 0], c[x >= 0], average="macro") for x, c in zip(labels, chosen, strict=True)
    ]
    assert ious == pytest.approx(np.array(expected))
    (best,) = masks.pieces(evaluation)
    assert best.name == "best" and "ground blue, lamp orange" in best.caption
    assert Image.open(io.BytesIO(best.png())).size[0] > 400
    image = np.full((2, 2, 3), 0.5, np.float32)
    laid = masks.over(image, np.array([[0, 1], [-1, -1]]))
    assert np.allclose(laid[1], 0.5) and not np.allclose(laid[0, 0], laid[0, 1])


def test_masks_of_rows_of_a_table_have_the_number_of_their_row(tmp_path):
    folder, mask = Folder(tmp_path / "out"), np.zeros((2, 3), np.uint8)
    kept = [folder.keep({"where": f"a/photos.parquet:{row}", "mask": mask})["mask"] for row in (1, 2)]
    assert kept == [str(tmp_path / "out" / f"photos-{row}.png") for row in (1, 2)]
    assert folder.keep({"where": "x", "error": "is empty"}) == {"where": "x", "error": "is empty"}


@pytest.mark.parametrize("names", [("a",), ("a", "b", "c")])
def test_names_of_more_or_fewer_classes_than_the_model_has_are_refused(run, names):
    cfg = jaxmodels.load_run(run / "run").config
    more = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, class_names=names))
    with pytest.raises(UserError, match=f"got {len(names)} names of classes for a model of 2 classes"):
        jaxmodels.data.open_for(more, "train")
