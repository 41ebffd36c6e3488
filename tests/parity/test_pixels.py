"""An exported classifier of images gives transformers' pipeline the labels and probabilities that `predict` gives."""

import json

import numpy as np
import pytest
from PIL import Image

from jaxmodels import cli
from jaxmodels.models.resnet import ResNetConfig
from jaxmodels.models.vit import ViTConfig
from tests.hf.small import change
from tests.hf.small import saved as write

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="needs the parity extra: torch")
transformers = pytest.importorskip("transformers", reason="needs the parity extra: transformers")

NAMES = ("cat", "dog", "fox")
CASES = {
    "vit": ViTConfig((16, 16, 3), 8, classes=3, layers=1, heads=2, width=8, mlp_width=8),
    "resnet": ResNetConfig((32, 32, 3), 3, (1,), (8,), bottleneck=False, stem_width=4),
}
EXPERIMENT = """
from jaxmodels.config import Classification, Config, Images, Train
from jaxmodels.models.vit import ViTConfig

def get_config():
    return Config(
        model=ViTConfig((16, 16, 3), 8, classes=3, layers=1, heads=2, width=8, mlp_width=8),
        task=Classification(),
        data=Images(mean=(0.3,), std=(0.2,), batch_size=8, eval_fraction=0.3),
        train=Train(steps=1),
    )
"""


def theirs(folder, image):
    """Their top label and the probabilities by label."""
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    model = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        shares = model(**processor(Image.open(image), return_tensors="pt")).logits.softmax(-1)[0].numpy()
    return model.config.id2label[int(shares.argmax())], {model.config.id2label[i]: p for i, p in enumerate(shares)}


def ours(run, image, capsys):
    capsys.readouterr()
    assert cli.main(["predict", str(run), str(image)]) == 0
    answer = json.loads(capsys.readouterr().out)
    return answer["label"], answer["probabilities"]


def compare(a, b):
    assert a[0] == b[0]
    assert list(a[1]) == list(b[1])
    np.testing.assert_allclose(list(a[1].values()), list(b[1].values()), atol=1e-3)


@pytest.mark.parametrize("family", CASES)
def test_predict_equals_their_processor_and_model_before_and_after(family, tmp_path, capsys):
    given, run, out, image = (tmp_path / name for name in ("given", "run", "out", "x.png"))
    config = CASES[family]
    write(config, given)
    change(given, id2label=dict(enumerate(NAMES)), label2id={name: i for i, name in enumerate(NAMES)})
    size = config.input_shape[0]
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": size, "width": size}, "resample": 2}
    settings |= {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.25]}
    (given / "preprocessor_config.json").write_text(json.dumps(settings))
    bytes_ = np.random.default_rng(1).integers(0, 256, config.input_shape, np.uint8)
    Image.fromarray(bytes_).save(image)
    assert cli.main(["import", str(given), "--out", str(run)]) == 0
    own = ours(run, image, capsys)
    compare(own, theirs(given, image))
    assert cli.main(["export", str(run), str(out)]) == 0
    compare(own, theirs(out, image))


@pytest.mark.parametrize("settings", [{}, {"image_mean": [0.2, 0.6, 0.9], "image_std": [0.3, 0.1, 0.2]}])
def test_masks_are_those_of_their_processor_and_model_before_and_after(settings, tmp_path, capsys):
    given, run, out, image = (tmp_path / name for name in ("given", "run", "out", "x.png"))
    config = transformers.SegformerConfig(
        hidden_sizes=[8, 12], depths=[1, 1], num_attention_heads=[1, 2], sr_ratios=[2, 1], patch_sizes=[7, 3],
        strides=[4, 2], mlp_ratios=[2, 2], num_encoder_blocks=2, decoder_hidden_size=8, image_size=32, num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.SegformerForSemanticSegmentation(config)
    for p in model.parameters():
        p.data = torch.randn_like(p) * p[0].numel() ** -0.5 if p.ndim > 1 else p.data
    model.save_pretrained(given)
    if settings:
        transformers.SegformerImageProcessor(size={"height": 32, "width": 32}, **settings).save_pretrained(given)
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (32, 32, 3), np.uint8)).save(image)

    def wanted(folder):
        processor = transformers.SegformerImageProcessor(size={"height": 32, "width": 32})
        if (folder / "preprocessor_config.json").exists():
            processor = transformers.AutoImageProcessor.from_pretrained(folder)
        model = transformers.SegformerForSemanticSegmentation.from_pretrained(folder).eval()
        with torch.no_grad():
            found = model(**processor(Image.open(image), return_tensors="pt"))
        return processor.post_process_semantic_segmentation(found, [(32, 32)])[0].numpy()

    assert cli.main(["import", str(given), "--out", str(run)]) == 0
    assert cli.main(["predict", str(run), str(image), "--out", str(tmp_path / "masks")]) == 0
    mask = np.asarray(Image.open(tmp_path / "masks" / "x.png"))
    assert len(np.unique(mask)) == 3
    np.testing.assert_array_equal(mask, wanted(given))
    assert cli.main(["export", str(run), str(out)]) == 0
    np.testing.assert_array_equal(mask, wanted(out))


def test_a_run_that_was_trained_here_takes_its_pixels_and_names_along(tmp_path, capsys):
    rng = np.random.default_rng(2)
    for name in NAMES:
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(6):
            bytes_ = rng.integers(0, 256, (16, 16, 3), np.uint8)
            Image.fromarray(bytes_).save(tmp_path / "data" / name / f"{i}.png")
    run, out, image = tmp_path / "run", tmp_path / "out", tmp_path / "data" / "dog" / "0.png"
    file = tmp_path / "experiment.py"
    file.write_text(EXPERIMENT)
    args = ["train", str(file), "--data.path", str(tmp_path / "data"), "--run-dir", str(run)]
    assert cli.main(args) == 0
    assert cli.main(["export", str(run), str(out)]) == 0
    assert tuple(json.loads((out / "config.json").read_text())["id2label"].values()) == NAMES
    compare(ours(run, image, capsys), theirs(out, image))
