"""Every config in configs/ is one that trains: its parts fit together, and its step is on record."""

import jax
import pytest

from benchmarks import exact
from jaxmodels import config as configs
from jaxmodels.train.job import assemble

FULL = (
    "bart_cnn_dailymail",
    "bert_base_wikipedia",
    "bert_scitldr",
    "bert_squad",
    "detr_resnet50_coco",
    "dit_imagenet",
    "gpt2_openwebtext",
    "llama3_8b_c4",
    "lstm_imdb",
    "resnet50_imagenet",
    "sasrec_movielens",
    "transformer_wmt14",
    "vit_b16_imagenet",
    "yolox_s_coco",
    "wav2vec2_librispeech",
    "whisper_librispeech",
)
"""Configs of sets that are too large to be here."""


def test_every_config_fits_four_devices_and_says_how_it_is_run(root):
    names = {path.stem for path in (root / "configs").glob("*.py")}
    assert set(FULL) < names
    for name in names:
        path = root / "configs" / f"{name}.py"
        cfg = configs.load(path)
        assemble(cfg, jax.devices()[:4], opened=False)
        text = path.read_text()
        assert f"configs/{name}.py" in text, f"{name} does not say its command"
        assert ("Not yet run" in text) == (name in FULL)


@pytest.mark.parametrize("name", FULL)
def test_the_step_of_a_config_for_a_full_set_is_on_record(name):
    """`benchmarks exact --check`, which CI runs, lowers each of these steps, and compiles those that have changed."""
    cases = {key: case for key, case in exact.CASES.items() if case.config[0] == name}
    records = [exact.read(exact.RECORDS, f"{key}-{on}") for key, case in cases.items() for on in case.on]
    assert records and all(record["bytes of memory"]["arguments"] > 0 for record in records)
