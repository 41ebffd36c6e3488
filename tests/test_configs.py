"""Every config in configs/ is one that trains: its parts fit together, and its step compiles, from shapes alone."""

import dataclasses

import jax
import pytest

from jaxmodels import config as configs
from jaxmodels import tasks
from jaxmodels.config import MeshConfig
from jaxmodels.parallel import mesh as meshes
from jaxmodels.train import state, step

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


def parts(cfg):
    """Task, optimizers, layout and mesh of an experiment."""
    task = tasks.build(cfg.task, cfg.model, cfg.data)
    mesh = meshes.make_mesh(cfg.mesh)
    return task, *state.compose(cfg, task, mesh), mesh


def test_every_config_fits_eight_devices_and_says_how_it_is_run(root):
    names = {path.stem for path in (root / "configs").glob("*.py")}
    assert set(FULL) < names
    for name in names:
        path = root / "configs" / f"{name}.py"
        cfg = configs.load(path)
        parts(cfg)
        sizes = meshes.sizes(cfg.mesh, 4)
        step.check(sizes, cfg.data.batch_size, cfg.train.accumulate, cfg.train.strategy, updates=cfg.task.critic_steps)
        text = path.read_text()
        assert f"configs/{name}.py" in text, f"{name} does not say its command"
        assert ("Not yet run" in text) == (name in FULL)


@pytest.mark.parametrize("name", FULL)
def test_the_step_of_a_config_for_a_full_set_compiles(name, root):
    cfg = configs.load(root / "configs" / f"{name}.py")
    wide = MeshConfig(data=2, fsdp=4) if cfg.mesh.fsdp == -1 else MeshConfig(data=8)
    cfg = dataclasses.replace(cfg, mesh=wide)
    task, optimizers, layout, mesh = parts(cfg)
    spec = task.batch_spec(cfg.data.batch_size)
    lies = task.shardings(mesh, spec)
    batch = {key: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=lies[key]) for key, x in spec.items()}
    options = {"accumulate": cfg.train.accumulate, "ema": cfg.train.ema}
    compiled = step.lower(task, optimizers, mesh, layout, batch, **options).compile()
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(layout.params))
    shards = 4 if cfg.mesh.fsdp == 4 else 1
    assert compiled.memory_analysis().argument_size_in_bytes > 1.9 * held / shards, (
        "parameters and what the optimizer keeps"
    )
