"""DETR and RT-DETR against transformers: outputs, weights both ways and by timm's names, the matcher and the losses."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
from scipy import optimize

import jaxmodels
from jaxmodels.config import Synthetic
from jaxmodels.hf.save import save_pretrained
from jaxmodels.models.detr import DETRConfig
from jaxmodels.models.families import create
from jaxmodels.models.resnet import halved
from jaxmodels.models.rt_detr import RTDETRConfig
from jaxmodels.tasks import boxes
from jaxmodels.tasks.set_detection import SetDetection

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="needs the parity extra: torch")
transformers = pytest.importorskip("transformers", reason="needs the parity extra: transformers")

# at these shapes LLVM's optimizations take longer than all else
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
SHAPE = (64, 96, 3)


def filled(model):
    """Random numbers in which every weight matters."""
    for name, p in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("num_batches_tracked"):
            continue
        norm = p.ndim == 1 and name.endswith(("weight", "var"))
        p.data = (
            1 + 0.3 * torch.rand_like(p) if norm else torch.randn_like(p) * (p[0].numel() if p.ndim > 1 else 9) ** -0.5
        )
    return model.eval()


@pytest.fixture(scope="module")
def detr(tmp_path_factory):
    """Transformers' model, the directory that it is saved in, and ours of it as a function of a mask."""
    torch.manual_seed(0)
    body = transformers.ResNetConfig(
        depths=[1, 2, 1, 1], hidden_sizes=[8, 12, 16, 20], embedding_size=4, out_features=["stage4"]
    )
    theirs = filled(
        transformers.DetrForObjectDetection(
            transformers.DetrConfig(
                use_timm_backbone=False, backbone_config=body, d_model=16, encoder_layers=2, decoder_layers=2,
                encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=24, decoder_ffn_dim=24,
                num_queries=7, num_labels=5,
            )
        )
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("detr")
    theirs.save_pretrained(directory)
    model, params = jaxmodels.load_pretrained(directory, input_shape=SHAPE)
    stats, images = model.stats(), np.random.default_rng(0).normal(size=(2, *SHAPE)).astype(np.float32)
    apply = jit(lambda mask: model.apply(params, images, stats=stats, pixel_mask=mask)[0])
    return theirs, directory, model, params, images, apply


def outputs(theirs, images, mask):
    with torch.no_grad():
        found = theirs(torch.from_numpy(images).permute(0, 3, 1, 2), pixel_mask=torch.from_numpy(mask))
    return np.concatenate([found.pred_boxes, found.logits], -1)


def test_boxes_and_logits_are_those_of_transformers_where_images_are_padded_too(detr):
    theirs, _, _, _, images, apply = detr
    for rows, columns in ((64, 96), (40, 70)):
        mask = np.ones((2, *SHAPE[:2]), np.int32)
        mask[1, rows:], mask[1, :, columns:] = 0, 0
        expected = outputs(theirs, images, mask)
        assert expected[..., 4:].std() > 0.1 and expected[..., :4].std() > 0.01, "a signal arrives"
        np.testing.assert_allclose(apply(mask), expected, rtol=0, atol=1e-4)


def test_weights_go_back_to_transformers(detr, tmp_path):
    theirs, _, model, params, images, _ = detr
    save_pretrained(tmp_path, model, params)
    again = transformers.DetrForObjectDetection.from_pretrained(tmp_path).eval()
    mask = np.ones((2, *SHAPE[:2]), np.int32)
    np.testing.assert_array_equal(outputs(again, images, mask), outputs(theirs, images, mask))


def timm(name):
    """timm's name of a part of a ResNet."""
    name = name.replace("embedder.embedder.convolution", "conv1").replace("embedder.embedder.normalization", "bn1")
    name = re.sub(r"encoder\.stages\.(\d)\.layers", lambda found: f"layer{int(found[1]) + 1}", name)
    parts = {"convolution": "conv", "normalization": "bn"}
    name = re.sub(r"layer\.(\d)\.(\w+ion)", lambda found: f"{parts[found[2]]}{int(found[1]) + 1}", name)
    return name.replace("shortcut.convolution", "downsample.0").replace("shortcut.normalization", "downsample.1")


def test_files_with_timms_names_as_published_are_read(detr, tmp_path):
    """The ResNet-50 of facebook/detr-resnet-50 by its names; config.json there has no backbone_config."""
    from safetensors.numpy import load_file, save_file

    from jaxmodels.hf import detr as table
    from jaxmodels.hf import load
    from jaxmodels.hf.table import Settings

    published = {"model_type": "detr", "backbone": "resnet50", "use_timm_backbone": True, "backbone_config": None}
    c = table.config(Settings({**published, "num_queries": 100, "id2label": {str(i): "N/A" for i in range(91)}}, "x"))
    assert c == dataclasses.replace(DETRConfig(), classes=91) and create(c).count() == 41_524_768
    _, directory, model, _, _, _ = detr
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    tensors = load_file(directory / "model.safetensors")
    renamed = {timm(name): x for name, x in tensors.items()}
    assert "model.backbone.conv_encoder.model.layer2.0.downsample.1.running_var" in renamed
    assert "model.backbone.conv_encoder.model.layer1.0.bn3.weight" in renamed
    save_file(renamed, tmp_path / "model.safetensors")
    found = load.open_source(tmp_path).found
    assert sorted(found) == sorted(load.open_source(directory).found) and len(found) == len(tensors)
    assert model.config.depths == (1, 2, 1, 1)


def test_parameters_are_as_many_as_published():
    """41.5 million (Carion et al. 2020, table 1 says 41); transformers' on its meta device, without those frozen."""
    body = transformers.ResNetConfig(out_features=["stage4"])
    config = transformers.DetrConfig(use_timm_backbone=False, backbone_config=body, num_labels=91)
    with torch.device("meta"):
        expected = sum(p.numel() for p in transformers.DetrForObjectDetection(config).parameters())
    assert jaxmodels.create("detr-resnet-50").count() == expected == 41_524_768


def test_pairs_are_those_of_scipy():
    rng = np.random.default_rng(0)
    costs, real = rng.normal(size=(6, 12, 9)).astype(np.float32), rng.random((6, 9)) < 0.6
    real[0], real[1], costs[2, 3] = True, False, np.nan
    found = jax.jit(jax.vmap(boxes.pairs))(costs, real)
    for cost, there, own in zip(np.where(np.isnan(costs), 1e9, costs), real, np.asarray(found), strict=True):
        rows, columns = optimize.linear_sum_assignment(cost[:, there])
        np.testing.assert_array_equal(own[there][columns], rows)
        assert (own[~there] == len(cost)).all(), "an object that is not there has no query"


G, C, Q, B, L = 8, 5, 12, 3, 3


@pytest.fixture(scope="module")
def batch():
    """Outputs of three blocks, and objects; the last image has none."""
    rng = np.random.default_rng(1)
    outputs = rng.normal(size=(L, B, Q, 4 + C + 1)).astype(np.float32)
    outputs[..., :4] = 1 / (1 + np.exp(-outputs[..., :4]))
    labels = rng.integers(0, C, (B, G)).astype(np.int32)
    labels[0, 3:], labels[2] = -1, -1
    where = np.concatenate([rng.random((B, G, 2)) * [60, 40], rng.random((B, G, 2)) * [30, 20] + 4], -1)
    images = np.broadcast_to(np.arange(B, dtype=np.float32)[:, None, None, None], (B, *SHAPE))
    return outputs, {"inputs": images, "boxes": where.astype(np.float32), "classes": labels}


def task(config, **fields):
    """The task, of a model that gives its parameters as outputs, and takes an image's first pixel for their row."""

    def apply(params, images, *, every, stats=None, train=False, rng=None):
        found = params["outputs"][:, images[:, 0, 0, 0].astype(int)]
        return found if every else found[-1]

    model = dataclasses.replace(create(config), apply=apply, stats=dict)
    return SetDetection(objects=G, **fields).build(model, Synthetic())


def targets(batch):
    """Objects as transformers takes them: centers and sizes as shares of the image."""
    found = []
    for where, labels in zip(batch["boxes"], batch["classes"], strict=True):
        own = where[labels >= 0]
        own = np.concatenate([own[:, :2] + own[:, 2:] / 2, own[:, 2:]], -1) / np.tile(SHAPE[1::-1], 2)
        found.append({"class_labels": torch.from_numpy(labels[labels >= 0]).long(), "boxes": torch.Tensor(own)})
    return found


def test_loss_and_gradient_are_those_of_transformers_of_every_block(batch):
    from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss

    outputs, examples = batch
    config = transformers.DetrConfig(num_labels=C, decoder_layers=L, auxiliary_loss=True)
    theirs = torch.from_numpy(outputs).requires_grad_()
    last, each = (theirs[-1][..., 4:], theirs[-1][..., :4]), (theirs[..., 4:], theirs[..., :4])
    expected, parts, _ = ForObjectDetectionLoss(last[0], targets(examples), "cpu", last[1], config, *each)
    expected.backward()
    built = task(DETRConfig(SHAPE, C, Q, depths=(1,), widths=(8,), decoder_layers=L))

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(params):
        total, aux = built.losses[0].fn({"model": params}, {}, examples, jax.random.key(0))
        return total / aux.weight, aux

    (found, aux), gradient = loss({"outputs": outputs})
    np.testing.assert_allclose(found, expected.item(), rtol=1e-5)
    np.testing.assert_allclose(gradient["outputs"], theirs.grad, rtol=0, atol=1e-5)
    for ours, name in (("class_loss", "loss_ce"), ("box_loss", "loss_bbox"), ("giou_loss", "loss_giou")):
        total, count = aux.sums[ours]
        np.testing.assert_allclose(total / count, parts[name].item(), rtol=1e-5)


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_rt_detr_is_that_of_transformers_and_its_weights_go_back(kind, tmp_path):
    torch.manual_seed(1)
    body = transformers.RTDetrResNetConfig(
        depths=[1, 2, 1, 1], hidden_sizes=[8, 12, 16, 20], embedding_size=8, layer_type=kind,
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    theirs = filled(
        transformers.RTDetrForObjectDetection(
            transformers.RTDetrConfig(
                backbone_config=body, encoder_in_channels=[12, 16, 20], decoder_in_channels=[16] * 3, d_model=16,
                encoder_hidden_dim=16, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
                encoder_ffn_dim=24, decoder_ffn_dim=24, decoder_n_points=3, num_queries=9, num_labels=5,
                hidden_expansion=0.5 if kind == "basic" else 1.0, num_denoising=0 if kind == "basic" else 10,
            )
        )
    )  # fmt: skip
    theirs.save_pretrained(tmp_path / "theirs")
    model, params = jaxmodels.load_pretrained(tmp_path / "theirs", input_shape=SHAPE)
    images = np.random.default_rng(2).normal(size=(2, *SHAPE)).astype(np.float32)

    def run(model):
        with torch.no_grad():
            found = model(torch.from_numpy(images).permute(0, 3, 1, 2))
        return np.concatenate([found.pred_boxes, found.logits], -1)

    expected, found = run(theirs), jit(model.apply)(params, images, stats=model.stats())[0]
    assert expected[..., 4:].std() > 0.1 and expected[..., :2].std() > 0.05, "a signal arrives"
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    (tmp_path / "ours").mkdir()
    save_pretrained(tmp_path / "ours", model, params)
    again = transformers.RTDetrForObjectDetection.from_pretrained(tmp_path / "ours").eval()
    np.testing.assert_array_equal(run(again), expected)


def test_rt_detr_has_the_published_numbers_of_parameters():
    """20 and 42 million (Zhao et al. 2023, table 2); to the last one those of transformers, without denoising."""
    assert jaxmodels.create("rt-detr-r18").count() == 20_153_872
    assert jaxmodels.create("rt-detr-r50").count() == 42_870_636


def test_loss_and_gradient_of_a_model_of_probabilities_are_those_of_transformers(batch):
    from transformers.loss.loss_rt_detr import RTDetrForObjectDetectionLoss

    outputs, examples = batch
    outputs = outputs[..., :-1]
    theirs = torch.from_numpy(outputs).requires_grad_()
    logits, told = theirs[..., 4:], theirs[..., :4]
    config = transformers.RTDetrConfig(num_labels=C)
    config.eos_coefficient = 0.1
    each = (logits[1:].transpose(0, 1), told[1:].transpose(0, 1))
    first = {"enc_topk_logits": logits[0], "enc_topk_bboxes": told[0]}
    expected, _, _ = RTDetrForObjectDetectionLoss(
        logits[-1], targets(examples), "cpu", told[-1], config, *each, **first
    )
    expected.backward()
    built = task(RTDETRConfig(SHAPE, C, Q, decoder_layers=L - 1))

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        total, aux = built.losses[0].fn({"model": params}, {}, examples, jax.random.key(0))
        return total / aux.weight

    found, gradient = loss({"outputs": outputs})
    np.testing.assert_allclose(found, expected.item(), rtol=1e-5)
    np.testing.assert_allclose(gradient["outputs"], theirs.grad, rtol=0, atol=1e-5)


def test_a_shortcut_of_resnet_d_averages_an_odd_side_as_torch_does():
    x = np.random.default_rng(0).normal(size=(2, 5, 4, 3)).astype(np.float32)
    pool = torch.nn.AvgPool2d(2, 2, ceil_mode=True)
    expected = pool(torch.from_numpy(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    np.testing.assert_allclose(halved(x), expected, atol=1e-6)
