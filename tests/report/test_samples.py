"""Pictures of what a model draws: the way from noise, and texts beside the images that have them."""

import numpy as np
import pytest

from jaxmodels import tasks
from jaxmodels.config import Config
from jaxmodels.models.dit import DiTConfig
from jaxmodels.report import samples
from jaxmodels.train.saved import Run
from tests.sections import data_of, task_of
from tests.zoo import arrays

SIZES = {"input_shape": (4, 4, 3), "patch": 2, "layers": 1, "heads": 2, "width": 8, "mlp_width": 8}


@pytest.mark.parametrize("by", ["class", "text"])
def test_the_report_shows_the_way_from_noise_and_what_texts_become(by, tmp_path, monkeypatch):
    model = DiTConfig(classes=3, **SIZES) if by == "class" else DiTConfig(classes=0, vocab_size=9, **SIZES)
    task = task_of("diffusion", sample_steps=3, guidance=2.0)
    cfg = Config(
        model=model, task=task, data=data_of("synthetic", batch_size=4, **({"seq_len": 6} if by == "text" else {}))
    )
    built = tasks.build(task, model, cfg.data)
    run = Run(tmp_path, cfg, built.networks, {"model": arrays(built.networks["model"])}, {}, 1)
    sheets, shown = [], []
    sheet, show = samples.sheet, samples.show
    monkeypatch.setattr(samples, "sheet", lambda images, *how: sheets.append(images) or sheet(images, *how))
    monkeypatch.setattr(samples, "show", lambda axis, image, **how: shown.append((axis, image)) or show(axis, image))
    evaluation = run.evaluation()
    if by == "text":  # which random examples do not have
        examples = evaluation.source.batch
        names = {"labels": np.arange(len(evaluation.examples(0, samples.NAMED)["tokens"]))}
        monkeypatch.setattr(evaluation.source, "batch", lambda *which: {**examples(*which), **names})
    found = samples.pieces(evaluation)
    assert [piece.name for piece in found] == ["fresh", "path", *["texts"] * (by == "text")]
    path = np.asarray(run.task.path(run.params, {}, samples.ROWS, samples.SEED))
    np.testing.assert_array_equal(sheets[1].reshape(samples.ROWS, 4, 4, 4, 3), path.swapaxes(0, 1))
    assert "in 3 steps" in found[1].caption
    if by == "text":
        batch = evaluation.examples(0, samples.NAMED)
        given = {name: batch[name] for name in ("tokens", "segment_ids") if name in batch}
        drawn = run.task.samples(run.params, {}, len(batch["images"]), samples.SEED, given=given)
        for (axis, pair), one, real, label in zip(shown, drawn, batch["images"], batch["labels"], strict=True):
            np.testing.assert_allclose(pair[:, :4], one, atol=1e-6)
            np.testing.assert_allclose(pair[:, 4:], real / 255, atol=1e-6)
            assert axis.get_title() == evaluation.class_name(label)
    assert all(piece.png().startswith(b"\x89PNG") for piece in found)
