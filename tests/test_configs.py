"""Every config in configs/ is one that trains: its parts fit together, and its step compiles, from shapes alone."""

import dataclasses

import jax
import pytest

from jaxmodels import config as configs
from jaxmodels.config import Mesh
from jaxmodels.models.resnet import ResNetConfig
from jaxmodels.train.job import assemble

FULL = (
    "bert_base_wikipedia",
    "gpt2_openwebtext",
    "llama3_8b_c4",
    "lstm_imdb",
    "resnet50_imagenet",
    "transformer_wmt14",
    "vit_b16_imagenet",
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
def test_the_step_of_a_config_for_a_full_set_compiles(name, root):
    cfg = configs.load(root / "configs" / f"{name}.py")
    wide = Mesh(data=2, fsdp=4) if cfg.mesh.fsdp == -1 else Mesh(data=8)
    cfg = dataclasses.replace(cfg, mesh=wide)
    if isinstance(cfg.model, ResNetConfig):  # its blocks are not scanned: one of each width stands for three to six
        cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, depths=(1, 1, 1, 1)))
    job = assemble(cfg, opened=False)
    compiled = job.lower().compile()
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(job.layout.params))
    shards = 4 if cfg.mesh.fsdp == 4 else 1
    assert compiled.memory_analysis().argument_size_in_bytes > 1.9 * held / shards, (
        "parameters and what the optimizer keeps"
    )
