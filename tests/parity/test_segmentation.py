"""U-Net equals a plain torch script, SegFormer transformers': logits, gradients, statistics, numbers of parameters."""

import functools

import jax
import numpy as np
import pytest

import jaxmodels
from jaxmodels import tasks
from jaxmodels.config import Segmentation, Stdlib
from jaxmodels.hf.save import save_pretrained
from jaxmodels.models.unet import UNetConfig

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="needs the parity extra: torch")
transformers = pytest.importorskip("transformers", reason="needs the parity extra: transformers")

# at these shapes LLVM's optimizations take longer than all else
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
UNET = UNetConfig((12, 8, 2), 5, (4, 6, 7))


class UNet(torch.nn.Module):
    """The network of Ronneberger et al. 2015, figure 1, with padding and batch normalization."""

    def __init__(self, config):
        super().__init__()
        nn, widths = torch.nn, config.widths

        def double(inputs, outputs):
            convolution = functools.partial(nn.Conv2d, kernel_size=3, padding=1, bias=False)
            return nn.ModuleDict(
                {"conv0": convolution(inputs, outputs), "norm0": nn.BatchNorm2d(outputs),
                 "conv1": convolution(outputs, outputs), "norm1": nn.BatchNorm2d(outputs)}
            )  # fmt: skip

        before = config.input_shape[-1]
        for i, width in enumerate(widths):
            self.add_module(f"down{i}", double(before, width))
            before = width
        for i, width in enumerate(widths[:-1]):
            self.add_module(f"grow{i}", nn.ConvTranspose2d(widths[i + 1], width, 2, stride=2))
            self.add_module(f"up{i}", double(2 * width, width))
        self.head = nn.Conv2d(widths[0], config.classes, 1)
        self.depth = len(widths)

    def forward(self, x):
        def twice(layers, x):
            x = layers["norm0"](layers["conv0"](x)).relu()
            return layers["norm1"](layers["conv1"](x)).relu()

        kept = []
        for i in range(self.depth):
            x = twice(getattr(self, f"down{i}"), torch.nn.functional.max_pool2d(x, 2) if i else x)
            kept.append(x)
        for i in reversed(range(self.depth - 1)):
            x = twice(getattr(self, f"up{i}"), torch.cat([kept[i], getattr(self, f"grow{i}")(x)], 1))
        return self.head(x)


def put(tree, path, value):
    *parents, last = path.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[last] = value


def ours(reference, of=lambda p: p):
    """Parameters of the reference, or `of` them, and its statistics, in our trees."""
    params, stats = {}, {}
    for name, layer in reference.named_modules():
        path, array = name.replace(".", "/"), lambda x: np.array(x.detach().numpy())
        if isinstance(layer, torch.nn.BatchNorm2d):
            put(params, path, {"scale": array(of(layer.weight)), "bias": array(of(layer.bias))})
            put(stats, path, {"mean": array(layer.running_mean), "var": array(layer.running_var)})
        elif isinstance(layer, torch.nn.ConvTranspose2d):
            put(params, path + "/w", array(of(layer.weight)).transpose(2, 3, 0, 1))
        elif isinstance(layer, torch.nn.Conv2d):
            w = array(of(layer.weight)).transpose(2, 3, 1, 0)
            put(params, path + "/w", w[0, 0] if path == "head" else w)
        if getattr(layer, "bias", None) is not None and not isinstance(layer, torch.nn.BatchNorm2d):
            put(params, path + "/b", array(of(layer.bias)))
    return params, stats


@pytest.fixture(scope="module")
def reference():
    torch.manual_seed(0)
    model = UNet(UNET)
    for name, p in [*model.named_parameters(), *model.named_buffers()]:
        if not name.endswith("num_batches_tracked"):
            norm = p.ndim == 1 and name.endswith(("weight", "var"))
            p.data = 1 + 0.3 * torch.rand_like(p) if norm else torch.randn_like(p) * (p[0].numel() or 1) ** -0.5
    return model


