"""What is public, frozen: a change here is a line in CHANGELOG.md, and until 1.0 a new minor version."""

from __future__ import annotations

import ast
import subprocess
import sys

import jaxmodels
from jaxmodels import config

FUNCTIONS = {"create", "list_models", "load_pretrained", "load_run", "register"}
TYPES = {"Family", "Logger", "Loss", "Model", "Source", "Task", "UserError"}
SECTIONS = {"Augment", "Checkpoint", "Config", "Eval", "Init", "Mesh", "Metrics", "Profile", "Train"}
KINDS = {
    "SGD", "AdamW", "Adafactor", "Adam", "Lion", "Momentum", "Muon", "RMSprop",  # optim
    "WSD", "Constant", "Cosine", "Linear",  # optim.schedule
    "GAN", "VAE", "CausalLM", "Classification", "Contrastive", "MaskedLM", "Seq2Seq", "Transcription",  # task
    "TFDS", "HuggingFace", "Images", "Stdlib", "Synthetic", "Table", "Text", "Tokens",  # data
}  # fmt: skip
"""Sections that come in kinds, from `jaxmodels.config`."""


def test_the_public_names_are_these():
    assert set(jaxmodels.__all__) == FUNCTIONS | TYPES | SECTIONS
    assert all(getattr(jaxmodels, name) is not None for name in jaxmodels.__all__)
    assert sorted(jaxmodels.__all__) == sorted(set(jaxmodels.__all__))


def test_training_in_python_is_a_function_of_the_package_that_trains():
    from jaxmodels.train import load_run, train

    assert load_run.__doc__ and train.__doc__ and callable(train)
    assert "train" not in jaxmodels.__all__  # the package has the name


def test_configs_import_sections_and_their_kinds_from_one_place():
    assert set(config.__all__) >= SECTIONS | KINDS
    for name in SECTIONS:
        assert getattr(jaxmodels, name) is getattr(config, name), name


def test_what_is_public_is_typed_and_documented(root):
    assert (root / "jaxmodels" / "py.typed").is_file()
    for name in jaxmodels.__all__:
        assert (getattr(jaxmodels, name).__doc__ or "").strip(), name
    # a type checker sees the names only where the module imports them under TYPE_CHECKING
    tree = ast.parse((root / "jaxmodels" / "__init__.py").read_text())
    seen = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert set(jaxmodels.__all__) <= seen


def test_importing_the_package_does_not_load_jax():
    code = "import sys, jaxmodels; jaxmodels.UserError; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_what_is_not_there_is_no_attribute():
    assert not hasattr(jaxmodels, "Modle")
