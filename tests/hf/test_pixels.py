"""What a published model of images says of its pixels and classes reaches a run, and leaves it again."""

import json
import math

import numpy as np
import pytest
from PIL import Image

import jaxmodels
from jaxmodels import cli
from jaxmodels import config as configs
from jaxmodels.config import Augment, Classification, Config, Images, Stdlib
from jaxmodels.errors import UserError
from jaxmodels.hf import pixels
from jaxmodels.models.vit import ViTConfig
from jaxmodels.train.beginning import compare_pixels
from tests.hf.small import change, saved

SHAPE = (8, 8, 3)
VIT = ViTConfig(SHAPE, 4, classes=3, layers=1, heads=2, width=8, mlp_width=8)
NAMES = ("cat", "dog", "fox, red")


def write(folder, **settings):
    (folder / pixels.FILE).write_text(json.dumps(settings))


@pytest.fixture
def given(tmp_path):
    folder = tmp_path / "given"
    saved(VIT, folder)
    change(folder, id2label=dict(enumerate(NAMES)), label2id={name: i for i, name in enumerate(NAMES)})
    write(folder, size={"height": 8, "width": 8}, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6], resample=2)
    return folder


def test_an_import_takes_normalization_and_names_and_predicts_with_them(given, tmp_path, capsys):
    run, image = tmp_path / "run", tmp_path / "x.png"
    assert cli.main(["import", str(given), "--out", str(run)]) == 0
    section = configs.read(run)[0].data
    assert (section.mean, section.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    bytes_ = np.random.default_rng(0).integers(0, 256, SHAPE, np.uint8)
    Image.fromarray(bytes_).save(image)
    capsys.readouterr()
    assert cli.main(["predict", str(run), str(image)]) == 0
    answer = json.loads(capsys.readouterr().out)
    model, params = jaxmodels.load_pretrained(given)
    x = (bytes_[None] / 255 - np.array([0.1, 0.2, 0.3])) / np.array([0.4, 0.5, 0.6])
    logits = np.asarray(model.apply(params, x.astype(np.float32)))[0].astype(np.float64)
    shares = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    assert answer["label"] == NAMES[shares.argmax()]
    assert list(answer["probabilities"]) == list(NAMES)
    np.testing.assert_allclose(list(answer["probabilities"].values()), shares, atol=1e-4)
    assert cli.main(["export", str(run), str(tmp_path / "out")]) == 0
    for name in (pixels.FILE, "config.json"):
        assert json.loads((tmp_path / "out" / name).read_text()) == json.loads((given / name).read_text())


@pytest.mark.parametrize(
    "family, mean",
    [
        ("vit", (0.5,) * 3),
        ("resnet", (0.5,) * 3),
        ("clip", (0.48145466, 0.4578275, 0.40821073)),
        ("segformer", (0.485, 0.456, 0.406)),
    ],
)
def test_without_a_file_the_defaults_of_transformers_hold_and_are_said(family, mean, tmp_path):
    found = pixels.read(tmp_path, family, SHAPE)
    assert found.mean == mean
    assert "no preprocessor_config.json" in found.remarks[0]
    assert found.central == (family == "resnet")


@pytest.mark.parametrize(
    "settings, mean, std",
    [
        ({"do_normalize": False}, (), ()),
        ({"do_normalize": False, "do_rescale": False}, (0.0,), (1 / 255,)),
        ({"do_rescale": False, "image_mean": [127.5], "image_std": [51]}, (0.5,), (0.2,)),
        ({"rescale_factor": 1 / 127.5, "image_mean": 1.0, "image_std": 1.0}, (0.5,), (0.5,)),
        ({"rescale_factor": 0.00392156862745098, "image_mean": 0.25, "image_std": 1.0}, (0.25,), (1.0,)),
    ],
)
def test_any_rescale_is_part_of_mean_and_std(settings, mean, std, tmp_path):
    write(tmp_path, **{"size": 8, "resample": 2, **settings})
    found = pixels.read(tmp_path, "vit", SHAPE)
    np.testing.assert_allclose(found.mean, mean)
    np.testing.assert_allclose(found.std, std)


def test_what_stands_in_the_file_of_a_whole_processor_counts_and_is_written_anew_where_it_is_no_longer_so(
    given, tmp_path
):
    """As transformers has it since version 5, which no longer writes a file of the images alone."""
    inner = json.loads((given / pixels.FILE).read_text())
    write(given, **{**inner, "image_mean": [0.9, 0.9, 0.9]})  # of before
    whole = given / "processor_config.json"
    whole.write_text(json.dumps({"image_processor": inner, "processor_class": "X"}))
    assert cli.main(["import", str(given), "--out", str(tmp_path / "run")]) == 0
    assert configs.read(tmp_path / "run")[0].data.mean == (0.1, 0.2, 0.3)
    assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "same")]) == 0
    assert (tmp_path / "same" / whole.name).read_bytes() == whole.read_bytes()
    saved = tmp_path / "run" / "config.json"
    saved.write_text(saved.read_text().replace("0.1,", "0.7,"))
    assert configs.read(tmp_path / "run")[0].data.mean == (0.7, 0.2, 0.3)
    assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "other")]) == 0
    assert pixels.read(tmp_path / "other", "vit", SHAPE).mean == (0.7, 0.2, 0.3)
    assert json.loads((tmp_path / "other" / whole.name).read_text()) == {"processor_class": "X"}