def test_unet_has_the_references_logits_gradients_and_statistics(reference):
    model = jaxmodels.create(UNET)
    params, stats = ours(reference)
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, model.shapes())
    images = np.random.default_rng(0).normal(0.5, 1, (3, *UNET.input_shape)).astype(np.float32)
    given = torch.from_numpy(images).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = reference.eval()(given).permute(0, 2, 3, 1).numpy()
    found, _ = jit(model.apply)(params, images, stats=stats)
    assert expected.std() > 0.1, "a signal arrives"
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)

    @jit
    def compute(params):
        def loss(params):
            logits, new = model.apply(params, images, stats=stats, train=True)
            return (logits**2).mean(), new

        return jax.grad(loss, has_aux=True)(params)

    grads, stats_after = compute(params)
    (reference.train()(given) ** 2).mean().backward()
    their_grads, their_stats = ours(reference, lambda p: p.grad)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), stats_after, their_stats)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), grads, their_grads)


def test_unet_has_the_published_numbers_of_parameters():
    """31 million of the channels of the paper; half of them 7.76 million (Zhou et al. 2018, table 2)."""
    assert jaxmodels.create("unet-64").count() == 31_037_698
    assert jaxmodels.create("unet-32", classes=1).count() == 7_763_041


@pytest.fixture(scope="module")
def segformer(tmp_path_factory):
    """Transformers' model with random weights, and the directory that it is saved in."""
    torch.manual_seed(0)
    model = transformers.SegformerForSemanticSegmentation(
        transformers.SegformerConfig(
            hidden_sizes=[8, 12, 16], depths=[2, 1, 1], num_attention_heads=[1, 2, 4], sr_ratios=[4, 2, 1],
            patch_sizes=[7, 3, 3], strides=[4, 2, 2], mlp_ratios=[2, 2, 2], num_encoder_blocks=3,
            decoder_hidden_size=10, num_labels=5, drop_path_rate=0.0, classifier_dropout_prob=0.0, image_size=[64, 32],
        )
    ).eval()  # fmt: skip
    for name, p in [*model.named_parameters(), *model.named_buffers()]:
        if not name.endswith("num_batches_tracked"):
            p.data = (
                1 + 0.3 * torch.rand_like(p)
                if "norm" in name and name.endswith(("weight", "var"))
                else (torch.randn_like(p) * (p[0].numel() or 1) ** -0.5)
            )
    directory = tmp_path_factory.mktemp("segformer")
    model.save_pretrained(directory)
    return model, directory


def test_segformer_has_transformers_logits_loss_and_weights_both_ways(segformer, tmp_path):
    reference, directory = segformer
    model, params = jaxmodels.load_pretrained(directory)
    rng = np.random.default_rng(0)
    images = rng.normal(0.5, 1, (2, 64, 32, 3)).astype(np.float32)
    labels = rng.integers(-1, 5, (2, 64, 32)).astype(np.int16)
    given = torch.from_numpy(images).permute(0, 3, 1, 2)
    with torch.no_grad():
        theirs = torch.from_numpy(np.where(labels < 0, 255, labels).astype(int))
        expected = reference(given, labels=theirs)
    logits, _ = jit(model.apply)(params, images, stats=model.stats())
    assert float(expected.logits.std()) > 0.1, "a signal arrives"
    np.testing.assert_allclose(logits, expected.logits.permute(0, 2, 3, 1).numpy(), rtol=0, atol=1e-4)
    task = tasks.build(Segmentation(), model.config, Stdlib())
    total, count = jit(task.metrics)({"model": params}, {"model": model.stats()}, {"inputs": images, "labels": labels})[
        "loss"
    ]
    assert float(total) / float(count) == pytest.approx(float(expected.loss), rel=1e-4)
    save_pretrained(tmp_path, model, params)
    again = transformers.SegformerForSemanticSegmentation.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(given).logits, expected.logits)


def test_segformer_has_the_published_numbers_of_parameters():
    """Xie et al. 2021, tables 1 and 6: 3.8, 13.7, 27.5, 47.3, 64.1 and 84.7 million; of B0 transformers' own."""
    published = [3.8, 13.7, 27.5, 47.3, 64.1, 84.7]
    counts = [jaxmodels.create(f"segformer-b{i}").count() for i in range(6)]
    assert [round(count / 1e6, 1) for count in counts] == published and counts[0] == 3_752_694
