"""Curves are drawn from what a run wrote."""

import json

import matplotlib.image
import numpy as np

from jaxmodels.report import curves


def test_curves_show_what_the_metrics_say(tmp_path):
    rows = [
        {"step": s, "train/loss": 3 / s, "train/learning_rate": 1e-3, "perf/tokens_per_second": 5e4}
        for s in range(1, 30)
    ]
    rows[9] |= {"eval/loss": 0.5}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"step": 30, "tra')
    curves.draw(tmp_path, tmp_path / "a.png", {"unigram": 3.1})
    picture = matplotlib.image.imread(tmp_path / "a.png")
    assert picture.shape[0] > 500 and picture[..., :3].std() > 0.05
    curves.draw(tmp_path, tmp_path / "b.png")
    assert not np.array_equal(picture, matplotlib.image.imread(tmp_path / "b.png")), "the reference line is drawn"
    assert curves.last(tmp_path) == {"eval/loss": 0.5}