def test_the_central_crop_of_7_8_is_that_of_evaluation(tmp_path):
    write(tmp_path, size=224, crop_pct=0.875, resample=2)
    assert pixels.read(tmp_path, "resnet", (224, 224, 3)) == pixels.Pixels((0.5,) * 3, (0.5,) * 3, True)
    write(tmp_path, size={"shortest_edge": 256}, crop_size=224, resample=2)
    assert pixels.read(tmp_path, "clip", (224, 224, 3)).central


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"size": 8, "resample": 3}, "resample 3"),
        ({"size": 16, "resample": 2}, "size 16"),
        ({"size": 8, "resample": 2, "do_resize": False}, "do_resize false"),
    ],
)
def test_what_is_done_otherwise_here_is_named(settings, said, tmp_path):
    write(tmp_path, **settings)
    (remark,) = pixels.read(tmp_path, "vit", SHAPE).remarks
    assert said in remark


@pytest.mark.parametrize("settings", [{"image_mean": [0.5, 0.5]}, {"image_std": 0}, {"image_mean": "x"}])
def test_numbers_that_are_none_are_refused(settings, tmp_path):
    write(tmp_path, size=8, **settings)
    with pytest.raises(UserError, match=f"{pixels.FILE} with {next(iter(settings))}"):
        pixels.read(tmp_path, "vit", SHAPE)


def test_a_start_with_pixels_of_another_scale_is_said(given, caplog):
    other = Config(model=VIT, task=Classification(), data=Images())
    compare_pixels(other, given)
    assert "--data.mean 0.1 0.2 0.3 --data.std 0.4 0.5 0.6" in caplog.text
    caplog.clear()
    same = Images(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    compare_pixels(Config(model=VIT, task=other.task, data=same), given)
    assert not caplog.text


def test_a_description_is_read_as_it_was(tmp_path):
    section = Stdlib(mean=(0.5,), std=(0.25,))
    for crop in (None, 0.3):
        cfg = Config(model=VIT, data=section, augment=Augment(crop=crop))
        write(tmp_path, **pixels.describe(cfg, (224, 224, 3)))
        found = pixels.read(tmp_path, "clip" if crop else "vit", (224, 224, 3))
        assert pixels.alike(found, cfg)
        assert found.central == (crop is not None)
        assert not found.remarks
    assert math.isclose(json.loads((tmp_path / pixels.FILE).read_text())["rescale_factor"], 1 / 255)
