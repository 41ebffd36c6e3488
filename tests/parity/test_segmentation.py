"""U-Net equals a plain torch script: logits, gradients, statistics; and has the published numbers of parameters."""

import functools

import jax
import numpy as np
import pytest

import jaxmodels
from jaxmodels.models.unet import UNetConfig

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="needs the parity extra: torch")

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
    """Of milesial/Pytorch-UNet and of mateuszbuda/brain-segmentation-pytorch."""
    assert jaxmodels.create("unet-64").count() == 31_037_698
    assert jaxmodels.create("unet-32", classes=1).count() == 7_763_041
