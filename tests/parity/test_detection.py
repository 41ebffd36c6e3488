"""Average precision against COCO's own evaluation, and YOLOX against plain torch."""

import contextlib
import functools
import io

import jax
import numpy as np
import pytest

import jaxmodels
from jaxmodels.models.yolox import YOLOXConfig
from jaxmodels.tasks.average_precision import OVERLAPS, average_precisions

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="needs the parity extra: torch")
pytest.importorskip("pycocotools", reason="needs the parity extra: pycocotools")

# at these shapes LLVM's optimizations take longer than all else
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def by_pycocotools(found, classes):
    """Average precisions (C, 10) by pycocotools; NaN where it has none."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def listed(boxes, labels, scores=None):
        rows = []
        for image, label in np.argwhere(labels >= 0):
            left, top, right, bottom = boxes[image, label].tolist()
            row = {"image_id": int(image), "category_id": int(labels[image, label])}
            row |= {"bbox": [left, top, right - left, bottom - top]}
            row |= {"area": (right - left) * (bottom - top), "iscrowd": 0, "id": len(rows) + 1}
            rows.append(row | ({} if scores is None else {"score": float(scores[image, label])}))
        return rows

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": [{"id": i} for i in range(len(found["labels"]))],
            "categories": [{"id": c} for c in range(classes)],
            "annotations": listed(found["truth"], found["labels"]),
        }
        truth.createIndex()
        told = listed(found["boxes"], found["classes"], found["scores"])
        if not told:
            return np.where(np.isin(np.arange(classes), found["labels"])[:, None], 0.0, np.full(10, np.nan))
        evaluation = COCOeval(truth, truth.loadRes(told), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, :, 0, 2]  # overlaps, recalls, classes
    return np.where(precision > -1, precision, np.nan).mean(1).T


def drawn(rng, images, boxes, objects, classes):
    """Boxes on a raster of quarters, many of which overlap equally, with scores many of which are equal."""
    low = rng.integers(0, 12, (images, objects, 2)) * 4.0
    truth = np.concatenate([low, low + rng.integers(2, 6, (images, objects, 2)) * 4.0], -1)
    of = rng.integers(0, objects, (images, boxes, 1))
    near = np.take_along_axis(truth, of, 1) + rng.integers(-8, 9, (images, boxes, 4)) / 4
    labels = rng.integers(-1, classes, (images, objects))
    own = np.where(rng.random((images, boxes)) < 0.8, np.take_along_axis(labels, of[..., 0], 1), 0)
    scores = rng.integers(1, 12, (images, boxes)) / 12
    return {"boxes": near, "scores": scores, "classes": own, "truth": truth, "labels": labels}


@pytest.mark.parametrize(
    ("seed", "images", "boxes", "objects", "classes"),
    [(0, 12, 9, 6, 3), (1, 5, 30, 3, 2), (2, 4, 260, 5, 1), (3, 40, 2, 8, 4)],
    ids=["usual", "many-a-thing", "more-than-100", "few-found"],
)
def test_average_precision_is_that_of_pycocotools(seed, images, boxes, objects, classes):
    found = drawn(np.random.default_rng(seed), images, boxes, objects, classes)
    found["labels"][0], found["classes"][1] = -1, -1  # an image without an object, and one in which nothing is found
    got, expected = average_precisions(found, classes + 1), by_pycocotools(found, classes + 1)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)
    assert np.isnan(got[-1]).all() and np.nanmax(got) > 0.05 and len(OVERLAPS) == 10


def test_average_precision_of_no_box_at_all_is_zero():
    found = drawn(np.random.default_rng(4), 3, 2, 2, 2)
    found["classes"][:] = -1
    np.testing.assert_array_equal(average_precisions(found, 2), by_pycocotools(found, 2))


def unit(inputs, features, window=1, stride=1, groups=1):
    """Convolution, normalization and SiLU, by the names of our parameters."""
    parts = torch.nn.Sequential()
    parts.add_module("conv", torch.nn.Conv2d(inputs, features, window, stride, window // 2, groups=groups, bias=False))
    parts.add_module("norm", torch.nn.BatchNorm2d(features, eps=1e-3, momentum=0.03))
    parts.add_module("silu", torch.nn.SiLU())
    return parts


def wide(config, inputs, features, stride=1):
    parts = torch.nn.Sequential()
    if config.depthwise:
        parts.add_module("depth", unit(inputs, inputs, 3, stride, inputs))
        parts.add_module("point", unit(inputs, features))
    else:
        parts.add_module("full", unit(inputs, features, 3, stride))
    return parts


class Partial(torch.nn.Module):
    def __init__(self, config, inputs, features, blocks, residual):
        super().__init__()
        half, self.blocks, self.residual = features // 2, blocks, residual
        self.past, self.through, self.joined = unit(inputs, half), unit(inputs, half), unit(2 * half, features)
        for i in range(blocks):
            self.add_module(f"narrow{i}", unit(half, half))
            self.add_module(f"wide{i}", wide(config, half, half))

    def forward(self, x):
        y = self.through(x)
        for i in range(self.blocks):
            z = getattr(self, f"wide{i}")(getattr(self, f"narrow{i}")(y))
            y = y + z if self.residual else z
        return self.joined(torch.cat([y, self.past(x)], 1))


class Reference(torch.nn.Module):
    """YOLOX in torch, from tables and figures of the paper."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        c1, c2, c3, c4, c5 = (int(n * config.width) for n in (64, 128, 256, 512, 1024))
        n = max(round(3 * config.depth), 1)
        self.backbone, self.pyramid = torch.nn.Module(), torch.nn.Module()
        back, pyramid = self.backbone.add_module, self.pyramid.add_module
        back("stem", unit(12, c1, 3))
        for i, (a, b, blocks) in enumerate(((c1, c2, n), (c2, c3, 3 * n), (c3, c4, 3 * n), (c4, c5, n))):
            back(f"halved{i}", wide(config, a, b, 2))
            back(f"stage{i}", Partial(config, b, b, blocks, i < 3))
        pooled = torch.nn.Module()
        pooled.add_module("narrow", unit(c5, c5 // 2))
        pooled.add_module("joined", unit(2 * c5, c5))
        back("pooled", pooled)
        pyramid("coarse", unit(c5, c4))
        pyramid("down_middle", Partial(config, 2 * c4, c4, n, False))
        pyramid("middle", unit(c4, c3))
        pyramid("down_fine", Partial(config, 2 * c3, c3, n, False))
        pyramid("halved_fine", wide(config, c3, c3, 2))
        pyramid("up_middle", Partial(config, 2 * c3, c4, n, False))
        pyramid("halved_middle", wide(config, c4, c4, 2))
        pyramid("up_coarse", Partial(config, 2 * c4, c5, n, False))
        for stride, features in ((8, c3), (16, c4), (32, c5)):
            head = torch.nn.Module()
            head.add_module("narrow", unit(features, c3))
            for name in ("kind0", "kind1", "place0", "place1"):
                head.add_module(name, wide(config, c3, c3))
            for name, count in (("box", 4), ("object", 1), ("class", config.classes)):
                head.add_module(name, torch.nn.Conv2d(c3, count, 1))
            self.add_module(f"head{stride}", head)

    def forward(self, x):
        back, pyramid, levels = self.backbone, self.pyramid, []
        x = torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1)
        x = back.stem(x)
        for i in range(4):
            x = getattr(back, f"halved{i}")(x)
            if i == 3:
                y = back.pooled.narrow(x)
                pools = [torch.nn.functional.max_pool2d(y, k, 1, k // 2) for k in (5, 9, 13)]
                x = back.pooled.joined(torch.cat([y, *pools], 1))
            x = getattr(back, f"stage{i}")(x)
            levels.append(x)
        up = torch.nn.Upsample(scale_factor=2, mode="nearest")
        coarse = pyramid.coarse(levels[3])
        middle = pyramid.middle(pyramid.down_middle(torch.cat([up(coarse), levels[2]], 1)))
        fine = pyramid.down_fine(torch.cat([up(middle), levels[1]], 1))
        middle = pyramid.up_middle(torch.cat([pyramid.halved_fine(fine), middle], 1))
        coarse = pyramid.up_coarse(torch.cat([pyramid.halved_middle(middle), coarse], 1))
        found = []
        for stride, x in ((8, fine), (16, middle), (32, coarse)):
            head = getattr(self, f"head{stride}")
            x = head.narrow(x)
            kind, place = head.kind1(head.kind0(x)), head.place1(head.place0(x))
            box = head.box(place)
            y, x = torch.meshgrid(torch.arange(box.shape[2]), torch.arange(box.shape[3]), indexing="ij")
            middle, size = (box[:, :2] + torch.stack([x, y])) * stride, box[:, 2:].exp() * stride
            parts = [middle - size / 2, middle + size / 2, head.object(place), getattr(head, "class")(kind)]
            found.append(torch.cat(parts, 1).flatten(2).transpose(1, 2))
        return torch.cat(found, 1)


def put(tree, path, value):
    *parents, last = path.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[last] = value


def array(x):
    return np.array(x.detach().numpy())


def ours(reference):
    """Parameters and statistics of the reference in our trees."""
    params, stats = {}, {}
    for name, layer in reference.named_modules():
        path = name.replace(".", "/")
        if isinstance(layer, torch.nn.BatchNorm2d):
            put(params, path, {"scale": array(layer.weight), "bias": array(layer.bias)})
            put(stats, path, {"mean": array(layer.running_mean), "var": array(layer.running_var)})
        elif isinstance(layer, torch.nn.Conv2d):
            w = array(layer.weight).transpose(2, 3, 1, 0)
            put(params, path + "/w", w if layer.bias is None else w[0, 0])
            if layer.bias is not None:
                put(params, path + "/b", array(layer.bias))
    return params, stats


CASES = {
    "full": YOLOXConfig((64, 96, 3), 3, depth=0.2, width=0.125),
    "depthwise": YOLOXConfig((64, 64, 3), 2, depth=0.2, width=0.125, depthwise=True),
}


@pytest.mark.parametrize("name", CASES)
def test_yolox_equals_torch_in_evaluation_and_in_training_with_its_statistics(name):
    config = CASES[name]
    model = jaxmodels.create(config)
    torch.manual_seed(0)
    reference = Reference(config)
    for key, p in [*reference.named_parameters(), *reference.named_buffers()]:
        if not key.endswith("num_batches_tracked"):
            norm = p.ndim == 1 and key.endswith(("weight", "var"))
            p.data = 1 + 0.3 * torch.rand_like(p) if norm else torch.randn_like(p) * (p[0].numel() or 1) ** -0.5
    params, stats = ours(reference)
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, model.shapes())
    images = np.random.default_rng(0).normal(size=(4, *config.input_shape)).astype(np.float32)
    theirs = torch.from_numpy(images).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = reference.eval()(theirs).numpy()
    assert expected[..., 4:].std() > 0.1, "a signal arrives"
    np.testing.assert_allclose(jit(model.apply)(params, images, stats=stats)[0], expected, rtol=2e-4, atol=2e-3)

    out, new = jit(functools.partial(model.apply, train=True))(params, images, stats=stats)
    with torch.no_grad():
        expected = reference.train()(theirs).numpy()
    np.testing.assert_allclose(out, expected, rtol=1e-3, atol=1e-2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), new, ours(reference)[1])


@pytest.mark.parametrize(
    ("name", "millions"),
    # Ge et al. 2021, tables 3 and 4
    [("nano", 0.91), ("tiny", 5.06), ("s", 9.0), ("m", 25.3), ("l", 54.2), ("x", 99.1)],
)
def test_parameters_are_as_many_as_published(name, millions):
    model = jaxmodels.create(f"yolox-{name}")
    count = model.count()
    with torch.device("meta"):
        assert count == sum(p.numel() for p in Reference(model.config).parameters())
    assert count / 1e6 == pytest.approx(millions, rel=0.005)
