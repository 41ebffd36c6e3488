"""ResNet equals transformers'; VGG and the small CNN equal torch scripts: logits, gradients, batch statistics."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmodels
from jaxmodels.models.cnn import CNNConfig
from jaxmodels.models.resnet import ResNetConfig
from jaxmodels.models.vgg import VGGConfig

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="needs the parity extra: torch")
transformers = pytest.importorskip("transformers", reason="needs the parity extra: transformers")

# at these shapes LLVM's optimizations take longer than all else
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
B, CLASSES = 4, 7
BASIC = ResNetConfig((32, 32, 3), CLASSES, (1, 2), (9, 14), bottleneck=False, stem_width=9)
VGG = VGGConfig((12, 9, 3), CLASSES, (1, 2), (5, 6), (11, 8), batch_norm=True, dropout=0.0)
CNN = CNNConfig((14, 11, 1), CLASSES, (5, 6), (9,))
CASES = {
    "resnet-basic": BASIC,
    # the first shortcut is a convolution although it has no stride; sizes and widths that no power of 2 divides
    "resnet-bottleneck-odd": ResNetConfig((37, 30, 2), CLASSES, (2, 1), (13, 22), stem_width=5),
    "vgg-bn": VGG,
    "vgg": dataclasses.replace(VGG, input_shape=(8, 8, 1), batch_norm=False, hidden=(9,)),
    "cnn": CNN,
}


def script(config):
    """A VGG or a small CNN in torch: a list of layers, and names of ours for those with weights."""
    nn, (height, width, channels) = torch.nn, config.input_shape
    modules, names = [], []

    def add(module, name=None):
        modules.append(module)
        names.append(name)

    small = isinstance(config, CNNConfig)
    depths = (1,) * len(config.widths) if small else config.depths
    for stage, (depth, features) in enumerate(zip(depths, config.widths, strict=True)):
        for i in range(depth):
            path = f"conv{stage}" if small else f"stages/{stage}/{i}/conv"
            add(nn.Conv2d(channels, features, 3, padding=1), path)
            if not small and config.batch_norm:
                add(nn.BatchNorm2d(features), f"stages/{stage}/{i}/norm")
            add(nn.ReLU())
            channels = features
        add(nn.MaxPool2d(2, 2))
        height, width = height // 2, width // 2
    add(nn.Flatten())
    count = channels * height * width
    for i, features in enumerate(config.hidden):
        add(nn.Linear(count, features), f"hidden{i}")
        add(nn.ReLU())
        count = features
    add(nn.Linear(count, config.classes), "head")
    return torch.nn.Sequential(*modules), {str(i): name for i, name in enumerate(names) if name}


def theirs(config):
    """The reference with random weights and statistics, and our path of each of its layers."""
    torch.manual_seed(0)
    if isinstance(config, ResNetConfig):
        model = transformers.ResNetForImageClassification(
            transformers.ResNetConfig(
                num_channels=config.input_shape[-1],
                embedding_size=config.stem_width,
                hidden_sizes=list(config.widths),
                depths=list(config.depths),
                layer_type="bottleneck" if config.bottleneck else "basic",
                num_labels=config.classes,
            )
        )
        names = {}
        for name, _ in model.named_modules():
            path = name.replace("resnet.embedder.embedder", "stem").replace("resnet.encoder.stages", "stages")
            path = path.replace(".layers.", ".").replace(".layer.", ".unit").replace("classifier.1", "head")
            names[name] = path.replace("convolution", "conv").replace("normalization", "norm").replace(".", "/")
    else:
        model, names = script(config)
    for name, p in [*model.named_parameters(), *model.named_buffers()]:
        if not name.endswith("num_batches_tracked"):
            norm = p.ndim == 1 and name.endswith(("weight", "var"))
            p.data = 1 + 0.3 * torch.rand_like(p) if norm else torch.randn_like(p) * (p[0].numel() or 1) ** -0.5
    return model, names


def put(tree, path, value):
    *parents, last = path.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[last] = value


def array(x):
    return np.array(x.detach().numpy())


def convert(config, path, w):
    """A weight of a torch layer, or its gradient, as ours."""
    if w.ndim == 4:
        return w.transpose(2, 3, 1, 0)
    if path == "hidden0":  # the first after the flattening, which torch does in the order C, H, W
        height, width = (n // 2 ** len(config.widths) for n in config.input_shape[:2])
        return w.reshape(len(w), -1, height, width).transpose(2, 3, 1, 0).reshape(-1, len(w))
    return w.T


def ours(config, model, names, of=lambda p: p):
    """Parameters (or `of` them, as their gradients) and statistics of a reference in our trees."""
    params, stats = {}, {}
    for name, layer in model.named_modules():
        path = names.get(name, "")
        if isinstance(layer, torch.nn.BatchNorm2d):
            put(params, path, {"scale": array(of(layer.weight)), "bias": array(of(layer.bias))})
            put(stats, path, {"mean": array(layer.running_mean), "var": array(layer.running_var)})
        elif isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            put(params, path + "/w", convert(config, path, array(of(layer.weight))))
            if layer.bias is not None:
                put(params, path + "/b", array(of(layer.bias)))
    return params, stats


def logits_of(model, images):
    out = model(torch.from_numpy(images).permute(0, 3, 1, 2))
    return getattr(out, "logits", out)


@pytest.fixture(scope="module", params=CASES)
def case(request):
    config = CASES[request.param]
    model = jaxmodels.create(config)
    rng = np.random.default_rng(0)
    images = [rng.normal(0.5, 1, (B, *config.input_shape)).astype(np.float32) for _ in range(3)]
    return config, model, images


def test_our_tree_has_the_references_weights_and_no_others(case):
    config, model, _ = case
    params, stats = ours(config, *theirs(config))
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, model.shapes())
    assert jax.tree.map(np.shape, stats) == jax.tree.map(np.shape, model.stats())


def test_logits_equal_the_references(case):
    config, model, (images, *_) = case
    reference, names = theirs(config)
    params, stats = ours(config, reference, names)
    with torch.no_grad():
        expected = logits_of(reference.eval(), images).numpy()
    logits = jit(model.apply)(params, images, stats=stats or None)
    logits = logits[0] if stats else logits
    assert expected.std() > 0.1, "a signal arrives"
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


def test_training_has_the_references_gradients_and_statistics(case):
    config, model, batches = case
    reference, names = theirs(config)
    params, stats = ours(config, reference, names)
    reference.train()
    labels = np.arange(B) % CLASSES

    @jit
    def compute(params, stats, images):
        def loss(params):
            out = model.apply(params, images, stats=stats or None, train=True)
            logits, new = out if stats else (out, {})
            return -jax.nn.log_softmax(logits)[jnp.arange(B), labels].mean(), (logits, new)

        return jax.grad(loss, has_aux=True)(params)

    for images in batches:  # the same weights, statistics that go on
        reference.zero_grad()
        expected = logits_of(reference, images)
        torch.nn.functional.cross_entropy(expected, torch.from_numpy(labels)).backward()
        grads, (logits, stats) = compute(params, stats, images)
        np.testing.assert_allclose(logits, array(expected), rtol=0, atol=1e-4)
        their_grads, their_stats = ours(config, reference, names, lambda p: p.grad)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), stats, their_stats)
        sizes = jax.tree.map(lambda g: np.abs(g).max(), their_grads)
        assert max(jax.tree.leaves(sizes)) > 1e-2
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), grads, their_grads)


@pytest.mark.parametrize("bottleneck", [False, True])
def test_resnet_starts_with_the_deviations_of_transformers(bottleneck):
    config = dataclasses.replace(BASIC, classes=400, widths=(64, 96), bottleneck=bottleneck)
    reference, names = theirs(config)
    for module in reference.modules():
        reference._init_weights(module)
    expected, _ = ours(config, reference, names)
    params = jit(jaxmodels.create(config).init)(jax.random.key(0))

    def check(path, got, want):
        name, several = jax.tree_util.keystr(path, simple=True, separator="/"), 4 / got.size**0.5
        assert np.std(got) == pytest.approx(np.std(want), rel=several, abs=1e-7), name
        assert np.abs(np.mean(got) - np.mean(want)) <= 2 * several * np.std(want), name
        if name.startswith("head"):  # uniform, so that it has a bound
            assert np.abs(got).max() == pytest.approx(np.abs(want).max(), rel=0.03), name

    jax.tree_util.tree_map_with_path(check, params, expected)
